//! The header of one safetensors file, read and validated before anything else looks at the file.
//!
//! MLX's own loader accepts overlapping tensors, trailing bytes, duplicate names and overflowing shapes; this does not.
//! Format: 8 bytes little-endian length N, N bytes of JSON, then the data, without gaps.

use crate::json_file::{is_lfs_pointer, looks_like_a_web_page};
use mlx_cluster_common::dtype::DType;
use safetensors::{
    SafeTensorError,
    tensor::{Metadata, TensorInfo},
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    fs::File,
    io::Read,
    path::Path,
};

/// The safetensors crate's own limit.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;
pub(crate) const LENGTH_BYTES: u64 = 8;

/// All tensors of one file, with nothing left over and nothing overlapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHeader {
    pub tensors: BTreeMap<String, TensorSlot>,
    /// The length of the whole file.
    pub file_bytes: u64,
}

/// Where one tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSlot {
    pub dtype: DType,
    /// Row-major.
    pub shape: Vec<u64>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// Why a weight file is refused. `file` is the name as the caller gave it.
#[derive(Debug, thiserror::Error)]
pub enum WeightFileError {
    #[error("weight file {file} cannot be read: {source}")]
    Unreadable { file: String, source: std::io::Error },
    #[error("weight file {file} has only {bytes} bytes, too few for a safetensors file: download it again")]
    TooShort { file: String, bytes: u64 },
    #[error("weight file {file} looks like a web page: download it again")]
    WebPage { file: String },
    #[error("weight file {file} is a Git LFS pointer, not the weights: run `git lfs pull`, or download it again")]
    LfsPointer { file: String },
    #[error(
        "weight file {file} is not a safetensors file: its header would have {header_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed"
    )]
    HeaderTooLarge { file: String, header_bytes: u64 },
    #[error("weight file {file} is an incomplete download: it has {has_bytes} of {needed_bytes} bytes; download it again")]
    Incomplete { file: String, has_bytes: u64, needed_bytes: u64 },
    #[error("weight file {file} has {extra_bytes} bytes after its last tensor, which nothing describes: download it again")]
    TrailingBytes { file: String, extra_bytes: u64 },
    #[error("weight file {file}: the header is not valid JSON at line {line} column {column}: {problem}")]
    HeaderNotJson { file: String, line: usize, column: usize, problem: String },
    #[error("weight file {file}: the header describes tensor `{tensor}` twice")]
    DuplicateTensor { file: String, tensor: String },
    #[error("weight file {file}: the description of tensor `{tensor}` is malformed: {problem}")]
    MalformedTensor { file: String, tensor: String, problem: String },
    #[error("weight file {file}: tensor `{tensor}` has shape {shape:?}, which overflows")]
    ShapeOverflow { file: String, tensor: String, shape: Vec<usize> },
    #[error("weight file {file}: tensor `{tensor}` has shape {shape:?} of {dtype} = {expected_bits} bits, but {found_bytes} bytes of data")]
    SizeMismatch { file: String, tensor: String, shape: Vec<usize>, dtype: String, expected_bits: usize, found_bytes: usize },
    #[error("weight file {file}: the data of tensor `{tensor}` ends at {end} before it starts at {start}")]
    ReversedOffsets { file: String, tensor: String, start: usize, end: usize },
    #[error(
        "weight file {file}: the data of tensor `{tensor}` starts at {start}, inside the tensor before it, which ends at {previous_end}"
    )]
    Overlap { file: String, tensor: String, start: usize, previous_end: usize },
    #[error("weight file {file}: nothing describes the bytes {previous_end} to {start} before tensor `{tensor}`")]
    Gap { file: String, tensor: String, start: usize, previous_end: usize },
    #[error(
        "weight file {file}: tensor `{tensor}` has the element type {dtype}, which is not supported: use a model with F16, BF16, F32 or MLX-quantised weights"
    )]
    UnsupportedDType { file: String, tensor: String, dtype: String },
    #[error("weight file {file} was refused by the safetensors parser: {problem}")]
    Refused { file: String, problem: String },
}

/// Reads and validates the header of a file on disk. Reads nothing but the header; blocks on the disk.
pub fn read_header(path: &Path) -> Result<TensorHeader, WeightFileError> {
    let (head, file_bytes) = read_head(path)?;
    parse_head(&path.display().to_string(), &head, file_bytes)
}

/// What lies before the data of a file on disk, as it is there, and the length of the file. Blocks on the disk.
pub(crate) fn read_head(path: &Path) -> Result<(Vec<u8>, u64), WeightFileError> {
    let file = path.display().to_string();
    let unreadable = |source| WeightFileError::Unreadable { file: file.clone(), source };
    let mut reader = File::open(path).map_err(unreadable)?;
    let file_bytes = reader.metadata().map_err(unreadable)?.len();
    // Enough for the length, and to tell what a file is that is none of ours.
    let mut head = Vec::with_capacity(64);
    (&mut reader).take(64).read_to_end(&mut head).map_err(unreadable)?;
    let needed = LENGTH_BYTES + header_length(&file, &head, file_bytes)?;
    head.truncate(needed as usize);
    let rest = needed - head.len() as u64;
    reader.take(rest).read_to_end(&mut head).map_err(unreadable)?;
    Ok((head, file_bytes))
}

/// Validates what lies before the data of a file of `file_bytes`.
pub(crate) fn parse_head(file: &str, head: &[u8], file_bytes: u64) -> Result<TensorHeader, WeightFileError> {
    let needed_bytes = LENGTH_BYTES + header_length(file, head, file_bytes)?;
    let has_bytes = head.len() as u64;
    if has_bytes != needed_bytes {
        return Err(WeightFileError::Incomplete { file: file.to_owned(), has_bytes, needed_bytes });
    }
    parse_header(file, &head[LENGTH_BYTES as usize..], file_bytes)
}

/// The length of the JSON header, from the first bytes of a file of `file_bytes`.
pub(crate) fn header_length(file: &str, start: &[u8], file_bytes: u64) -> Result<u64, WeightFileError> {
    let file = || file.to_owned();
    if looks_like_a_web_page(start) && start.first_chunk().is_none_or(|first| u64::from_le_bytes(*first) > MAX_HEADER_BYTES) {
        return Err(WeightFileError::WebPage { file: file() });
    }
    if is_lfs_pointer(start) {
        return Err(WeightFileError::LfsPointer { file: file() });
    }
    let Some(first) = start.first_chunk::<8>() else {
        return Err(WeightFileError::TooShort { file: file(), bytes: file_bytes });
    };
    let header_bytes = u64::from_le_bytes(*first);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(WeightFileError::HeaderTooLarge { file: file(), header_bytes });
    }
    let needed_bytes = LENGTH_BYTES + header_bytes;
    if needed_bytes > file_bytes {
        return Err(WeightFileError::Incomplete { file: file(), has_bytes: file_bytes, needed_bytes });
    }
    Ok(header_bytes)
}

/// Validates the JSON part of a header against the length of the file that it describes.
pub(crate) fn parse_header(file: &str, json: &[u8], file_bytes: u64) -> Result<TensorHeader, WeightFileError> {
    let tensors = parse_entries(file, json)?;
    let slots = Metadata::new(None, tensors.clone()).map_err(|error| explain(file, &tensors, &error))?;
    let data_start = LENGTH_BYTES + json.len() as u64;
    let needed_bytes = data_start.saturating_add(slots.data_len() as u64);
    if needed_bytes > file_bytes {
        return Err(WeightFileError::Incomplete { file: file.to_owned(), has_bytes: file_bytes, needed_bytes });
    }
    if needed_bytes < file_bytes {
        return Err(WeightFileError::TrailingBytes { file: file.to_owned(), extra_bytes: file_bytes - needed_bytes });
    }
    let tensors = tensors.into_iter().map(|(name, info)| {
        let slot = slot(file, &name, &info, data_start)?;
        Ok((name, slot))
    });
    Ok(TensorHeader { tensors: tensors.collect::<Result<_, WeightFileError>>()?, file_bytes })
}

fn slot(file: &str, tensor: &str, info: &TensorInfo, data_start: u64) -> Result<TensorSlot, WeightFileError> {
    let name = info.dtype.to_string();
    let dtype = DType::from_safetensors(&name).ok_or_else(|| WeightFileError::UnsupportedDType {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        dtype: name,
    })?;
    let (start, end) = info.data_offsets;
    Ok(TensorSlot {
        dtype,
        shape: info.shape.iter().map(|&dimension| dimension as u64).collect(),
        offset: data_start + start as u64,
        bytes: (end - start) as u64,
    })
}

/// The entries of the header in the order of their data. The crate's own parser goes through a hash map, where the last of
/// two tensors of one name wins silently; hence this one.
pub(crate) fn parse_entries(file: &str, json: &[u8]) -> Result<Vec<(String, TensorInfo)>, WeightFileError> {
    let Entries(entries) = serde_json::from_slice(json).map_err(|error| {
        let problem = error.to_string();
        WeightFileError::HeaderNotJson {
            file: file.to_owned(),
            line: error.line(),
            column: error.column(),
            problem: problem.split(" at line ").next().unwrap_or_default().to_owned(),
        }
    })?;
    let mut names = BTreeSet::new();
    let mut tensors = Vec::with_capacity(entries.len());
    for (tensor, value) in entries {
        if !names.insert(tensor.clone()) {
            return Err(WeightFileError::DuplicateTensor { file: file.to_owned(), tensor });
        }
        let parsed = if tensor == "__metadata__" {
            // MLX writes null where it was given none, as mlx-lm does for adapters.
            serde_json::from_str::<Option<HashMap<String, String>>>(value.get()).map(|_| None)
        } else {
            serde_json::from_str::<TensorInfo>(value.get()).map(Some)
        };
        match parsed {
            Ok(Some(info)) => tensors.push((tensor, info)),
            Ok(None) => {}
            Err(error) => {
                let problem = error.to_string();
                return Err(WeightFileError::MalformedTensor { file: file.to_owned(), tensor, problem });
            }
        }
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok(tensors)
}

struct Entries(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that describes tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

/// Finds the tensor that the crate refused, which most of its errors leave out.
fn explain(file: &str, tensors: &[(String, TensorInfo)], error: &SafeTensorError) -> WeightFileError {
    let file = file.to_owned();
    let mut previous_end = 0;
    for (tensor, info) in tensors {
        let (start, end) = info.data_offsets;
        let tensor = tensor.clone();
        if end < start {
            return WeightFileError::ReversedOffsets { file, tensor, start, end };
        }
        if start < previous_end {
            return WeightFileError::Overlap { file, tensor, start, previous_end };
        }
        if start > previous_end {
            return WeightFileError::Gap { file, tensor, start, previous_end };
        }
        previous_end = end;
        let shape = info.shape.clone();
        let elements = shape.iter().copied().try_fold(1, usize::checked_mul);
        let Some(expected_bits) = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize())) else {
            return WeightFileError::ShapeOverflow { file, tensor, shape };
        };
        let found_bytes = end - start;
        if found_bytes.checked_mul(8) != Some(expected_bits) {
            let dtype = info.dtype.to_string();
            return WeightFileError::SizeMismatch { file, tensor, shape, dtype, expected_bits, found_bytes };
        }
    }
    WeightFileError::Refused { file, problem: error.to_string() }
}

#[cfg(test)]
#[path = "headers_tests.rs"]
mod tests;

//! Tensors of a checkpoint on their way between engines and safetensors files.

use super::CheckpointError;
use crate::training::files::{FileError, Output, attempt};
use bytes::Bytes;
use mlx_cluster_common::dtype::DType;
use mlx_cluster_hub::{TensorSlot, read_header};
use mlx_cluster_proto::wire;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};
use tempfile::{SpooledTempFile, spooled_tempfile_in};

/// More than this is kept on the disk until all tensors are there. Adapters seldom are.
const IN_MEMORY_BYTES_MAX: usize = 256 << 20;
/// The data starts at a multiple of this, as the safetensors library writes it.
const ALIGNMENT: usize = 8;

/// The two files of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What is trained.
    Adapters,
    /// What the optimizer remembers.
    Optimizer,
}

impl Part {
    pub fn file(self) -> &'static str {
        match self {
            Part::Adapters => "adapters.safetensors",
            Part::Optimizer => "optimizer.safetensors",
        }
    }
}

/// A tensor with its data: row-major, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedTensor {
    pub part: Part,
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub data: Bytes,
}

impl SavedTensor {
    /// Whether none of its numbers is infinite or none at all.
    pub fn is_finite(&self) -> bool {
        // Those have all bits of the exponent set.
        let of_16 = |exponent: u16| self.data.as_chunks().0.iter().all(|bytes| u16::from_le_bytes(*bytes) & exponent != exponent);
        match self.dtype {
            DType::F16 => of_16(0x7c00),
            DType::BF16 => of_16(0x7f80),
            DType::F32 => self.data.as_chunks().0.iter().all(|bytes| f32::from_le_bytes(*bytes).is_finite()),
            DType::F64 => self.data.as_chunks().0.iter().all(|bytes| f64::from_le_bytes(*bytes).is_finite()),
            _ => true,
        }
    }

    fn has_right_size(&self) -> bool {
        let elements = self.shape.iter().try_fold(1u64, |product, side| product.checked_mul(*side));
        elements.and_then(|elements| elements.checked_mul(self.dtype.size())) == Some(self.data.len() as u64)
    }
}

impl TryFrom<wire::SavedTensor> for SavedTensor {
    type Error = CheckpointError;

    fn try_from(saved: wire::SavedTensor) -> Result<Self, CheckpointError> {
        let part = if saved.is_optimizer { Part::Optimizer } else { Part::Adapters };
        let wire::Tensor { name, dtype, shape, data } = saved.tensor.unwrap_or_default();
        let known = DType::from_safetensors(&dtype);
        let shape = shape.into_iter().map(u64::from).collect();
        let tensor = known.map(|dtype| SavedTensor { part, name: name.clone(), dtype, shape, data });
        tensor.filter(SavedTensor::has_right_size).ok_or(CheckpointError::BadTensor { name })
    }
}

impl TryFrom<SavedTensor> for wire::SavedTensor {
    type Error = CheckpointError;

    fn try_from(tensor: SavedTensor) -> Result<Self, CheckpointError> {
        let SavedTensor { part, name, dtype, shape, data } = tensor;
        let shape = shape.into_iter().map(u32::try_from).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| CheckpointError::BadTensor { name: name.clone() })?;
        let tensor = wire::Tensor { name, dtype: dtype.name().into(), shape, data };
        Ok(Self { is_optimizer: part == Part::Optimizer, tensor: Some(tensor) })
    }
}

/// The tensors of a file that is to be written, in the order in which they came.
#[derive(Debug)]
pub(super) struct Spool {
    file: SpooledTempFile,
    /// For messages.
    folder: PathBuf,
    tensors: BTreeMap<String, Spooled>,
    end: u64,
}

#[derive(Debug)]
struct Spooled {
    dtype: DType,
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

impl Spool {
    /// What does not fit into memory goes to a nameless file in `folder`.
    pub(super) fn new(folder: &Path) -> Self {
        let file = spooled_tempfile_in(IN_MEMORY_BYTES_MAX, folder);
        Self { file, folder: folder.to_path_buf(), tensors: BTreeMap::new(), end: 0 }
    }

    pub(super) fn add(&mut self, tensor: SavedTensor) -> Result<(), CheckpointError> {
        if !tensor.has_right_size() {
            return Err(CheckpointError::BadTensor { name: tensor.name });
        }
        if self.tensors.contains_key(&tensor.name) {
            return Err(CheckpointError::TensorTwice { name: tensor.name });
        }
        let bytes = tensor.data.len() as u64;
        let file = &mut self.file;
        attempt("keep tensors in", &self.folder, || file.write_all(&tensor.data))
            .map_err(|error| error.of_writing(&self.folder, self.end + bytes))?;
        self.tensors.insert(tensor.name, Spooled { dtype: tensor.dtype, shape: tensor.shape, offset: self.end, bytes });
        self.end += bytes;
        Ok(())
    }

    pub(super) fn bytes(&self) -> u64 {
        self.end
    }

    /// Writes a safetensors file of the tensors, wide types first and then by name, so that the same tensors make the same file.
    pub(super) fn write(mut self, output: &mut Output) -> Result<(), SpoolError> {
        let mut tensors: Vec<(&String, &Spooled)> = self.tensors.iter().collect();
        tensors.sort_by(|(name, a), (other, b)| b.dtype.size().cmp(&a.dtype.size()).then_with(|| name.cmp(other)));
        output.write_all(&head(&tensors)?)?;
        for (_, tensor) in &tensors {
            self.file.seek(SeekFrom::Start(tensor.offset))?;
            let copied = io::copy(&mut (&mut self.file).take(tensor.bytes), output)?;
            if copied != tensor.bytes {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum SpoolError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Head(#[from] safetensors::SafeTensorError),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

impl From<SpoolError> for io::Error {
    fn from(error: SpoolError) -> Self {
        match error {
            SpoolError::Io(error) => error,
            other => io::Error::other(other),
        }
    }
}

fn head(tensors: &[(&String, &Spooled)]) -> Result<Vec<u8>, SpoolError> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, tensor)| {
        let start = end;
        end += tensor.bytes as usize;
        let shape = tensor.shape.iter().map(|side| *side as usize).collect();
        ((*name).clone(), TensorInfo { dtype: element(tensor.dtype), shape, data_offsets: (start, end) })
    });
    // What mlx writes, and looks for.
    let metadata = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    let mut json = serde_json::to_vec(&Metadata::new(Some(metadata), infos.collect())?)?;
    json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

fn element(dtype: DType) -> Dtype {
    match dtype {
        DType::Bool => Dtype::BOOL,
        DType::U8 => Dtype::U8,
        DType::U16 => Dtype::U16,
        DType::U32 => Dtype::U32,
        DType::U64 => Dtype::U64,
        DType::I8 => Dtype::I8,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
    }
}

/// A safetensors file that is read tensor by tensor: a part of a checkpoint, or the `resume_adapter_file` of a job.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    part: Part,
    file: File,
    /// The last one first.
    left: Vec<(String, TensorSlot)>,
}

impl TensorFile {
    /// Reads the header, and checks it against the file's length. Blocks on the disk.
    pub fn open(path: &Path, part: Part) -> Result<Self, CheckpointError> {
        let mut left: Vec<(String, TensorSlot)> = read_header(path)?.tensors.into_iter().collect();
        left.reverse();
        Ok(Self { path: path.to_path_buf(), part, file: attempt("open", path, || File::open(path))?, left })
    }

    /// Names and places of the tensors that are still to be read.
    pub fn left(&self) -> impl Iterator<Item = (&str, &TensorSlot)> {
        self.left.iter().rev().map(|(name, slot)| (name.as_str(), slot))
    }

    fn read(&mut self, name: String, slot: TensorSlot) -> Result<SavedTensor, FileError> {
        let file = &mut self.file;
        let data = attempt("read", &self.path, || {
            let mut data = vec![0; slot.bytes as usize];
            file.seek(SeekFrom::Start(slot.offset))?;
            file.read_exact(&mut data)?;
            Ok(data)
        })?;
        Ok(SavedTensor { part: self.part, name, dtype: slot.dtype, shape: slot.shape, data: data.into() })
    }
}

/// The tensors by name. Blocks on the disk.
impl Iterator for TensorFile {
    type Item = Result<SavedTensor, CheckpointError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (name, slot) = self.left.pop()?;
        Some(self.read(name, slot).map_err(Into::into))
    }
}

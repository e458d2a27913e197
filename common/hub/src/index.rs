//! The weight index of a model: every tensor with its file, type and shape, taken from the headers and checked against the
//! published index.

use crate::{
    description::{Description, WeightFile},
    error::HubError,
    headers::{parse_head, read_head, read_header},
    json_file::{JsonFileError, read_json_if_present},
};
use mlx_cluster_common::weights::WeightIndex;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// The file in which a model that is split over several weight files says which tensor is where.
pub const WEIGHT_INDEX_FILE: &str = "model.safetensors.index.json";

/// Formats that are, or may hide, Python's pickle: loading one runs whatever code its author put there.
const PICKLE_EXTENSIONS: [&str; 6] = ["bin", "pt", "pth", "pkl", "pickle", "ckpt"];
const MAX_FILE_NAME_BYTES: usize = 255;
const MAX_LISTED: usize = 5;

/// Why the weight files of a model do not make a whole.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IndexError {
    #[error(
        "{WEIGHT_INDEX_FILE} of {model} places tensor `{tensor}` in `{file}`, which is not a plain .safetensors file name: use another copy of the model"
    )]
    BadFileName { model: String, tensor: String, file: String },
    #[error("{WEIGHT_INDEX_FILE} of {model} names no file: download it again")]
    EmptyIndex { model: String },
    #[error("weight file {file} of {model} is missing, though {WEIGHT_INDEX_FILE} names it: download it again")]
    FileMissing { model: String, file: String },
    #[error("tensor `{tensor}` of {model} is not in {file}, where {WEIGHT_INDEX_FILE} places it: index and weights do not belong together")]
    TensorNotInFile { model: String, tensor: String, file: String },
    #[error("tensor `{tensor}` of {model} is in two files, {first} and {second}: remove the one that does not belong to the model")]
    TensorTwice { model: String, tensor: String, first: String, second: String },
    #[error("{model} has its weights only as {found}: pickle files can run code; convert to safetensors")]
    PickleOnly { model: String, found: String },
    #[error("{model} holds no model*.safetensors{found}: give a model with safetensors weights")]
    NoWeights { model: String, found: String },
}

/// The files that hold the weights, and where the published index, if there is one, places each tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WeightFiles {
    pub(crate) files: BTreeSet<String>,
    placed: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

/// The weight index of a model in a folder, from the headers of its files. Blocks on the disk.
pub fn folder_weight_index(folder: &Path) -> Result<WeightIndex, HubError> {
    let description = Description { config: Vec::new(), files: folder_weight_files(folder)? };
    Ok(description.weight_index(&folder.display().to_string())?)
}

/// The headers of a model in a folder, checked against its published index. Blocks on the disk.
pub(crate) fn folder_weight_files(folder: &Path) -> Result<BTreeMap<String, WeightFile>, HubError> {
    let model = folder.display().to_string();
    let weights = WeightFiles::find(&model, folder, &file_names(folder)?)?;
    let mut files = BTreeMap::new();
    for file in &weights.files {
        let path = folder.join(file);
        let (head, file_bytes) = read_head(&path)?;
        let header = parse_head(&path.display().to_string(), &head, file_bytes)?;
        files.insert(file.clone(), WeightFile { head, header, etag: None });
    }
    let description = Description { config: Vec::new(), files };
    weights.check(&model, &description.weight_index(&model)?)?;
    Ok(description.files)
}

/// The same from the weight files that are there, whether they are all of the model's or not; of the others, names as far as the published
/// index is there. Blocks on the disk.
pub fn partial_weight_index(folder: &Path) -> Result<WeightIndex, HubError> {
    let model = folder.display().to_string();
    let published: Option<IndexFile> = read_json_if_present(&folder.join(WEIGHT_INDEX_FILE))?;
    let weights = WeightFiles::without_index(&model, &file_names(folder)?)?;
    let mut files = BTreeMap::new();
    for file in weights.files {
        let header = read_header(&folder.join(&file))?;
        files.insert(file, WeightFile { head: Vec::new(), header, etag: None });
    }
    let mut index = Description { config: Vec::new(), files }.weight_index(&model)?;
    let names = published.into_iter().flat_map(|published| published.weight_map.into_keys());
    index.elsewhere = names.filter(|name| !index.tensors.contains_key(name)).collect();
    Ok(index)
}

impl WeightFiles {
    /// `folder` is where the index file would be; `present` are the names of the files that the model has.
    pub(crate) fn find(model: &str, folder: &Path, present: &BTreeSet<String>) -> Result<Self, HubError> {
        let index_path = folder.join(WEIGHT_INDEX_FILE);
        let index: Option<IndexFile> = read_json_if_present(&index_path)?;
        match index {
            Some(index) => Ok(Self::from_index(model, index.weight_map, present)?),
            None if present.contains(WEIGHT_INDEX_FILE) => Err(JsonFileError::Missing { path: index_path }.into()),
            None => Ok(Self::without_index(model, present)?),
        }
    }

    fn from_index(model: &str, placed: BTreeMap<String, String>, present: &BTreeSet<String>) -> Result<Self, IndexError> {
        if placed.is_empty() {
            return Err(IndexError::EmptyIndex { model: model.to_owned() });
        }
        for (tensor, file) in &placed {
            if !is_weight_file_name(file) {
                let (tensor, file) = (shorten(tensor), shorten(file));
                return Err(IndexError::BadFileName { model: model.to_owned(), tensor, file });
            }
        }
        let files: BTreeSet<String> = placed.values().cloned().collect();
        match files.difference(present).next() {
            Some(file) => Err(IndexError::FileMissing { model: model.to_owned(), file: file.clone() }),
            None => Ok(Self { files, placed: Some(placed) }),
        }
    }

    fn without_index(model: &str, present: &BTreeSet<String>) -> Result<Self, IndexError> {
        let is_weights = |name: &&String| name.starts_with("model") && is_weight_file_name(name);
        let files: BTreeSet<String> = present.iter().filter(is_weights).cloned().collect();
        if files.is_empty() {
            return Err(no_weights(model, present));
        }
        Ok(Self { files, placed: None })
    }

    /// What the headers say counts; the published index must agree.
    pub(crate) fn check(&self, model: &str, index: &WeightIndex) -> Result<(), IndexError> {
        for (tensor, file) in self.placed.iter().flatten() {
            if index.tensors.get(tensor).is_none_or(|entry| entry.file != *file) {
                let (tensor, file) = (shorten(tensor), file.clone());
                return Err(IndexError::TensorNotInFile { model: model.to_owned(), tensor, file });
            }
        }
        Ok(())
    }
}

/// The names of the plain files in a folder.
pub(crate) fn file_names(folder: &Path) -> Result<BTreeSet<String>, HubError> {
    let io_error = |source| HubError::Disk { action: "list", path: folder.to_path_buf(), source };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(folder).map_err(io_error)? {
        let path = entry.map_err(io_error)?.path();
        // `is_file` follows links: a link of the cache to a blob that is gone does not count.
        if let (true, Some(name)) = (path.is_file(), path.file_name().and_then(|name| name.to_str())) {
            names.insert(name.to_owned());
        }
    }
    Ok(names)
}

/// Whether a name is safe to join to a folder or a URL: one component, nothing hidden, nothing special.
pub(crate) fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= MAX_FILE_NAME_BYTES
        && !name.starts_with('.')
        && !name.chars().any(|c| c.is_control() || c == '/' || c == '\\' || c == ':')
}

/// A plain file name that ends in `.safetensors`.
pub(crate) fn is_weight_file_name(name: &str) -> bool {
    is_plain_file_name(name) && name.ends_with(".safetensors")
}

fn no_weights(model: &str, present: &BTreeSet<String>) -> IndexError {
    let with_extension = |wanted: &[&str]| {
        let names = present.iter().filter(|name| name.rsplit_once('.').is_some_and(|(_, extension)| wanted.contains(&extension)));
        names.take(MAX_LISTED).map(String::as_str).collect::<Vec<_>>().join(", ")
    };
    let model = model.to_owned();
    let pickles = with_extension(&PICKLE_EXTENSIONS);
    if !pickles.is_empty() {
        return IndexError::PickleOnly { model, found: pickles };
    }
    let others = with_extension(&["safetensors", "gguf", "npz", "onnx", "h5"]);
    let found = if others.is_empty() { String::new() } else { format!(" (only {others})") };
    IndexError::NoWeights { model, found }
}

fn shorten(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;

//! What a model at a commit consists of, its config and the heads of its weight files, kept on disk so that nobody asks the hub twice.

use crate::{
    error::HubError,
    headers::{TensorHeader, TensorSlot, parse_head},
    index::{IndexError, is_weight_file_name},
    json_file::read_json_if_present,
    model_ref::RepoRef,
};
use mlx_cluster_common::weights::{TensorEntry, WeightIndex};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const CONFIG_FILE: &str = "config.json";
/// Written last: without it a description does not count.
const FILES_FILE: &str = "files.json";

/// A model's config and all that its weight files say about themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// `config.json` as it is.
    pub config: Vec<u8>,
    pub files: BTreeMap<String, WeightFile>,
}

/// One published weight file, without its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFile {
    /// All bytes before the data, as they are.
    pub head: Vec<u8>,
    pub header: TensorHeader,
    /// As the hub gave it: the SHA-256 of the file where it is in LFS. None when the hub was not asked.
    pub etag: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    bytes: u64,
    etag: Option<String>,
}

impl WeightFile {
    /// # Errors
    /// When the head is not that of a safetensors file of `file_bytes`, or `name` is no plain file name.
    pub fn new(name: &str, head: Vec<u8>, file_bytes: u64, etag: Option<String>) -> Result<Self, HubError> {
        if !is_weight_file_name(name) {
            return Err(HubError::BadFileName { file: name.chars().take(80).flat_map(char::escape_debug).collect() });
        }
        let header = parse_head(name, &head, file_bytes)?;
        Ok(Self { head, header, etag })
    }

    /// The SHA-256 of the whole file, in hexadecimal, where the hub said it.
    pub(crate) fn sha256(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit()))
    }
}

impl Description {
    /// The file and place of a tensor.
    pub fn slot(&self, tensor: &str) -> Option<(&str, &TensorSlot)> {
        self.files.iter().find_map(|(file, of)| Some((file.as_str(), of.header.tensors.get(tensor)?)))
    }

    /// Every tensor with its file and place, by name.
    pub fn tensors(&self) -> BTreeMap<&str, (&str, &TensorSlot)> {
        let all = self.files.iter().flat_map(|(file, of)| of.header.tensors.iter().map(move |(name, slot)| (file.as_str(), name, slot)));
        all.map(|(file, name, slot)| (name.as_str(), (file, slot))).collect()
    }

    /// # Errors
    /// When a tensor is in two files.
    pub fn weight_index(&self, model: &str) -> Result<WeightIndex, IndexError> {
        let mut index = WeightIndex::default();
        for (file, of) in &self.files {
            for (tensor, slot) in &of.header.tensors {
                let entry = TensorEntry {
                    file: file.clone(),
                    dtype: slot.dtype,
                    shape: slot.shape.clone(),
                    offset: slot.offset,
                    bytes: slot.bytes,
                };
                if let Some(first) = index.tensors.insert(tensor.clone(), entry) {
                    return Err(IndexError::TensorTwice {
                        model: model.to_owned(),
                        tensor: tensor.clone(),
                        first: first.file,
                        second: file.clone(),
                    });
                }
            }
        }
        Ok(index)
    }
}

/// The descriptions that this machine keeps, by commit. A commit never changes, so they are never out of date.
#[derive(Debug, Clone)]
pub struct Descriptions {
    root: PathBuf,
}

impl Descriptions {
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// Those of the data folder `home`.
    pub fn of_home(home: &Path) -> Self {
        Self::new(&home.join("descriptions"))
    }

    /// None for a branch or a tag, which may mean something else tomorrow.
    fn folder(&self, repo: &RepoRef) -> Option<PathBuf> {
        Some(self.root.join(format!("{}--{}", repo.owner(), repo.name())).join(repo.commit()?))
    }

    /// None when nothing, or nothing usable, is kept. Blocks on the disk.
    pub fn read(&self, repo: &RepoRef) -> Option<Description> {
        let folder = self.folder(repo)?;
        let kept: BTreeMap<String, Kept> = read_json_if_present(&folder.join(FILES_FILE)).ok().flatten()?;
        let config = fs::read(folder.join(CONFIG_FILE)).ok()?;
        let read = |(name, Kept { bytes, etag }): (String, Kept)| {
            let head = fs::read(folder.join(format!("{name}.head"))).ok()?;
            let file = WeightFile::new(&name, head, bytes, etag).ok()?;
            Some((name, file))
        };
        Some(Description { config, files: kept.into_iter().map(read).collect::<Option<_>>()? })
    }

    /// Keeps a description; several processes may do so at once. Blocks on the disk.
    pub fn write(&self, repo: &RepoRef, description: &Description) -> Result<(), HubError> {
        let Some(folder) = self.folder(repo) else { return Ok(()) };
        let disk = |source| HubError::Disk { action: "write", path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(disk)?;
        write_whole(&folder.join(CONFIG_FILE), &description.config).map_err(disk)?;
        for (name, file) in &description.files {
            write_whole(&folder.join(format!("{name}.head")), &file.head).map_err(disk)?;
        }
        let kept = |file: &WeightFile| Kept { bytes: file.header.file_bytes, etag: file.etag.clone() };
        let kept: BTreeMap<_, _> = description.files.iter().map(|(name, file)| (name, kept(file))).collect();
        let text = serde_json::to_vec(&kept).map_err(|error| disk(error.into()))?;
        write_whole(&folder.join(FILES_FILE), &text).map_err(disk)
    }

    /// Forgets what is kept of all commits of a repository.
    pub fn forget(&self, repo: &RepoRef) -> std::io::Result<()> {
        match fs::remove_dir_all(self.root.join(format!("{}--{}", repo.owner(), repo.name()))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Replaces a file as a whole, so that no reader sees half of it.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}.{}", std::process::id()));
    fs::write(&fresh, content)?;
    fs::rename(&fresh, path)
}

//! A shard as a folder: the config, an index of all tensors of the model, and links to the files that hold the shard's.

use super::{Contents, ModelStore, files_with};
use crate::{
    description::{Description, write_whole},
    error::HubError,
    index::WEIGHT_INDEX_FILE,
};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

impl ModelStore {
    /// Makes the folder `name` of a shard of these tensors, all of which must be here; it replaces the one of an earlier time. Needs the
    /// lock. Blocks on the disk.
    ///
    /// # Errors
    /// [`HubError::TensorNotHere`] names a tensor that is missing.
    pub fn shard(&self, name: &str, description: &Description, contents: &Contents, wanted: &BTreeSet<&str>) -> Result<PathBuf, HubError> {
        let mut files = BTreeSet::new();
        for tensor in wanted {
            let held = contents.tensors.get(*tensor).ok_or_else(|| HubError::TensorNotHere { tensor: (*tensor).to_owned() })?;
            files.insert(held.path.as_path());
        }
        let folder = self.folder().join("shards").join(name);
        let made = fill(&folder, description, &files);
        made.map_err(|source| HubError::Disk { action: "make", path: folder.clone(), source })?;
        Ok(folder)
    }
}

fn fill(folder: &Path, description: &Description, files: &BTreeSet<&Path>) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for old in files_with(folder, super::WEIGHTS) {
        fs::remove_file(old)?;
    }
    // Links to what is gone are no files.
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_symlink() {
            fs::remove_file(path)?;
        }
    }
    write_whole(&folder.join("config.json"), &description.config)?;
    let placed: BTreeMap<_, _> = description.tensors().into_iter().map(|(name, (file, _))| (name, file)).collect();
    write_whole(&folder.join(WEIGHT_INDEX_FILE), json!({"weight_map": placed}).to_string().as_bytes())?;
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        // Weight files that no index names are told by their name.
        let name = if name.starts_with("model") { name.into_owned() } else { format!("model-{name}") };
        std::os::unix::fs::symlink(file, folder.join(name))?;
    }
    Ok(())
}

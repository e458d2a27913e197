//! What is in the cache that all Hugging Face tools share: listed, checked, removed.

use crate::{
    error::HubError,
    index::file_names,
    model_ref::{RepoRef, is_commit},
    settings::HubSettings,
    store::{HeldModel, folders, hexadecimal},
};
use sha2::{Digest as _, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

const BUFFER_BYTES: usize = 1 << 20;

/// The commits in the cache that have weight files. Blocks on the disk.
pub fn cached_models(settings: &HubSettings) -> Vec<HeldModel> {
    let mut found = Vec::new();
    for model in folders(&settings.cache_dir) {
        let name = model.file_name().and_then(|name| name.to_str());
        let Some((owner, name)) = name.and_then(|name| name.strip_prefix("models--")?.split_once("--")) else { continue };
        for folder in folders(&model.join("snapshots")) {
            let commit = folder.file_name().and_then(|name| name.to_str()).filter(|commit| is_commit(commit));
            let repo = commit.and_then(|commit| format!("{owner}/{name}@{commit}").parse::<RepoRef>().ok());
            let names = file_names(&folder).unwrap_or_default().into_iter();
            let weights = names.filter(|name| name.ends_with(".safetensors"));
            let bytes = weights.filter_map(|name| Some(fs::metadata(folder.join(name)).ok()?.len())).sum();
            if let (Some(repo), 1..) = (repo, bytes) {
                found.push(HeldModel { repo, folder, bytes });
            }
        }
    }
    found
}

/// The files of a snapshot whose content is not the one that their name in the cache promises. Blocks on the disk, for as long as reading
/// everything takes.
pub fn damaged_blobs(snapshot: &Path) -> Result<Vec<String>, HubError> {
    let mut damaged = Vec::new();
    for name in file_names(snapshot)? {
        let path = snapshot.join(&name);
        let disk = |source| HubError::Disk { action: "read", path: path.clone(), source };
        let blob = fs::canonicalize(&path).map_err(disk)?;
        let etag = blob.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // Only what lies in LFS is named by its SHA-256.
        let is_sha256 = etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_sha256 && !etag.eq_ignore_ascii_case(&sha256_of(&blob).map_err(disk)?) {
            damaged.push(name);
        }
    }
    Ok(damaged)
}

/// Removes one commit of a model, and with the last one the whole model. Blocks on the disk.
pub fn remove_cached(settings: &HubSettings, repo: &RepoRef) -> Result<(), HubError> {
    let snapshot = settings.cached_folder(repo);
    let disk = |source| HubError::Disk { action: "remove", path: snapshot.clone(), source };
    let (model, names) = (snapshot.ancestors().nth(2).unwrap_or(&snapshot).to_path_buf(), file_names(&snapshot)?);
    let others: Vec<_> = folders(&model.join("snapshots")).into_iter().filter(|folder| *folder != snapshot).collect();
    if others.is_empty() {
        return fs::remove_dir_all(&model).map_err(disk);
    }
    let blob_of = |path: std::path::PathBuf| fs::canonicalize(path).ok();
    let used: Vec<_> = others
        .iter()
        .flat_map(|folder| file_names(folder).unwrap_or_default().into_iter().filter_map(|name| blob_of(folder.join(name))))
        .collect();
    for blob in names.iter().filter_map(|name| blob_of(snapshot.join(name))).filter(|blob| !used.contains(blob)) {
        fs::remove_file(blob).map_err(disk)?;
    }
    fs::remove_dir_all(&snapshot).map_err(disk)
}

fn sha256_of(path: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; BUFFER_BYTES]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hexadecimal(&hash.finalize().into())),
            count => hash.update(&buffer[..count]),
        }
    }
}

//! Our own store of tensors: of a model at a commit, exactly those that this machine was told to hold.
//!
//! `models--owner--name/COMMIT/{model-HASH.safetensors, model-HASH.digests, model-HASH.part, lock, whole, shards/NAME/}`. What was fetched
//! together is one safetensors file, a [`Batch`]. While it grows it is a `.part`, and its `.digests` say which of its tensors are complete;
//! so whatever ends the process, nothing that was complete is lost. Half a file is never in the cache that all tools share.

mod batch;
mod contents;
mod pull;
mod ranges;
mod verify;
mod view;
mod whole;
mod writer;

pub use batch::Batch;
pub(crate) use batch::hexadecimal;
pub use contents::{Contents, Held};
pub use ranges::TensorRanges;
pub use writer::{BatchWriter, Damaged};

use crate::{
    cache::check_free_space,
    description::Description,
    error::HubError,
    headers::read_header,
    model_ref::{RepoRef, is_commit},
};
use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// SHA-256 of a tensor's data.
pub type Digest = [u8; 32];

const LOCK_POLL: Duration = Duration::from_millis(100);
const PART: &str = "part";
const DIGESTS: &str = "digests";
const WEIGHTS: &str = "safetensors";

/// The tensors of one model at one commit.
#[derive(Debug, Clone)]
pub struct ModelStore {
    folder: PathBuf,
}

/// The right to change what is stored of a model; ends with this value, or with the process.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

impl ModelStore {
    /// `root` is the folder of all models. None unless the revision is a commit.
    pub fn new(root: &Path, repo: &RepoRef) -> Option<Self> {
        let name = format!("models--{}--{}", repo.owner(), repo.name());
        Some(Self { folder: root.join(name).join(repo.commit()?) })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until nobody else changes what is stored of this model.
    ///
    /// # Errors
    /// [`HubError::Locked`] when that takes longer than `patience`.
    pub async fn lock(&self, patience: Duration) -> Result<StoreLock, HubError> {
        let path = self.folder.join("lock");
        let disk = |source| HubError::Disk { action: "lock", path: path.clone(), source };
        fs::create_dir_all(&self.folder).map_err(disk)?;
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(disk)?;
        let since = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(StoreLock { _file: file }),
                Err(TryLockError::WouldBlock) if since.elapsed() < patience => tokio::time::sleep(LOCK_POLL).await,
                Err(TryLockError::WouldBlock) => return Err(HubError::Locked { lock: path, waited: since.elapsed() }),
                Err(TryLockError::Error(source)) => return Err(disk(source)),
            }
        }
    }

    /// What is here and complete, in this store and in `cached`, the model's folder in the shared cache. Blocks on the disk.
    pub fn contents(&self, description: &Description, cached: Option<&Path>) -> Result<Contents, HubError> {
        Contents::scan(&self.folder, description, cached)
    }

    /// What was begun and not completed. What is of no use is thrown away. Needs the lock. Blocks on the disk.
    pub fn begun(&self, description: &Description) -> Result<Vec<Batch>, HubError> {
        let mut begun = Vec::new();
        for path in files_with(&self.folder, PART) {
            let disk = |source| HubError::Disk { action: "clear up", path: path.clone(), source };
            match Batch::read(&path, description) {
                // The process ended after the last tensor, or while the batch was being settled.
                Some(batch) if read_header(&path).is_ok() => {
                    fs::rename(&path, self.folder.join(format!("{}.{WEIGHTS}", batch.stem()))).map_err(disk)?;
                }
                Some(batch) => begun.push(batch),
                None => fs::remove_file(&path).map_err(disk)?,
            }
        }
        Ok(begun)
    }

    /// Begins a batch, or goes on with it where it was left. Needs the lock. Blocks on the disk.
    pub fn writer(&self, batch: Batch) -> Result<BatchWriter, HubError> {
        BatchWriter::open(&self.folder, batch)
    }

    /// # Errors
    /// [`HubError::DiskFull`] when so many bytes more do not fit.
    pub fn check_free_space(&self, needed_bytes: u64) -> Result<(), HubError> {
        check_free_space(&self.folder, needed_bytes)
    }

    /// Throws away what is stored and begun, so that it is fetched again. Needs the lock.
    pub fn clear(&self) -> Result<(), HubError> {
        let disk = |source| HubError::Disk { action: "remove", path: self.folder.clone(), source };
        [WEIGHTS, PART, DIGESTS]
            .iter()
            .flat_map(|extension| files_with(&self.folder, extension))
            .try_for_each(fs::remove_file)
            .map_err(disk)
    }
}

/// A commit of a model, of which something is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldModel {
    pub repo: RepoRef,
    pub folder: PathBuf,
    /// Of complete tensors and what was begun.
    pub bytes: u64,
}

/// All that is stored under `root`. Blocks on the disk.
pub fn held_models(root: &Path) -> Vec<HeldModel> {
    let mut found = Vec::new();
    for model in folders(root) {
        let Some((owner, name)) = file_name(&model).and_then(|name| name.strip_prefix("models--")?.split_once("--")) else { continue };
        for folder in folders(&model) {
            let Some(commit) = file_name(&folder).filter(|commit| is_commit(commit)) else { continue };
            let Ok(repo) = format!("{owner}/{name}@{commit}").parse() else { continue };
            let files = [WEIGHTS, PART].iter().flat_map(|extension| files_with(&folder, extension));
            let bytes = files.filter_map(|file| Some(fs::metadata(file).ok()?.len())).sum();
            found.push(HeldModel { repo, folder, bytes });
        }
    }
    found
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

pub(crate) fn folders(folder: &Path) -> Vec<PathBuf> {
    entries(folder).into_iter().filter(|path| path.is_dir()).collect()
}

fn files_with(folder: &Path, extension: &str) -> Vec<PathBuf> {
    entries(folder).into_iter().filter(|path| path.extension().is_some_and(|found| found == extension) && path.is_file()).collect()
}

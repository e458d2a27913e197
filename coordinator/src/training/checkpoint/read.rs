//! A checkpoint that is there: found, checked to the last byte, read, and handed out as mlx-lm names it.

use super::{
    CheckpointError, CheckpointState, Checkpoints, Part, STATE_FILE, SavedTensor, TensorFile,
    state::{Contents, FileDigest, hex},
};
use crate::training::files::{FileError, attempt, copy_atomically, make_folder, sync_folder, write_atomically};
use mlx_cluster_common::training::TrainingConfig;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

const HASHED_AT_ONCE_BYTES: usize = 1 << 20;

/// A whole checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    folder: PathBuf,
    pub state: CheckpointState,
    files: BTreeMap<String, FileDigest>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Newest {
    /// None: the job starts from its beginning.
    pub checkpoint: Option<Checkpoint>,
    /// A sentence for each newer one that was damaged and put aside.
    pub warnings: Vec<String>,
}

impl Checkpoint {
    pub(super) fn new(folder: PathBuf, contents: Contents) -> Self {
        Self { folder, state: contents.state, files: contents.files }
    }

    /// None where something is damaged.
    fn open(folder: &Path, iteration: u64) -> Result<Option<Self>, FileError> {
        let state = folder.join(STATE_FILE);
        let json = match attempt("read", &state, || fs::read(&state)) {
            Err(error) if error.is_not_found() => return Ok(None),
            json => json?,
        };
        let Some(contents) = Contents::from_json(&json) else { return Ok(None) };
        for (name, wanted) in &contents.files {
            match digest(&folder.join(name)) {
                Ok(found) if found == *wanted => {}
                Err(error) if !error.is_not_found() => return Err(error),
                _ => return Ok(None),
            }
        }
        Ok((contents.state.iteration == iteration).then(|| Self::new(folder.to_path_buf(), contents)))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn path(&self, part: Part) -> PathBuf {
        self.folder.join(part.file())
    }

    pub fn has_optimizer(&self) -> bool {
        self.files.contains_key(Part::Optimizer.file())
    }

    /// Refuses to go on without what the optimizer remembers.
    pub fn check_optimizer(&self) -> Result<(), CheckpointError> {
        match self.has_optimizer() {
            true => Ok(()),
            false => Err(CheckpointError::NoOptimizer { iteration: self.state.iteration }),
        }
    }

    /// The tensors of `parts`, one at a time.
    pub fn tensors(&self, parts: &[Part]) -> Result<impl Iterator<Item = Result<SavedTensor, CheckpointError>> + use<>, CheckpointError> {
        let there = parts.iter().filter(|part| self.files.contains_key(part.file()));
        let files: Vec<TensorFile> = there.map(|part| TensorFile::open(&self.path(*part), *part)).collect::<Result<_, _>>()?;
        Ok(files.into_iter().flatten())
    }

    /// Writes the adapter where mlx-lm does: `adapters.safetensors`, and `NNNNNNN_adapters.safetensors` with the `iteration` that is given: of
    /// batches that are accumulated, the checkpoint is as of the last update.
    pub fn export(&self, adapter_path: &Path, iteration: Option<u64>) -> Result<(), CheckpointError> {
        make_folder(adapter_path)?;
        let adapters = self.path(Part::Adapters);
        if let Some(iteration) = iteration {
            copy_atomically(&adapters, &adapter_path.join(format!("{iteration:07}_adapters.safetensors")))?;
        }
        copy_atomically(&adapters, &adapter_path.join(Part::Adapters.file()))?;
        Ok(())
    }
}

impl Checkpoints {
    /// The newest whole checkpoint. Damaged ones are put aside, with a warning each.
    pub fn newest(&self) -> Result<Newest, CheckpointError> {
        let mut newest = Newest::default();
        for iteration in self.iterations()? {
            let place = self.of(iteration);
            newest.checkpoint = Checkpoint::open(&place, iteration)?;
            if newest.checkpoint.is_some() {
                break;
            }
            let damaged = self.damaged(iteration);
            super::remove(&damaged)?;
            attempt("rename", &place, || fs::rename(&place, &damaged))?;
            sync_folder(&self.folder)?;
            newest.warnings.push(format!("the checkpoint at iteration {iteration} is damaged and was put aside as {}", damaged.display()));
        }
        Ok(newest)
    }
}

/// Writes `adapter_config.json` as mlx-lm does.
pub fn export_config(config: &TrainingConfig, adapter_path: &Path) -> Result<(), CheckpointError> {
    make_folder(adapter_path)?;
    let path = adapter_path.join("adapter_config.json");
    let mut json = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, serde_json::ser::PrettyFormatter::with_indent(b"    "));
    attempt("write", &path, || Ok(config.adapter_config().serialize(&mut serializer)?))?;
    Ok(write_atomically(&path, &json)?)
}

/// Length and SHA-256 of a file.
pub(super) fn digest(path: &Path) -> Result<FileDigest, FileError> {
    attempt("read", path, || {
        let mut file = File::open(path)?;
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        let mut buffer = vec![0; HASHED_AT_ONCE_BYTES];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(FileDigest { bytes, sha256: hex(&hash.finalize()) }),
                Ok(count) => {
                    hash.update(&buffer[..count]);
                    bytes += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    })
}

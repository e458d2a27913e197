//! Checkpoints of a job: folders `checkpoints/NNNNNNN`, each whole or not there.
//!
//! A checkpoint has what a job needs to go on to the same bits: the trained parameters, what the optimizer remembers, and how far the job
//! was. The order of examples and all random numbers follow from the seed and the iteration. Everything here blocks on the disk.

mod read;
mod state;
mod tensors;
#[cfg(test)]
pub(super) mod tests;
mod write;

pub use read::{Checkpoint, Newest, export_config};
pub use state::{CheckpointState, SinceReport};
pub use tensors::{Part, SavedTensor, TensorFile};
pub use write::CheckpointWriter;

use super::files::{FileError, attempt, make_folder, sync_folder};
use mlx_cluster_hub::WeightFileError;
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// So many are kept.
const KEPT: usize = 2;
const STATE_FILE: &str = "state.json";
/// Of what lies hidden beside the checkpoints.
const ASIDE_SUFFIXES: [&str; 3] = ["partial", "replaced", "damaged"];

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Tensors(#[from] WeightFileError),
    #[error("tensor `{name}` of a checkpoint does not have the size that its shape and type say")]
    BadTensor { name: String },
    #[error("tensor `{name}` was saved by two engines; please report this")]
    TensorTwice { name: String },
    #[error("the checkpoint at iteration {iteration} has no optimizer state: resume with --warm-start to go on with a new optimizer")]
    NoOptimizer { iteration: u64 },
    #[error(
        "the job cannot go on from its checkpoint at iteration {iteration}: {}; resume with what it was made with, or start a new job with resume_adapter_file",
        differences.join("; ")
    )]
    Different { iteration: u64, differences: Vec<String> },
}

/// The checkpoints of one job.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// Those under a job's folder. Clears away what was left half-done.
    pub fn open(job_folder: &Path) -> Result<Self, CheckpointError> {
        let folder = job_folder.join("checkpoints");
        make_folder(&folder)?;
        let checkpoints = Self { folder };
        checkpoints.tidy()?;
        Ok(checkpoints)
    }

    /// A new checkpoint, fed tensor by tensor.
    pub fn begin(&self, has_optimizer: bool) -> CheckpointWriter {
        CheckpointWriter::new(self.clone(), has_optimizer)
    }

    fn of(&self, iteration: u64) -> PathBuf {
        self.folder.join(format!("{iteration:07}"))
    }

    /// Where the checkpoint is made.
    fn partial(&self, iteration: u64) -> PathBuf {
        self.folder.join(format!(".{iteration:07}.partial"))
    }

    /// Where the one that is replaced stays until the new one is in its place.
    fn replaced(&self, iteration: u64) -> PathBuf {
        self.folder.join(format!(".{iteration:07}.replaced"))
    }

    /// What turned out to be damaged, until there is a new checkpoint.
    fn damaged(&self, iteration: u64) -> PathBuf {
        self.folder.join(format!(".{iteration:07}.damaged"))
    }

    /// Names of all entries.
    fn entries(&self) -> Result<Vec<String>, FileError> {
        let names = || fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect();
        attempt("list", &self.folder, names)
    }

    /// Iterations of the checkpoints that are in place, the newest first.
    fn iterations(&self) -> Result<Vec<u64>, FileError> {
        let number = |name: String| name.parse().ok().filter(|number| self.of(*number).file_name().is_some_and(|file| *file == *name));
        let mut numbers: Vec<u64> = self.entries()?.into_iter().filter_map(number).collect();
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        Ok(numbers)
    }

    fn tidy(&self) -> Result<(), FileError> {
        for name in self.entries()? {
            let path = self.folder.join(&name);
            match aside(&name) {
                Some((_, "partial")) => remove(&path)?,
                Some((number, "replaced")) if self.folder.join(number).exists() => remove(&path)?,
                // The new one did not get into its place.
                Some((number, "replaced")) => {
                    let place = self.folder.join(number);
                    attempt("rename", &path, || fs::rename(&path, &place))?;
                    sync_folder(&self.folder)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The checkpoint's name and the suffix of what we put aside. Names of others, such as Finder's `.DS_Store`, are not ours to touch.
fn aside(name: &str) -> Option<(&str, &str)> {
    let (number, suffix) = name.strip_prefix('.')?.rsplit_once('.')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && ASIDE_SUFFIXES.contains(&suffix)).then_some((number, suffix))
}

/// Removes a folder, or a file that has its name. It may not be there.
fn remove(path: &Path) -> Result<(), FileError> {
    attempt("remove", path, || match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(path),
        removed => removed,
    })
}

//! Why something is not done with a job, each with the next step.

use crate::training::{
    checkpoint::CheckpointError,
    store::{JobId, StoreError},
};
use mlx_cluster_common::training::TrainingConfigError;
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("there is no job `{id}`: GET /v1/jobs and `mlx-cluster jobs list` show all")]
    NotFound { id: String },
    #[error("job {id} is {state} already")]
    Active { id: JobId, state: &'static str },
    #[error("job {id} is {state}: there is nothing to stop")]
    NotActive { id: JobId, state: &'static str },
    #[error("job {id} is run by another coordinator of this home: ask that one")]
    Elsewhere { id: JobId },
    #[error("job {id} has finished at iteration {iteration}: give more `iters` to go on")]
    Finished { id: JobId, iteration: u64 },
    #[error("{waiting} jobs wait already: stop one, or try again when one has ended")]
    TooMany { waiting: usize },
    #[error(transparent)]
    Config(#[from] TrainingConfigError),
    /// By its checkpoint.
    #[error(transparent)]
    Refused(CheckpointError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot read {}: {source}", path.display())]
    Metrics { path: PathBuf, source: io::Error },
    #[error("the coordinator is stopping")]
    Stopping,
    #[error("a task of the coordinator failed: {cause}; please report this")]
    Task { cause: String },
}

//! What can go wrong in the maths.

use mlx_cluster_common::{
    cache::CacheError,
    ids::{AdapterId, SequenceId},
};
use mlx_rs::error::Exception;

/// A step that failed leaves the caches undefined: the engine has to drop all sequences, or end.
#[derive(Debug, thiserror::Error)]
pub enum LmError {
    #[error("MLX: {0}")]
    Mlx(String),
    #[error("cannot read the weights in {file}: {cause}")]
    Read { file: String, cause: String },
    #[error("cannot write {file}: {source}")]
    Write { file: String, source: std::io::Error },
    #[error("`{name}` is {found} in {file}, its header said {wanted}: the file changed while it was loaded")]
    Changed { name: String, file: String, found: String, wanted: String },
    #[error("`{name}` was made as {found}, planned was {planned}")]
    Made { name: String, found: String, planned: String },
    #[error("parameter `{name}` was not loaded for this shard")]
    NotLoaded { name: String },
    #[error("{count} loaded parameters were not used, the first is `{first}`")]
    NotUsed { count: usize, first: String },
    #[error("sequence {sequence} is not known to this stage")]
    UnknownSequence { sequence: SequenceId },
    #[error("sequence {sequence}: the step starts at token {start}, the caches hold {held}")]
    OutOfStep { sequence: SequenceId, start: u32, held: u32 },
    #[error("the adapter of `{path}` cannot be used: {cause}")]
    Adapter { path: String, cause: String },
    #[error("adapter {adapter} is loaded already")]
    AdapterTwice { adapter: AdapterId },
    #[error("adapter {adapter} is not loaded on this stage")]
    UnknownAdapter { adapter: AdapterId },
    #[error("this model cannot be trained so: {0}")]
    NotTrained(String),
    #[error("tensor-parallel group: {0}")]
    Group(String),
    #[error(transparent)]
    Caches(#[from] CacheError),
    #[error(
        "update {step}: `{name}` is {found}, needed is {wanted}; parameters and gradients have to be those that the optimizer was made for"
    )]
    Update { step: u64, name: String, found: String, wanted: String },
    #[error(
        "the optimizer's state in the checkpoint does not fit this training: `{name}` is {found}, needed is {wanted}; \
         resume with the configuration that the checkpoint was made with, or start anew without it"
    )]
    OptimizerState { name: String, found: String, wanted: String },
    #[error("the step needs {wanted} as input, it came with {found}")]
    WrongInput { wanted: String, found: String },
}

impl From<Exception> for LmError {
    fn from(exception: Exception) -> Self {
        LmError::Mlx(exception.what().to_owned())
    }
}

//! What an engine that trains is told besides its layers.

use super::{FineTune, Optimizer, Schedule};
use crate::units::Bytes;
use serde::{Deserialize, Serialize};

/// What the ranks of a stage are to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parallel {
    /// Each has a part of every matrix, and all see the same rows.
    Tensor,
    /// Each has all of the stage's layers, and sees rows of its own; gradients are added up.
    Data,
}

/// How an engine trains its layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingRole {
    pub fine_tune: FineTune,
    /// Of the model's last layers; None: all.
    pub num_layers: Option<u32>,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    /// Of new adapters and of dropout.
    pub seed: u64,
    /// Keeps the input of each layer alone and computes the rest again on the way back.
    pub grad_checkpoint: bool,
    /// MLX's spare buffers are freed after a step when they hold more than this.
    pub clear_cache_threshold: Bytes,
    pub parallel: Parallel,
}

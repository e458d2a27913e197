//! What all ranks of a group have of each parameter, side by side.

use super::{
    Split, TensorPlace,
    select::{Selection, Selections},
    splitter::Splitter,
};
use crate::{spec::ModelSpec, weights::WeightMap};
use std::{collections::BTreeMap, ops::Range};

/// A parameter that is not whole on every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    /// The axis that it is cut along.
    pub axis: usize,
    /// Entries of that axis, in each rank's own order. Those of several ranks may overlap where something is copied.
    pub of_ranks: Vec<Vec<Range<u64>>>,
}

/// By name of a parameter; what is not here is whole on every rank. `spec` and `whole` are those of the whole model.
pub fn holdings(spec: &ModelSpec, whole: &WeightMap, shares: &[u32]) -> BTreeMap<String, Holdings> {
    let splits = splits(spec, whole, shares);
    let mut all = BTreeMap::new();
    for (part, parameters) in &whole.parts {
        let selections = Selections::new(spec, whole, *part);
        for parameter in parameters {
            let of_ranks: Vec<_> = splits.iter().map(|split| selections.of(split, parameter)).collect();
            let cut = of_ranks.iter().find_map(|selection| match selection {
                Selection::Entries { axis, .. } => Some(*axis),
                Selection::Whole => None,
            });
            let Some(axis) = cut else { continue };
            let length = parameter.shape.get(axis).copied().unwrap_or(1);
            let ranges = |selection| match selection {
                Selection::Entries { ranges, .. } => ranges,
                Selection::Whole => std::iter::once(0..length).collect(),
            };
            all.insert(parameter.name.clone(), Holdings { axis, of_ranks: of_ranks.into_iter().map(ranges).collect() });
        }
    }
    all
}

/// The split of each rank.
pub(super) fn splits(spec: &ModelSpec, whole: &WeightMap, shares: &[u32]) -> Vec<Split> {
    let split = |rank| {
        let place = TensorPlace { rank, shares: shares.to_vec() };
        let mut splitter = Splitter::new(spec, whole, &place);
        splitter.split();
        splitter.split
    };
    (0..shares.len() as u32).map(split).collect()
}

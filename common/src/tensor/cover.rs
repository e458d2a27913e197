//! The proof that the ranks of a group have every entry of every parameter.

use super::{
    Cut, Split,
    holdings::splits,
    select::{Selection, Selections},
};
use crate::{
    spec::{ModelSpec, Part},
    weights::{Parameter, WeightMap},
};

/// A parameter that the ranks do not have as they should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoverError {
    #[error("entry {entry} of axis {axis} of `{name}` is on no rank of a group with shares {shares:?}; please report this")]
    Missing { name: String, axis: usize, entry: u64, shares: Vec<u32> },
    #[error(
        "entry {entry} of axis {axis} of `{name}` is added up from several ranks of a group with shares {shares:?}; please report this"
    )]
    Twice { name: String, axis: usize, entry: u64, shares: Vec<u32> },
    #[error("`{name}` is cut along different axes on the ranks of a group with shares {shares:?}; please report this")]
    Axes { name: String, shares: Vec<u32> },
}

/// Checks that each entry of each parameter of these parts is on a rank, and, where the ranks' outputs are added up, on exactly one.
pub fn check_cover(spec: &ModelSpec, whole: &WeightMap, parts: &[Part], shares: &[u32]) -> Result<(), CoverError> {
    let splits = splits(spec, whole, shares);
    for part in parts {
        let selections = Selections::new(spec, whole, *part);
        for parameter in whole.parts.get(part).into_iter().flatten() {
            check(&selections, &splits, parameter, shares)?;
        }
    }
    Ok(())
}

fn check(selections: &Selections<'_>, splits: &[Split], parameter: &Parameter, shares: &[u32]) -> Result<(), CoverError> {
    let of_ranks: Vec<_> = splits.iter().map(|split| selections.of(split, parameter)).collect();
    if of_ranks.contains(&Selection::Whole) {
        return Ok(());
    }
    let (name, shares) = (parameter.name.clone(), shares.to_vec());
    let mut along = None;
    let mut ranges = Vec::new();
    for selection in of_ranks {
        let Selection::Entries { axis, ranges: own } = selection else { continue };
        if *along.get_or_insert(axis) != axis {
            return Err(CoverError::Axes { name, shares });
        }
        ranges.extend(own);
    }
    let axis = along.unwrap_or(0);
    ranges.sort_by_key(|range| (range.start, range.end));
    let added_up = splits.iter().any(|split| added_up(split, &parameter.name));
    let mut end = 0;
    for range in ranges {
        if range.start > end {
            return Err(CoverError::Missing { name, axis, entry: end, shares });
        }
        if added_up && range.start < end {
            return Err(CoverError::Twice { name, axis, entry: range.start, shares });
        }
        end = end.max(range.end);
    }
    match parameter.shape.get(axis).copied().unwrap_or(1) {
        length if end == length => Ok(()),
        _ => Err(CoverError::Missing { name, axis, entry: end, shares }),
    }
}

fn added_up(split: &Split, name: &str) -> bool {
    let cut = split.cuts.get(name).or_else(|| split.cuts.get(name.rsplit_once('.').map_or(name, |(path, _)| path)));
    matches!(cut, Some(Cut::Input(_) | Cut::Member(_)))
}

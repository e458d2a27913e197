//! Parameters of which each rank of a group has a part and trains it: how their gradients are completed, and how the whole is put together.
//!
//! A part's gradient is complete on its rank, for nothing of it is used elsewhere; only copies that several ranks have, and what all of them have,
//! are added up. Then what every rank does to a copy is the same, and copies stay copies.

use super::buckets::summed;
use crate::{
    entries::{entries, spread},
    error::LmError,
    group::Group,
};
use mlx_cluster_common::tensor::Holdings;
use mlx_rs::{Array, ops};
use std::{collections::BTreeMap, ops::Range};

/// Of all parameters that are cut; what is not among them is whole on every rank.
pub(super) struct Pieces {
    group: Group,
    by_name: BTreeMap<String, Piece>,
}

/// What this rank has of a parameter.
struct Piece {
    axis: usize,
    /// Entries of the whole axis.
    length: i32,
    /// In the order in which they are here.
    own: Vec<Range<u32>>,
    /// Whether no rank before this one has an entry, nor this one at an earlier place, in the same order.
    is_first: Vec<bool>,
    has_copies: bool,
}

impl Pieces {
    pub(super) fn new(group: Group, holdings: BTreeMap<String, Holdings>) -> Self {
        let rank = group.rank() as usize;
        Self { by_name: holdings.into_iter().map(|(name, of)| (name, Piece::new(&of, rank))).collect(), group }
    }

    /// The shape of the whole parameter.
    pub(super) fn whole_shape(&self, name: &str, own: &Array) -> Vec<i32> {
        let mut shape = own.shape().to_vec();
        if let Some(piece) = self.by_name.get(name) {
            shape[piece.axis] = piece.length;
        }
        shape
    }

    /// This rank's part.
    pub(super) fn own(&self, name: &str, whole: &Array) -> Result<Array, LmError> {
        match self.by_name.get(name) {
            Some(piece) => entries(whole, piece.axis, &piece.own),
            None => Ok(whole.clone()),
        }
    }

    /// The whole, from the parts of all ranks, which all have to ask for it.
    pub(super) fn whole(&self, name: &str, own: &Array) -> Result<Array, LmError> {
        let Some(piece) = self.by_name.get(name) else { return Ok(own.clone()) };
        let mut shape = vec![1; own.ndim()];
        shape[piece.axis] = own.dim(piece.axis as i32);
        let counts = Array::from_slice(&piece.is_first, &shape);
        let counted = ops::select(&counts, own, Array::from_f32(0.0).as_dtype(own.dtype())?)?;
        self.group.all_sum(&spread(&counted, piece.axis, piece.length, &piece.own)?)
    }

    /// [`whole`](Self::whole) of each, by the names of parameters.
    pub(super) fn all_whole(&self, own: &BTreeMap<String, Array>) -> Result<BTreeMap<String, Array>, LmError> {
        own.iter().map(|(name, own)| Ok((name.clone(), self.whole(name, own)?))).collect()
    }

    /// Completed gradients of the parts, each of which goes to all ranks that have it.
    pub(super) fn summed(&self, gradients: BTreeMap<String, Array>) -> Result<BTreeMap<String, Array>, LmError> {
        let (mut complete, mut partial) = (BTreeMap::new(), BTreeMap::new());
        for (name, gradient) in gradients {
            match self.by_name.get(&name) {
                Some(piece) if !piece.has_copies => drop(complete.insert(name, gradient)),
                Some(piece) => drop(partial.insert(name, spread(&gradient, piece.axis, piece.length, &piece.own)?)),
                None => drop(partial.insert(name, gradient)),
            }
        }
        for (name, sum) in summed(&self.group, partial)? {
            let own = self.own(&name, &sum)?;
            complete.insert(name, own);
        }
        Ok(complete)
    }
}

impl Piece {
    fn new(of: &Holdings, rank: usize) -> Self {
        let ends = of.of_ranks.iter().flatten().map(|range| range.end);
        let length = ends.max().unwrap_or(0) as usize;
        let (mut times, mut is_first) = (vec![0u32; length], Vec::new());
        for (number, ranges) in of.of_ranks.iter().enumerate() {
            for entry in ranges.iter().cloned().flatten() {
                if number == rank {
                    is_first.push(times[entry as usize] == 0);
                }
                times[entry as usize] += 1;
            }
        }
        let own = of.of_ranks.get(rank).into_iter().flatten().map(|range| range.start as u32..range.end as u32).collect();
        Self { axis: of.axis, length: length as i32, own, is_first, has_copies: times.iter().any(|times| *times > 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_count_where_they_are_first() {
        // Heads that share keys unevenly have them twice on one rank.
        let holdings = Holdings { axis: 1, of_ranks: vec![vec![0..2, 0..2, 4..6], vec![4..6, 2..4]] };
        let pieces = [0, 1].map(|rank| Piece::new(&holdings, rank));
        assert!(pieces.iter().all(|piece| piece.has_copies && piece.length == 6));
        assert_eq!(pieces[0].is_first, [true, true, false, false, true, true]);
        assert_eq!(pieces[1].is_first, [false, false, true, true]);
        let apart = Holdings { axis: 0, of_ranks: vec![vec![0..3], vec![3..4]] };
        assert!(!Piece::new(&apart, 1).has_copies);
    }
}

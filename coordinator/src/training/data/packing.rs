//! Several examples in one row of a batch: a batch of few, long rows holds as many tokens as the memory is reckoned for.
//!
//! Examples of a packed row do not see each other, and count as they do alone: packing changes only how many examples a batch has.

use super::DataSet;
use std::{cmp::Reverse, collections::BTreeSet};

/// Examples by their places in the set, row by row; the examples of a row have at most `max_seq_length` tokens together. Best-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973): the longest first, each into the fullest row that
/// has room for it. Rows are in the order of their first examples, so that the file's order is kept as far as can be.
pub fn pack(set: &DataSet) -> Vec<Vec<u32>> {
    let max_seq_length = set.max_seq_length;
    let len = |index: u32| set.examples[index as usize].tokens.len();
    let mut longest_first: Vec<u32> = (0..u32::try_from(set.examples.len()).unwrap_or(u32::MAX)).collect();
    longest_first.sort_by_key(|index| Reverse(len(*index)));
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // (tokens that are free, row)
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for index in longest_first {
        let needed = len(index);
        let (free, row) = open.range((needed, 0)..).next().copied().unwrap_or((max_seq_length, rows.len()));
        if row == rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(index);
        open.remove(&(free, row));
        open.insert((free - needed, row));
    }
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable();
    rows
}

/// What packing did, for people.
pub fn packing_note(set: &DataSet, rows: &[Vec<u32>]) -> String {
    format!("packing puts the {} examples of {} into {} rows", set.examples.len(), set.name, rows.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::data::fixtures::set;
    use proptest::prelude::*;

    #[test]
    fn long_examples_take_short_ones_along() {
        let packed = pack(&set(&[(6, 1), (5, 1), (4, 1), (3, 1), (99, 1), (2, 1)], 10));
        assert_eq!(packed, [vec![0, 2], vec![1, 3, 5], vec![4]]);
        let note = packing_note(&set(&[(1, 1), (1, 1)], 10), &[vec![0, 1]]);
        assert_eq!(note, "packing puts the 2 examples of test data into 1 rows");
    }

    proptest! {
        #[test]
        fn every_example_is_in_one_row_that_has_room(lengths in prop::collection::vec(1usize..40, 0..200), limit in 1usize..50) {
            let set = set(&lengths.iter().map(|len| (*len, 1)).collect::<Vec<_>>(), limit);
            let rows = pack(&set);
            let mut seen = rows.concat();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..lengths.len() as u32));
            let tokens = |row: &Vec<u32>| row.iter().map(|index| set.examples[*index as usize].tokens.len()).sum::<usize>();
            prop_assert!(rows.iter().all(|row| tokens(row) <= limit && !row.is_empty()));
            // No two rows would fit into one: fewer than one row is wasted in all but half of the rows.
            let mut fills: Vec<_> = rows.iter().map(tokens).collect();
            fills.sort_unstable();
            prop_assert!(fills.windows(2).all(|pair| pair[0] + pair[1] > limit));
        }
    }
}

//! From an example to a row of a batch, with the targets that mlx-lm counts.
//!
//! `iterate_batches` pads a batch with zeros to a width w of 1 and the next multiple of 32, at most `max_seq_length`; `default_loss`
//! counts the steps s (the target at place s) with offset <= s <= n, where n is the length after cutting. So where a row is shorter
//! than w the first zero is a target too, and a row is as long as w only when it is `max_seq_length` tokens long: what a row
//! contributes does not depend on its neighbours, and nothing needs to be padded.

use super::{DataSet, Example};
use mlx_cluster_common::training::Row;
use std::ops::Range;

/// What mlx-lm pads with.
const PAD: u32 = 0;

impl Example {
    /// Inputs, targets, and which of them count; cut to `max_seq_length` tokens.
    pub fn row(&self, max_seq_length: usize) -> Row {
        let len = self.tokens.len().min(max_seq_length);
        let inputs = self.inputs(max_seq_length);
        let mut targets = self.tokens[len.min(1)..len].to_vec();
        if targets.len() < inputs {
            targets.push(PAD);
        }
        Row { tokens: self.tokens[..inputs].to_vec(), targets, counted: self.counted(max_seq_length) }
    }

    /// Whether any target of its row counts.
    pub(super) fn has_targets(&self, max_seq_length: usize) -> bool {
        !self.counted(max_seq_length).is_empty()
    }

    fn inputs(&self, max_seq_length: usize) -> usize {
        self.tokens.len().min(max_seq_length.saturating_sub(1))
    }

    fn counted(&self, max_seq_length: usize) -> Range<u32> {
        let end = self.inputs(max_seq_length) as u32;
        // Steps are counted from 1.
        self.offset.saturating_sub(1).min(end)..end
    }
}

impl DataSet {
    /// The rows of a batch of [`Batches`](super::Batches).
    ///
    /// # Panics
    /// When the batch was made for another, larger set.
    pub fn rows(&self, batch: &[u32]) -> Vec<Row> {
        batch.iter().map(|index| self.examples[*index as usize].row(self.max_seq_length)).collect()
    }
}

/// Targets of a batch that count; 0 when all of it is masked, and then it has no loss.
pub fn batch_targets(rows: &[Row]) -> u64 {
    rows.iter().map(Row::n_counted).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tokens: &[u32], offset: u32, max_seq_length: usize) -> Row {
        Example { tokens: tokens.to_vec(), offset, order: 1 }.row(max_seq_length)
    }

    #[test]
    fn the_first_pad_is_a_target() {
        let whole = row(&[5, 6, 7], 0, 8);
        assert_eq!((whole.tokens, whole.targets, whole.counted), (vec![5, 6, 7], vec![6, 7, PAD], 0..3));
    }

    #[test]
    fn a_cut_row_has_no_pad() {
        for tokens in [&[5, 6, 7][..], &[5, 6, 7, 8]] {
            let cut = row(tokens, 0, 3);
            assert_eq!((cut.tokens, cut.targets, cut.counted), (vec![5, 6], vec![6, 7], 0..2));
        }
    }

    #[test]
    fn masked_targets_do_not_count() {
        assert_eq!(row(&[5, 6, 7], 1, 8).counted, 0..3);
        assert_eq!(row(&[5, 6, 7], 2, 8).counted, 1..3);
        assert_eq!(row(&[5, 6, 7], 3, 8).counted, 2..3);
        assert_eq!(row(&[5, 6, 7], 4, 8).n_counted(), 0);
        assert_eq!(row(&[5, 6, 7], 9, 8).n_counted(), 0);
        assert_eq!(row(&[5], 0, 8), Row { tokens: vec![5], targets: vec![PAD], counted: 0..1 });
    }
}

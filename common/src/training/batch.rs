//! What one forward and backward pass of a training step is about.

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// One example. Rows of a batch have lengths of their own: nothing is padded, and packed examples are rows too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Inputs: `targets[i]` is what shall follow `tokens[i]`.
    pub tokens: Vec<u32>,
    pub targets: Vec<u32>,
    /// The targets that count in the loss.
    pub counted: Range<u32>,
}

/// Rows that go through the model together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MicroBatch {
    pub rows: Vec<Row>,
    /// Targets that count in the whole batch of which this is a part: the loss is a mean over so many.
    pub batch_targets: u64,
    /// For dropout: the number of the batch and of this part's first row in it.
    pub batch: u64,
    pub first_row: u32,
}

impl Row {
    /// Number of targets that count.
    pub fn n_counted(&self) -> u64 {
        u64::from(self.counted.end.saturating_sub(self.counted.start))
    }
}

impl MicroBatch {
    pub fn n_tokens(&self) -> u64 {
        self.rows.iter().map(|row| row.tokens.len() as u64).sum()
    }

    pub fn n_counted(&self) -> u64 {
        self.rows.iter().map(Row::n_counted).sum()
    }
}

//! From files to micro-batches, as `mlx_lm/tuner/datasets.py` and `iterate_batches` of `mlx_lm/tuner/trainer.py` do it, so that losses
//! can be compared iteration by iteration.
//!
//! [`locate`] finds the files, in a folder or on the hub; [`read`] checks and tokenizes them; [`Batches`] says which examples come when;
//! [`DataSet::rows`] and [`divide`] make of them what engines are sent. All but `locate` is synchronous, and all but reading is pure.

mod batches;
mod divide;
mod encode;
mod error;
#[cfg(test)]
pub(super) mod fixtures;
mod form;
mod lines;
mod locate;
mod numpy_random;
mod packing;
mod read;
mod rows;
mod split;

pub use batches::{BatchError, BatchPlan, Batches, Grouped, Iteration, test_only};
pub use divide::{MicroLimits, divide};
pub use encode::Encoder;
pub use error::{DataError, RowFault};
pub use form::Features;
pub use locate::{DataSource, HubSet, Located, Wanted, locate};
pub use packing::{pack, packing_note};
pub use read::{ReadOptions, read};
pub use rows::batch_targets;
pub use split::SplitError;

use sha2::{Digest, Sha256};

/// One row of a file, tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Cut to the set's `max_seq_length`; at least one.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt, which do not count in the loss; 0 where all count. May be more than there are tokens.
    pub offset: u32,
    /// What mlx-lm sorts by: the number of fields of the row, or of all columns where the set is from the hub.
    pub order: usize,
}

/// The examples of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataSet {
    /// For people: the file, or the repository and split.
    pub name: String,
    /// In the order of the file.
    pub examples: Vec<Example>,
    pub max_seq_length: usize,
    /// What a user should know, a sentence each.
    pub notes: Vec<String>,
}

/// What was read. A set that was not asked for is None, and so is a validation set that does not exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataSets {
    pub train: Option<DataSet>,
    pub valid: Option<DataSet>,
    pub test: Option<DataSet>,
    /// About sets that are not there.
    pub notes: Vec<String>,
}

impl DataSet {
    /// SHA-256, in hexadecimal, of all that batches are made of: a resumed job must have the same.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update((self.max_seq_length as u64).to_le_bytes());
        for example in &self.examples {
            hash.update((example.order as u64).to_le_bytes());
            hash.update(example.offset.to_le_bytes());
            hash.update((example.tokens.len() as u64).to_le_bytes());
            example.tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod golden_tests;

//! From the names and layouts that a checkpoint was published with to those that blocks ask for: what mlx-lm's `sanitize` does with
//! arrays, done with names and shapes alone, so that the planner knows every parameter before a byte is read.

mod gather;
mod layouts;
mod recipe;
mod select;
mod symbolic;
mod tensors;
mod undo;

pub use gather::Piece;
pub use layouts::LatentUpProjection;
pub use recipe::{Affine, QuantisedPiece, Recipe, SourceTensor};
pub use select::Span;
pub use symbolic::{QuantisedTensors, SymbolicTensor};
pub use tensors::{Tensors, layer_of};
pub use undo::{Assignment, Irreversible, Step};

use crate::{
    dtype::DType,
    spec::{HeadSpec, ModelSpec},
};
use std::{collections::BTreeMap, fmt};

/// An architecture's rules, applied in place. They have to leave canonical names alone, and to hold for any part of a checkpoint: a node
/// has only its shard's files, so what a rule depends on is the tensor itself, or a name anywhere in the model (`Tensors::model_has`).
pub type Rules = fn(&ModelSpec, &mut Tensors) -> Result<(), PublishedError>;

/// How an architecture's published checkpoints differ from its canonical parameters. The default is not at all.
#[derive(Clone)]
pub struct Published {
    /// One after the other.
    rules: Vec<Rules>,
    /// Factors of the config that published tensors still have to be multiplied with, by a name that the rules know.
    multipliers: BTreeMap<&'static str, Vec<f32>>,
}

impl Published {
    pub fn new(rules: Rules) -> Self {
        Self::with_multipliers(rules, BTreeMap::new())
    }

    pub fn with_multipliers(rules: Rules, multipliers: BTreeMap<&'static str, Vec<f32>>) -> Self {
        Self { rules: vec![rules], multipliers }
    }

    /// The same with other rules before these: a wrapper's names first, then those of the language model in it.
    pub fn after(mut self, first: Rules) -> Self {
        self.rules.insert(0, first);
        self
    }

    /// The factors under a name; none when the architecture gave none.
    pub fn multipliers(&self, name: &str) -> &[f32] {
        self.multipliers.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    /// Quantisation of published files, then the architecture's rules, then what all have in common.
    pub(crate) fn apply(&self, spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
        if let Some(layout) = spec.quantization.published {
            tensors.convert_quantisation(layout)?;
        }
        self.rules.iter().try_for_each(|rules| rules(spec, tensors))?;
        tensors.drop_containing("rotary_emb.inv_freq");
        tensors.drop_containing("rope.inv_freq");
        if spec.head == HeadSpec::Tied {
            tensors.drop_where(|name| name.starts_with("lm_head.") || name.contains(".lm_head."));
        }
        Ok(())
    }
}

impl Default for Published {
    fn default() -> Self {
        Self::new(|_, _| Ok(()))
    }
}

impl PartialEq for Published {
    fn eq(&self, other: &Self) -> bool {
        let same = |(a, b): (&Rules, &Rules)| std::ptr::fn_addr_eq(*a, *b);
        self.rules.len() == other.rules.len() && self.rules.iter().zip(&other.rules).all(same) && self.multipliers == other.multipliers
    }
}

impl fmt::Debug for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Published").field("multipliers", &self.multipliers).finish_non_exhaustive()
    }
}

/// Why a checkpoint's tensors cannot be brought to canonical names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishedError {
    #[error("tensor `{tensor}` of shape {shape:?} cannot be {action}: config.json and weights do not belong together")]
    Shape { tensor: String, shape: Vec<u64>, action: String },
    #[error("tensor `{tensor}` has type {found}, wanted {wanted}")]
    Type { tensor: String, found: DType, wanted: &'static str },
    #[error("the checkpoint has `{name}` twice, as `{first}` and as `{second}`")]
    Twice { name: String, first: String, second: String },
    #[error("tensor `{name}` is missing from the checkpoint, which has `{beside}`: download the model again")]
    Missing { name: String, beside: String },
    #[error("no tensors to join")]
    Empty,
}

#[cfg(test)]
mod tests;

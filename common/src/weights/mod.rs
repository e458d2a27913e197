//! Which tensors of a checkpoint make up which part of a model: every tensor used, every shape checked.
//!
//! The planner counts bytes with this, and an engine loads by it, so both agree on what a shard is.

mod assign;

use crate::{
    dtype::DType,
    published::{PublishedError, Recipe, SymbolicTensor},
    spec::{ModelSpec, Part},
};
use assign::Assignment;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// The tensors of a model as its safetensors headers list them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WeightIndex {
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Names of the tensors in files of the model that were not read, as far as they are known.
    pub elsewhere: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// The file's name inside the model's folder.
    pub file: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Where its bytes start, from the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

/// A parameter as a block asks for it by name, and what of the checkpoint it is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// `<path>.weight`, `.scales`, `.biases` or `.bias`, or the name of a tensor that stands alone.
    pub name: String,
    pub recipe: Recipe,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub bytes: u64,
    /// Bytes that are in memory beside the parameter while it is made.
    pub transient_bytes: u64,
}

/// The parameters of every part of a model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct WeightMap {
    pub parts: BTreeMap<Part, Vec<Parameter>>,
    /// The type of embeddings and norms, so of activations.
    pub activation_dtype: Option<DType>,
}

/// Why a checkpoint does not fit its config.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    #[error("tensor `{name}` is missing from the checkpoint{hint}: download the model again, or check that config.json belongs to it")]
    Missing { name: String, hint: String },
    #[error("tensor `{name}`{origin} has shape {found:?}, the config asks for {wanted:?}")]
    Shape { name: String, origin: String, found: Vec<u64>, wanted: Vec<u64> },
    #[error("tensor `{name}`{origin} has type {found}, wanted {wanted}")]
    Type { name: String, origin: String, found: DType, wanted: &'static str },
    #[error("`{path}` is quantised in the checkpoint (it has `{path}.scales`), but config.json gives no quantisation for it")]
    NoScheme { path: String },
    #[error("`{path}` is quantised in groups of {group_size}, which do not divide its {input_dims} inputs")]
    Groups { path: String, group_size: u32, input_dims: u64 },
    #[error(
        "{count} tensors of the checkpoint have no place in this model, the first is `{first}`: config.json and weights do not belong together"
    )]
    LeftOver { count: usize, first: String },
    #[error(transparent)]
    Published(#[from] PublishedError),
}

impl Parameter {
    pub fn new(name: String, tensor: SymbolicTensor) -> Self {
        let bytes = tensor.bytes();
        let SymbolicTensor { recipe, dtype, shape, transient_bytes } = tensor;
        Self { name, recipe, dtype, shape, bytes, transient_bytes }
    }

    /// The entries of these ranges of an axis, one range after the other; they may come in any order, and repeat. No more is read, or made,
    /// than these entries need, wherever that changes no bit: quantised rows are cut at groups, for one, and what is left over is cut off
    /// when it is made. An error for no entries, or entries that are not there.
    pub fn select(self, axis: usize, ranges: &[Range<u64>]) -> Result<Self, PublishedError> {
        let Self { name, recipe, dtype, shape, transient_bytes, .. } = self;
        Ok(Self::new(name, SymbolicTensor { recipe, dtype, shape, transient_bytes }.select(axis, ranges)?))
    }

    /// The tensors of the checkpoint that this is made of, one entry for each time that one is used.
    pub fn sources(&self) -> Vec<&str> {
        self.recipe.sources()
    }
}

impl WeightMap {
    /// Assigns every tensor of the index to a parameter of the spec.
    pub fn assign(spec: &ModelSpec, index: &WeightIndex) -> Result<WeightMap, WeightError> {
        let mut assignment = Assignment::new(spec, index)?;
        let map = assignment.parts(&spec.parts())?;
        assignment.check_left_over()?;
        Ok(map)
    }

    /// Only these parts, from an index that need not hold the others: for a node that has just its own files.
    pub fn assign_parts(spec: &ModelSpec, index: &WeightIndex, parts: &[Part]) -> Result<WeightMap, WeightError> {
        Assignment::new(spec, index)?.parts(parts)
    }

    pub fn part_bytes(&self, part: Part) -> u64 {
        self.parts.get(&part).map_or(0, |parameters| parameters.iter().map(|parameter| parameter.bytes).sum())
    }

    /// Bytes of these parts together.
    pub fn bytes(&self, parts: &[Part]) -> u64 {
        parts.iter().map(|part| self.part_bytes(*part)).sum()
    }

    /// The files that hold what these parts are made of.
    pub fn files(&self, parts: &[Part], index: &WeightIndex) -> BTreeSet<String> {
        let sources = parts.iter().filter_map(|part| self.parts.get(part)).flatten().flat_map(Parameter::sources);
        sources.filter_map(|name| index.tensors.get(name)).map(|entry| entry.file.clone()).collect()
    }
}

impl WeightIndex {
    /// A number that two nodes agree on exactly when they see the same tensors: FNV-1a over names, types and shapes.
    pub fn fingerprint(&self, config: &[u8]) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |bytes: &[u8]| {
            for byte in bytes.iter().chain([&0xff]) {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        add(config);
        for (name, entry) in &self.tensors {
            add(name.as_bytes());
            add(entry.dtype.name().as_bytes());
            entry.shape.iter().for_each(|dim| add(&dim.to_le_bytes()));
        }
        hash
    }
}

#[cfg(test)]
mod tests;

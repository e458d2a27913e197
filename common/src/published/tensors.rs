//! The tensors of a checkpoint by name, and the verbs that bring them to canonical names one rule at a time.

use super::{PublishedError, symbolic::SymbolicTensor};
use crate::weights::WeightIndex;
use std::collections::{BTreeMap, BTreeSet};

/// What the tensors of a linear, or of a stack of linears, are called after its path.
pub(super) const LINEAR_SUFFIXES: [&str; 4] = ["weight", "scales", "biases", "bias"];

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tensors {
    tensors: BTreeMap<String, SymbolicTensor>,
    /// Names of tensors that other files of the model hold.
    elsewhere: BTreeSet<String>,
    /// Tensors of the checkpoint that the computation has no use for.
    dropped: BTreeSet<String>,
    /// What could not be made, and a tensor that it lacks.
    incomplete: BTreeMap<String, String>,
}

impl Tensors {
    pub fn new(index: &WeightIndex) -> Self {
        let tensor = |(name, entry): (&String, &crate::weights::TensorEntry)| {
            (name.clone(), SymbolicTensor::of_checkpoint(name, entry.dtype, entry.shape.clone()))
        };
        Self { tensors: index.tensors.iter().map(tensor).collect(), elsewhere: index.elsewhere.clone(), ..Self::default() }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn get(&self, name: &str) -> Option<&SymbolicTensor> {
        self.tensors.get(name)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether any name of the model is like this, also in files that are not here: for rules that hang on how all of it was published.
    pub fn model_has(&self, like: impl Fn(&str) -> bool) -> bool {
        self.names().chain(self.elsewhere.iter().map(String::as_str)).any(like)
    }

    pub fn take(&mut self, name: &str) -> Option<SymbolicTensor> {
        self.tensors.remove(name)
    }

    /// An error when the name is taken.
    pub fn put(&mut self, name: impl Into<String>, tensor: SymbolicTensor) -> Result<(), PublishedError> {
        let name = name.into();
        match self.tensors.get(&name) {
            None => {
                self.tensors.insert(name, tensor);
                Ok(())
            }
            Some(there) => Err(PublishedError::Twice { name, first: there.first_source(), second: tensor.first_source() }),
        }
    }

    /// Replaces the tensors with names like this by what becomes of them.
    pub fn change(
        &mut self,
        like: impl Fn(&str) -> bool,
        change: impl Fn(SymbolicTensor) -> Result<SymbolicTensor, PublishedError>,
    ) -> Result<(), PublishedError> {
        for (name, tensor) in &mut self.tensors {
            if like(name) {
                *tensor = change(tensor.clone())?;
            }
        }
        Ok(())
    }

    /// Leaves out tensors that the computation has no use for, and remembers that this is meant.
    pub fn drop_where(&mut self, like: impl Fn(&str) -> bool) {
        let dropped = self.tensors.extract_if(.., |name, _| like(name));
        self.dropped.extend(dropped.flat_map(|(_, tensor)| tensor.recipe.sources().into_iter().map(str::to_owned).collect::<Vec<_>>()));
    }

    pub fn drop_prefix(&mut self, prefix: &str) {
        self.drop_where(|name| name.starts_with(prefix));
    }

    pub fn drop_suffix(&mut self, suffix: &str) {
        self.drop_where(|name| name.ends_with(suffix));
    }

    pub fn drop_containing(&mut self, part: &str) {
        self.drop_where(|name| name.contains(part));
    }

    /// Leaves out layers after the last one of the decoder: those that only predict further tokens.
    pub fn drop_layers_from(&mut self, n_layers: u32) {
        self.drop_where(|name| layer_of(name).is_some_and(|layer| layer >= n_layers));
    }

    /// Gives the tensor the name `to`, when there is one called `from`.
    pub fn rename(&mut self, from: &str, to: &str) -> Result<(), PublishedError> {
        self.rename_each(|name| (name == from).then(|| to.to_owned()))
    }

    pub fn rename_prefix(&mut self, from: &str, to: &str) -> Result<(), PublishedError> {
        self.rename_each(|name| {
            if name.starts_with(to) && to.starts_with(from) { None } else { Some(format!("{to}{}", name.strip_prefix(from)?)) }
        })
    }

    pub fn rename_suffix(&mut self, from: &str, to: &str) -> Result<(), PublishedError> {
        self.rename_each(
            |name| if name.ends_with(to) && to.ends_with(from) { None } else { Some(format!("{}{to}", name.strip_suffix(from)?)) },
        )
    }

    /// Replaces a part of names; a name that has `to` already is left alone.
    pub fn replace_in_names(&mut self, from: &str, to: &str) -> Result<(), PublishedError> {
        self.rename_each(|name| (name.contains(from) && !name.contains(to)).then(|| name.replace(from, to)))
    }

    /// Gives every tensor the name that `rename` says, if it says one.
    pub fn rename_each(&mut self, rename: impl Fn(&str) -> Option<String>) -> Result<(), PublishedError> {
        let renamed: Vec<_> = self.names().filter_map(|name| Some((name.to_owned(), rename(name)?))).collect();
        let taken: Vec<_> = renamed.into_iter().filter_map(|(from, to)| Some((to, self.take(&from)?))).collect();
        taken.into_iter().try_for_each(|(to, tensor)| self.put(to, tensor))
    }

    /// Remembers that `name` could not be made for want of a tensor.
    pub(super) fn lacks(&mut self, name: String, lacking: String) {
        self.incomplete.insert(name, lacking);
    }

    /// The tensor for want of which `name` could not be made.
    pub(crate) fn lacking(&self, name: &str) -> Option<&str> {
        self.incomplete.get(name).map(String::as_str)
    }

    pub(crate) fn is_dropped(&self, source: &str) -> bool {
        self.dropped.contains(source)
    }
}

/// The number after the first `layers.` of a name.
pub fn layer_of(name: &str) -> Option<u32> {
    let (before, rest) = name.split_once("layers.")?;
    if !before.is_empty() && !before.ends_with('.') {
        return None;
    }
    rest.split('.').next()?.parse().ok()
}

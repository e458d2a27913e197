//! Loads exactly the tensors of a shard, each once, and hands them to the blocks by name.

mod copies;
mod files;
mod make;
mod patch;

pub(crate) use files::Files;
pub(crate) use make::{made, sliced};
pub(crate) use patch::write_box;

use crate::{
    adapter::Adaption,
    error::LmError,
    ffi,
    group::{Group, Vocabulary},
};
use mlx_cluster_common::{
    spec::Part,
    tensor::{Cut, Split, WideNorm},
    weights::{WeightIndex, WeightMap},
};
use mlx_rs::{Array, memory};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    rc::Rc,
};

/// The parameters of a shard by name, taken out one by one.
#[derive(Debug, Default)]
pub struct Weights {
    arrays: BTreeMap<String, Array>,
    bytes_read: u64,
    rank: Option<Rc<RankOf>>,
    adaption: Option<Adaption>,
}

/// What makes a rank's model differ from a smaller one.
#[derive(Debug)]
struct RankOf {
    split: Split,
    group: Group,
}

impl Weights {
    /// Reads these parts: of each tensor the entries that the parameters are made of. The files' headers were checked when `index` was made;
    /// a file whose length is another since is refused.
    /// `progress` is told the bytes that are in memory, after each parameter.
    ///
    /// At most, memory holds the parameters made so far, what the next one is made of (`Parameter::transient_bytes`), and a few MiB.
    pub fn load(
        folder: &Path,
        index: &WeightIndex,
        map: &WeightMap,
        parts: &[Part],
        mut progress: impl FnMut(u64),
    ) -> Result<Self, LmError> {
        let parts: BTreeSet<_> = parts.iter().collect();
        let parameters: Vec<_> = parts.iter().filter_map(|part| map.parts.get(part)).flatten().collect();
        let mut files = Files::new(folder, index);
        let mut arrays = BTreeMap::new();
        let mut done = 0;
        for parameter in parameters {
            let array = made(&parameter.recipe, &mut files)?;
            let same_shape = array.shape().iter().map(|dim| *dim as u64).eq(parameter.shape.iter().copied());
            if !same_shape || ffi::from_mlx(array.dtype()) != Some(parameter.dtype) {
                return Err(LmError::Made {
                    name: parameter.name.clone(),
                    found: format!("{:?} {:?}", array.dtype(), array.shape()),
                    planned: format!("{} {:?}", parameter.dtype, parameter.shape),
                });
            }
            done += parameter.bytes;
            progress(done);
            arrays.insert(parameter.name.clone(), array);
            if parameter.transient_bytes > 0 {
                // Buffers that held what the parameter was made of.
                memory::clear_cache()?;
            }
        }
        Ok(Self { arrays, bytes_read: files.bytes_read(), ..Self::default() })
    }

    /// For tests and tools that make their own arrays.
    pub fn from_arrays(arrays: impl IntoIterator<Item = (String, Array)>) -> Self {
        Self { arrays: arrays.into_iter().collect(), ..Self::default() }
    }

    /// Bytes that were read from files: those that parameters are made of, and short gaps between them.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Says that these are a rank's, whose blocks add up what they make over its group.
    pub fn of_rank(self, split: Split, group: Group) -> Self {
        Self { rank: Some(Rc::new(RankOf { split, group })), ..self }
    }

    /// Says how the adapters among these are used; without it they are left over.
    pub fn adapted(self, adaption: Adaption) -> Self {
        Self { adaption: Some(adaption), ..self }
    }

    /// These arrays in place of those that are here, and besides; the rest is shared.
    pub fn with(&self, arrays: impl IntoIterator<Item = (String, Array)>) -> Self {
        let mut all = self.arrays.clone();
        all.extend(arrays);
        Self { arrays: all, bytes_read: self.bytes_read, rank: self.rank.clone(), adaption: self.adaption.clone() }
    }

    /// Those of these names that are here; the arrays are shared.
    pub(crate) fn only<'a>(&self, names: impl Iterator<Item = &'a str>) -> Self {
        let arrays = names.filter_map(|name| Some((name.to_owned(), self.arrays.get(name)?.clone()))).collect();
        Self { arrays, bytes_read: self.bytes_read, rank: self.rank.clone(), adaption: self.adaption.clone() }
    }

    pub(crate) fn adaption(&self) -> Option<&Adaption> {
        self.adaption.as_ref()
    }

    /// What of the weight at a path is here, when others are on other ranks.
    pub(crate) fn cut(&self, path: &str) -> Option<Cut> {
        self.rank.as_ref()?.split.cuts.get(path).cloned()
    }

    /// By name, without taking it.
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.arrays.get(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.arrays.keys().map(String::as_str)
    }

    /// None when the stage has one rank.
    pub fn group(&self) -> Option<Group> {
        self.rank.as_ref().map(|rank| rank.group.clone())
    }

    /// Over what the outputs of a linear or of experts are to be added up.
    pub fn sum_over(&self, path: &str) -> Option<Group> {
        self.rank.as_ref().filter(|rank| rank.split.sums.contains(path)).map(|rank| rank.group.clone())
    }

    /// Where the rows of a table or head are, when they are on several ranks.
    pub fn vocabulary(&self, path: &str) -> Option<Vocabulary> {
        let rank = self.rank.as_ref()?;
        Some(Vocabulary::new(rank.group.clone(), rank.split.vocabularies.get(path)?))
    }

    /// A norm that goes over several ranks.
    pub fn wide_norm(&self, path: &str) -> Option<(WideNorm, Group)> {
        let rank = self.rank.as_ref()?;
        Some((rank.split.wide_norms.get(path)?.clone(), rank.group.clone()))
    }

    /// The members of a stack that are here, when others are on other ranks.
    pub fn members(&self, path: &str) -> Option<Range<u32>> {
        match self.rank.as_ref()?.split.cuts.get(path)? {
            Cut::Member(range) => Some(range.clone()),
            Cut::Output(_) | Cut::Input(_) => None,
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.arrays.contains_key(name)
    }

    pub fn take(&mut self, name: &str) -> Result<Array, LmError> {
        self.arrays.remove(name).ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })
    }

    /// Says that no more will be taken; what is left over was loaded for nothing.
    pub fn finish(self) -> Result<(), LmError> {
        match self.arrays.keys().next() {
            None => Ok(()),
            Some(first) => Err(LmError::NotUsed { count: self.arrays.len(), first: first.clone() }),
        }
    }
}

#[cfg(test)]
mod tests;

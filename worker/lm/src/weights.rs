//! Loads exactly the tensors of a shard, each once, and hands them to the blocks by name.

use crate::{error::LmError, ffi};
use mlx_cluster_common::{
    spec::Part,
    weights::{Parameter, WeightIndex, WeightMap},
};
use mlx_rs::{Array, ops, transforms};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

/// The parameters of a shard by name, taken out one by one.
#[derive(Debug, Default)]
pub struct Weights {
    arrays: BTreeMap<String, Array>,
}

impl Weights {
    /// Reads these parts. The files' headers were checked when `index` was made; what is loaded is compared with it.
    /// `progress` is told the bytes that are in memory, after each parameter.
    pub fn load(
        folder: &Path,
        index: &WeightIndex,
        map: &WeightMap,
        parts: &[Part],
        mut progress: impl FnMut(u64),
    ) -> Result<Self, LmError> {
        let mut files = LazyFiles { folder, open: HashMap::new() };
        let mut arrays = BTreeMap::new();
        let mut done = 0;
        let parts: BTreeSet<_> = parts.iter().collect();
        for parameter in parts.iter().filter_map(|part| map.parts.get(part)).flatten() {
            let sources = parameter.sources.iter().map(|name| files.take(name, index)).collect::<Result<Vec<_>, _>>()?;
            let array = assemble(parameter, sources)?;
            done += parameter.bytes;
            progress(done);
            arrays.insert(parameter.name.clone(), array);
        }
        Ok(Self { arrays })
    }

    /// For tests and tools that make their own arrays.
    pub fn from_arrays(arrays: impl IntoIterator<Item = (String, Array)>) -> Self {
        Self { arrays: arrays.into_iter().collect() }
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

/// Evaluates, so that the bytes are read now, and stacks experts that are published one by one.
fn assemble(parameter: &Parameter, mut sources: Vec<Array>) -> Result<Array, LmError> {
    let array = match parameter.stacked {
        true => ops::stack(&sources, 0)?,
        false => sources.swap_remove(0),
    };
    transforms::eval([&array])?;
    Ok(array)
}

/// Files of a folder, opened when first needed. MLX reads a tensor only when it is evaluated, so what is not taken costs nothing.
struct LazyFiles<'a> {
    folder: &'a Path,
    open: HashMap<String, HashMap<String, Array>>,
}

impl LazyFiles<'_> {
    fn take(&mut self, name: &str, index: &WeightIndex) -> Result<Array, LmError> {
        let entry = index.tensors.get(name).ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })?;
        if !self.open.contains_key(&entry.file) {
            let read = |cause: String| LmError::Read { file: entry.file.clone(), cause };
            let arrays = Array::load_safetensors(self.folder.join(&entry.file)).map_err(|error| read(error.to_string()))?;
            self.open.insert(entry.file.clone(), arrays);
        }
        let array = self.open.get_mut(&entry.file).and_then(|arrays| arrays.remove(name));
        let array = array.ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })?;
        let same_shape = array.shape().iter().map(|dim| *dim as u64).eq(entry.shape.iter().copied());
        if !same_shape || ffi::from_mlx(array.dtype()) != Some(entry.dtype) {
            return Err(LmError::Changed {
                name: name.to_owned(),
                file: entry.file.clone(),
                found: format!("{:?} {:?}", array.dtype(), array.shape()),
                wanted: format!("{} {:?}", entry.dtype, entry.shape),
            });
        }
        Ok(array)
    }
}

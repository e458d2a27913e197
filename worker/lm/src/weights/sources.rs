//! Tensors of the checkpoint, read when first used and let go when last used.

use crate::{error::LmError, ffi};
use mlx_cluster_common::weights::{Parameter, WeightIndex};
use mlx_rs::Array;
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// Hands out tensors by name, each as often as the parameters use it. MLX reads a tensor only when it is evaluated, so what is not taken
/// costs nothing; what several parameters use is read once and held until the last of them has it.
pub(super) struct Sources<'a> {
    files: LazyFiles<'a>,
    uses_left: BTreeMap<&'a str, usize>,
    held: BTreeMap<&'a str, Array>,
}

impl<'a> Sources<'a> {
    pub(super) fn new(folder: &'a Path, index: &'a WeightIndex, parameters: &[&'a Parameter]) -> Self {
        let mut uses_left = BTreeMap::new();
        for name in parameters.iter().flat_map(|parameter| parameter.sources()) {
            *uses_left.entry(name).or_default() += 1;
        }
        Self { files: LazyFiles { folder, index, open: HashMap::new() }, uses_left, held: BTreeMap::new() }
    }

    pub(super) fn take(&mut self, name: &'a str) -> Result<Array, LmError> {
        let uses = self.uses_left.get_mut(name).ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })?;
        *uses -= 1;
        let array = match self.held.remove(name) {
            Some(array) => array,
            None => self.files.take(name)?,
        };
        match uses {
            0 => drop(self.uses_left.remove(name)),
            _ => drop(self.held.insert(name, array.clone())),
        }
        Ok(array)
    }
}

/// Files of a folder, opened when first needed.
struct LazyFiles<'a> {
    folder: &'a Path,
    index: &'a WeightIndex,
    open: HashMap<String, HashMap<String, Array>>,
}

impl LazyFiles<'_> {
    fn take(&mut self, name: &str) -> Result<Array, LmError> {
        let entry = self.index.tensors.get(name).ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })?;
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

//! Adapters at serving time: LoRA and DoRA beside the matrices of a shard, any number of them loaded, each row of a step with its own.
//!
//! The forms and the order of operations are those of [`crate::adapter`], where one adapter is trained. Here factors of all adapters are
//! stacked, and what does not depend on the input (DoRA's norms) is reckoned once. A row without an adapter has the same bits as in a shard
//! without any, and steps without such rows do not see the adapters at all.

mod factors;
pub(crate) mod rows;
mod stacks;

pub(crate) use stacks::Stacks;

use crate::{error::LmError, group::Group, linear::Matrix, stack::Stack, weights::Weights};
use factors::Factors;
use mlx_cluster_common::{
    ids::{AdapterId, SequenceId},
    step::Step,
    tensor::Cut,
};
use mlx_rs::{Array, transforms};
use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

/// What a shard is given of an adapter: the factors of its own matrices, whole, by mlx-lm's names (`PATH.lora_a`, `PATH.lora_b`, `PATH.m`).
#[derive(Debug)]
pub struct AdapterWeights {
    pub scale: f32,
    pub tensors: BTreeMap<String, Array>,
}

/// A matrix that adapters can sit on.
pub struct Adaptable<'a> {
    pub(crate) matrix: &'a Matrix,
    pub(crate) kind: Kind,
    pub(crate) site: &'a Site,
    pub(crate) stacks: &'a mut Option<Box<Stacks>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Linear,
    Experts,
    Table,
}

/// Where a matrix stands in the model, and what of it is on this rank.
#[derive(Debug, Clone)]
pub(crate) struct Site(Rc<Place>);

#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) cut: Option<Cut>,
    /// The other ranks, when each has a part of the inputs or of the rows.
    pub(crate) group: Option<Group>,
}

impl Site {
    pub(crate) fn of(weights: &Weights, path: &str) -> Self {
        let (cut, is_table) = (weights.cut(path), weights.vocabulary(path).is_some());
        let group = weights.group().filter(|_| is_table || matches!(cut, Some(Cut::Input(_))));
        Self(Rc::new(Place { path: path.to_owned(), cut, group }))
    }
}

impl std::ops::Deref for Site {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.0
    }
}

/// The adapters of a shard, and which sequence has which.
#[derive(Debug, Default)]
pub(crate) struct Adapters {
    /// Slot by slot, from 1 on.
    loaded: Vec<Loaded>,
    of_sequence: BTreeMap<SequenceId, AdapterId>,
    /// To be dropped when their last sequence is released.
    leaving: BTreeSet<AdapterId>,
}

#[derive(Debug)]
struct Loaded {
    id: AdapterId,
    scale: f32,
    /// By path.
    factors: BTreeMap<String, Factors>,
}

impl Adapters {
    pub(crate) fn is_empty(&self) -> bool {
        self.loaded.is_empty()
    }

    pub(crate) fn has(&self, id: AdapterId) -> bool {
        self.slot(id).is_some()
    }

    /// Puts an adapter beside the matrices of the stack; its bytes.
    pub(crate) fn load(&mut self, id: AdapterId, weights: AdapterWeights, stack: &mut Stack) -> Result<u64, LmError> {
        if self.slot(id).is_some() {
            return Err(LmError::AdapterTwice { adapter: id });
        }
        let AdapterWeights { scale, mut tensors } = weights;
        let mut found: Result<BTreeMap<String, Factors>, LmError> = Ok(BTreeMap::new());
        stack.each_matrix(&mut |matrix| {
            let Ok(factors) = &mut found else { return };
            if factors.contains_key(&matrix.site.path) {
                return;
            }
            match Factors::take(&mut tensors, scale, &matrix) {
                Ok(own) => factors.extend(own.map(|own| (matrix.site.path.clone(), own))),
                Err(error) => found = Err(error),
            }
        });
        let factors = found?;
        if let Some(first) = tensors.keys().next() {
            return Err(LmError::NotUsed { count: tensors.len(), first: first.clone() });
        }
        self.loaded.push(Loaded { id, scale, factors });
        self.attach(stack)?;
        Ok(self.loaded.last().map_or(0, Loaded::bytes))
    }

    /// Takes an adapter away, now or when the last sequence that has it is released. True when something changed.
    pub(crate) fn drop(&mut self, id: AdapterId, stack: &mut Stack) -> Result<bool, LmError> {
        if self.of_sequence.values().any(|other| *other == id) {
            self.leaving.insert(id);
            return Ok(false);
        }
        self.leaving.remove(&id);
        let before = self.loaded.len();
        self.loaded.retain(|loaded| loaded.id != id);
        let changed = self.loaded.len() < before;
        if changed {
            self.attach(stack)?;
        }
        Ok(changed)
    }

    pub(crate) fn clear(&mut self, stack: &mut Stack) {
        *self = Self::default();
        stack.each_matrix(&mut |matrix| *matrix.stacks = None);
    }

    pub(crate) fn admit(&mut self, sequence: SequenceId, adapter: Option<AdapterId>) -> Result<(), LmError> {
        let Some(adapter) = adapter else { return Ok(()) };
        if self.slot(adapter).is_none() {
            return Err(LmError::UnknownAdapter { adapter });
        }
        self.of_sequence.insert(sequence, adapter);
        Ok(())
    }

    /// True when an adapter went with the sequence.
    pub(crate) fn release(&mut self, sequence: SequenceId, stack: &mut Stack) -> Result<bool, LmError> {
        match self.of_sequence.remove(&sequence) {
            Some(adapter) if self.leaving.contains(&adapter) => self.drop(adapter, stack),
            _ => Ok(false),
        }
    }

    /// The slot of each segment of a step; None when no segment has an adapter.
    pub(crate) fn slots(&self, step: &Step) -> Option<Vec<u32>> {
        let slot = |sequence| self.of_sequence.get(sequence).and_then(|adapter| self.slot(*adapter)).unwrap_or(0);
        let slots: Vec<u32> = step.segments.iter().map(|segment| slot(&segment.sequence)).collect();
        slots.iter().any(|slot| *slot > 0).then_some(slots)
    }

    /// Reckons what all ranks have to reckon together for adapters of these slots. All ranks come here at the same step, the first one that
    /// uses an adapter: so loading needs no order among ranks. True when something changed.
    pub(crate) fn settle(&mut self, slots: &[u32], stack: &mut Stack) -> Result<bool, LmError> {
        let mut changed = false;
        // By id: a slot can be another one on another rank.
        let mut used: Vec<&mut Loaded> =
            (1..).zip(&mut self.loaded).filter(|(slot, _)| slots.contains(slot)).map(|(_, loaded)| loaded).collect();
        used.sort_by_key(|loaded| loaded.id);
        for loaded in used {
            for factors in loaded.factors.values_mut() {
                changed |= factors.settle()?;
            }
        }
        if changed {
            self.attach(stack)?;
        }
        Ok(changed)
    }

    fn slot(&self, id: AdapterId) -> Option<u32> {
        (1..).zip(&self.loaded).find(|(_, loaded)| loaded.id == id).map(|(slot, _)| slot)
    }

    /// Gives every matrix the stacks of all that is loaded.
    fn attach(&mut self, stack: &mut Stack) -> Result<(), LmError> {
        let paths: BTreeSet<String> = self.loaded.iter().flat_map(|loaded| loaded.factors.keys().cloned()).collect();
        let scales: Vec<f32> = self.loaded.iter().map(|loaded| loaded.scale).collect();
        let mut stacks = BTreeMap::new();
        for path in paths {
            let mut entries: Vec<_> = self.loaded.iter_mut().map(|loaded| loaded.factors.get_mut(&path)).collect();
            let made = Factors::stacked(&mut entries, &scales)?;
            stacks.insert(path, made);
        }
        stack.each_matrix(&mut |matrix| *matrix.stacks = stacks.get(&matrix.site.path).cloned().map(Box::new));
        Ok(())
    }
}

impl Loaded {
    fn bytes(&self) -> u64 {
        self.factors.values().map(Factors::bytes).sum()
    }
}

/// Waits until these are there.
fn evaluated(arrays: &[&Array]) -> Result<(), LmError> {
    Ok(transforms::eval(arrays.iter().copied())?)
}

#[cfg(test)]
mod tests;

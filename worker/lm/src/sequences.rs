//! The caches of a shard's sequences, and which layer uses which of them.

use crate::{
    blocks::{empty_cache, own_rows},
    cache::Cache,
    error::LmError,
    packing::Packing,
};
use mlx_cluster_common::{cache::CacheOptions, ids::SequenceId, spec::ModelSpec, step::Step};
use mlx_rs::Array;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// Where each layer of a stage finds its cache.
#[derive(Debug, Clone)]
pub(crate) struct CacheSlots {
    /// By layer of the stage; None for layers that have no cache.
    of_layer: Vec<Option<usize>>,
    /// Caches of layers of earlier stages that this one reads too, and keeps a copy of.
    copies: Vec<(u32, usize)>,
    /// Empty caches, as every sequence begins.
    empty: Vec<Cache>,
}

impl CacheSlots {
    pub(crate) fn new(spec: &ModelSpec, layers: Range<u32>, options: &CacheOptions) -> Result<Self, LmError> {
        let mut slots = Self { of_layer: Vec::new(), copies: Vec::new(), empty: Vec::new() };
        let sources: BTreeSet<u32> = spec.layers_of(layers.clone()).iter().filter_map(|layer| layer.mixer.source_layer()).collect();
        for source in sources.into_iter().filter(|source| *source < layers.start) {
            let mixer = spec.layers.get(source as usize).and_then(|layer| empty_cache(&layer.mixer, options));
            slots.copies.push((source, slots.empty.len()));
            slots.empty.push(mixer.ok_or_else(|| LmError::Mlx(format!("layer {source} has no cache that others could read")))?);
        }
        for layer in spec.layers_of(layers.clone()) {
            let slot = match (layer.mixer.source_layer(), empty_cache(&layer.mixer, options)) {
                (Some(source), _) => Some(slots.find(source, layers.start)?),
                (None, Some(cache)) => {
                    slots.empty.push(cache);
                    Some(slots.empty.len() - 1)
                }
                (None, None) => None,
            };
            slots.of_layer.push(slot);
        }
        Ok(slots)
    }

    fn find(&self, source: u32, first_layer: u32) -> Result<usize, LmError> {
        let own = source.checked_sub(first_layer).and_then(|i| self.of_layer.get(i as usize).copied().flatten());
        let copy = || self.copies.iter().find(|(layer, _)| *layer == source).map(|(_, slot)| *slot);
        own.or_else(copy).ok_or_else(|| LmError::Mlx(format!("the cache of layer {source} is not in this shard")))
    }

    /// Layers of earlier stages whose keys and values must come with every step.
    pub(crate) fn copied_layers(&self) -> impl Iterator<Item = u32> {
        self.copies.iter().map(|(layer, _)| *layer)
    }
}

/// A sequence as one stage remembers it.
#[derive(Debug, Clone)]
struct Sequence {
    /// Tokens so far.
    length: u32,
    caches: Vec<Cache>,
}

/// All sequences of a stage.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    all: BTreeMap<SequenceId, Sequence>,
}

impl Sequences {
    pub(crate) fn admit(&mut self, sequence: SequenceId, slots: &CacheSlots) {
        self.all.insert(sequence, Sequence { length: 0, caches: slots.empty.clone() });
    }

    pub(crate) fn release(&mut self, sequence: SequenceId) {
        self.all.remove(&sequence);
    }

    pub(crate) fn clear(&mut self) {
        self.all.clear();
    }

    /// Takes out the sequences of a step while it runs.
    pub(crate) fn check_out(&mut self, step: &Step) -> Result<StepCaches, LmError> {
        let mut taken = Vec::with_capacity(step.segments.len());
        for segment in &step.segments {
            let mut sequence = self.all.remove(&segment.sequence).ok_or(LmError::UnknownSequence { sequence: segment.sequence })?;
            if sequence.length != segment.start {
                return Err(LmError::OutOfStep { sequence: segment.sequence, start: segment.start, held: sequence.length });
            }
            sequence.length += segment.tokens.len() as u32;
            taken.push((segment.sequence, sequence));
        }
        Ok(StepCaches { taken })
    }

    /// Puts them back; gives their arrays when somebody has to see to it that they are evaluated.
    pub(crate) fn check_in(&mut self, caches: StepCaches, collect: bool) -> Vec<Array> {
        let mut arrays = Vec::new();
        for (id, sequence) in caches.taken {
            if collect {
                arrays.extend(sequence.caches.iter().flat_map(Cache::arrays).cloned());
            }
            self.all.insert(id, sequence);
        }
        arrays
    }
}

/// The caches of a step's sequences, in the order of its segments.
pub(crate) struct StepCaches {
    taken: Vec<(SequenceId, Sequence)>,
}

impl StepCaches {
    /// Those of sequences that begin and end with the step.
    pub(crate) fn fresh(sequences: impl Iterator<Item = SequenceId>, slots: &CacheSlots) -> Self {
        let caches: Vec<Cache> = slots.empty.iter().cloned().map(Cache::exact).collect();
        Self { taken: sequences.map(|id| (id, Sequence { length: 0, caches: caches.clone() })).collect() }
    }

    /// Those of one layer (counted from the stage's first); none when it has no cache.
    pub(crate) fn of_layer(&mut self, slots: &CacheSlots, layer: usize) -> Vec<&mut Cache> {
        match slots.of_layer.get(layer).copied().flatten() {
            Some(slot) => self.taken.iter_mut().filter_map(|(_, sequence)| sequence.caches.get_mut(slot)).collect(),
            None => Vec::new(),
        }
    }

    /// Appends what an earlier stage's layer put into its cache: `[B, kv_heads, L, head_dim]` each.
    pub(crate) fn append_copy(
        &mut self,
        slots: &CacheSlots,
        source: u32,
        keys: &Array,
        values: &Array,
        packing: &Packing,
    ) -> Result<(), LmError> {
        let Some((_, slot)) = slots.copies.iter().find(|(layer, _)| *layer == source) else {
            return Ok(());
        };
        let single = packing.spans.len() == 1;
        for ((_, sequence), span) in self.taken.iter_mut().zip(&packing.spans) {
            let own = |y: &Array| if single { Ok(y.clone()) } else { own_rows(y, span) };
            match sequence.caches.get_mut(*slot) {
                Some(Cache::Attention(cache)) => cache.extend(&[&own(keys)?, &own(values)?])?,
                _ => return Err(LmError::Mlx(format!("layer {source} has no keys and values that others could read"))),
            }
        }
        Ok(())
    }
}

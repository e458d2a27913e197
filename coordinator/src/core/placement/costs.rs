//! Bytes that a stage takes: weights, caches, and what it works in.

use mlx_cluster_common::{
    cache::CacheOptions,
    dtype::DType,
    spec::{ExpertInputs, LayerSpec, ModelSpec, Part, Weight},
    weights::WeightMap,
};
use std::{collections::BTreeSet, ops::Range};

/// Tokens of the largest step that the working memory is reckoned for.
const CHUNK_TOKENS: u64 = 512;
/// What an engine takes before it holds any weight: the process, MLX, compiled kernels, transport buffers.
pub(super) const ENGINE_BYTES: u64 = 100_000_000;
/// Activations are reckoned in f32, the widest that a model has.
const ACTIVATION_BYTES: u64 = 4;
/// Sequences at once whose states of fixed size are reckoned for; of models with states the engines take no more.
pub(super) const SEQUENCES: u32 = 16;

/// What one part of a model takes of a machine, from which its time follows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Work {
    /// Weight bytes that are read for every step, however many tokens it has.
    pub(super) bytes: f64,
    /// Bytes of all experts that are here.
    pub(super) expert_bytes: f64,
    /// Of the experts, those that one token goes to; from 0 to 1.
    pub(super) chosen: f64,
    /// Floating-point operations for each token, a product and a sum counted as two.
    pub(super) operations: f64,
    /// Bytes in caches that are read for each token of the sequence so far.
    pub(super) cache_bytes: f64,
    /// Kernels that are started for every step: one for each group of parameters.
    pub(super) kernels: f64,
}

/// Sums from which every stage's needs follow. Layer sums are cumulative: entry `i` is for the layers before `i`.
pub(super) struct Costs {
    layer_weights: Vec<u64>,
    layer_cache: Vec<u64>,
    /// For each layer the one whose cache it reads; a stage keeps a copy of those of earlier stages.
    cache_sources: Vec<Option<u32>>,
    shares_caches: bool,
    /// What a sequence takes however long it is.
    layer_state: Vec<u64>,
    /// Weight bytes that are read to decode one token: of the experts, only those chosen.
    layer_read: Vec<u64>,
    /// What computing takes, by layer.
    layer_work: Vec<Work>,
    /// Of the final norm and the head.
    head_work: Work,
    n_layers: u32,
    tied: bool,
    embedding: u64,
    /// What the first stage holds besides.
    layer_inputs: u64,
    norm_and_head: u64,
    head_read: u64,
    working: u64,
    logits: u64,
}

impl Costs {
    pub(super) fn new(spec: &ModelSpec, map: &WeightMap, caches: &CacheOptions) -> Self {
        let dtype = activation_dtype(map);
        let (mut layer_weights, mut layer_cache, mut layer_state, mut layer_read) = (vec![0], vec![0], vec![0], vec![0]);
        let (mut weights, mut cache, mut state, mut read) = (0u64, 0u64, 0u64, 0u64);
        for (i, layer) in (0u32..).zip(&spec.layers) {
            weights += map.part_bytes(Part::Layer(i));
            cache += caches.bytes_per_token(spec, i..i + 1, dtype);
            state += spec.state_bytes(i..i + 1);
            read += read_bytes(layer, map, i);
            layer_weights.push(weights);
            layer_cache.push(cache);
            layer_state.push(state);
            layer_read.push(read);
        }
        let tied = spec.head.may_be_tied();
        let embedding = map.part_bytes(Part::Embedding);
        let head = map.part_bytes(Part::Head);
        let activations = (0..spec.n_layers()).map(|layer| activation_elements(spec, layer)).max().unwrap_or(0);
        let layer_inputs = spec.layer_inputs.as_ref().map_or(0, |inputs| u64::from(inputs.dims) * u64::from(spec.n_layers()));
        let activations = activations + 6 * u64::from(spec.hidden_size) * u64::from(spec.n_streams()) + 2 * layer_inputs;
        Self {
            layer_weights,
            layer_cache,
            shares_caches: spec.layers.iter().any(|layer| layer.mixer.source_layer().is_some()),
            cache_sources: spec.layers.iter().map(|layer| layer.mixer.source_layer()).collect(),
            layer_state,
            layer_read,
            layer_work: (0..spec.n_layers()).map(|layer| layer_work(spec, map, caches, layer)).collect(),
            head_work: head_work(spec, map),
            n_layers: spec.n_layers(),
            tied,
            embedding,
            layer_inputs: map.part_bytes(Part::LayerInputs),
            norm_and_head: map.part_bytes(Part::FinalNorm) + head,
            head_read: if head == 0 { embedding } else { head },
            working: ENGINE_BYTES + load_peak(map).max(CHUNK_TOKENS * ACTIVATION_BYTES * activations),
            logits: CHUNK_TOKENS * ACTIVATION_BYTES * u64::from(spec.vocab_size),
        }
    }

    pub(super) fn weights(&self, layers: &Range<u32>) -> u64 {
        let (first, last) = (layers.start == 0, layers.end == self.n_layers);
        let embedding = if first || (last && self.tied) { self.embedding } else { 0 };
        let embedding = embedding + if first { self.layer_inputs } else { 0 };
        between(&self.layer_weights, layers) + embedding + if last { self.norm_and_head } else { 0 }
    }

    pub(super) fn cache_per_token(&self, layers: &Range<u32>) -> u64 {
        if !self.shares_caches {
            return between(&self.layer_cache, layers);
        }
        let readers = self.cache_sources.get(layers.start as usize..layers.end as usize).unwrap_or_default();
        let copied: BTreeSet<u32> = readers.iter().flatten().copied().filter(|source| *source < layers.start).collect();
        let copies: u64 = copied.into_iter().map(|source| between(&self.layer_cache, &(source..source + 1))).sum();
        between(&self.layer_cache, layers) + copies
    }

    /// Activations of a chunk of 512 tokens or, where more, what making a parameter needs while loading; and a fixed part.
    pub(super) fn working(&self, layers: &Range<u32>) -> u64 {
        self.working + if layers.end == self.n_layers { self.logits } else { 0 }
    }

    /// Caches for so many tokens, and the states of [`SEQUENCES`].
    pub(super) fn cache_and_states(&self, layers: &Range<u32>, cache_tokens: u64) -> u64 {
        let cache = self.cache_per_token(layers).saturating_mul(cache_tokens);
        cache.saturating_add(between(&self.layer_state, layers).saturating_mul(u64::from(SEQUENCES)))
    }

    pub(super) fn has_states(&self) -> bool {
        self.layer_state.last().is_some_and(|states| *states > 0)
    }

    pub(super) fn needed(&self, layers: &Range<u32>, cache_tokens: u64) -> u64 {
        self.weights(layers).saturating_add(self.cache_and_states(layers, cache_tokens)).saturating_add(self.working(layers))
    }

    pub(super) fn layer_work(&self) -> &[Work] {
        &self.layer_work
    }

    pub(super) fn head_work(&self) -> Work {
        self.head_work
    }

    /// Weight bytes that pass through the processor for each decoded token.
    pub(super) fn read(&self, layers: &Range<u32>) -> u64 {
        between(&self.layer_read, layers) + if layers.end == self.n_layers { self.head_read } else { 0 }
    }
}

/// What keys and values have before they are quantised.
pub(super) fn activation_dtype(map: &WeightMap) -> DType {
    map.activation_dtype.unwrap_or(DType::F16)
}

pub(super) fn between(sums: &[u64], layers: &Range<u32>) -> u64 {
    let sum = |i: u32| sums.get(i as usize).copied().unwrap_or(0);
    sum(layers.end).saturating_sub(sum(layers.start))
}

fn read_bytes(layer: &LayerSpec, map: &WeightMap, i: u32) -> u64 {
    let all = map.part_bytes(Part::Layer(i));
    let Some(moe) = layer.feed_forward.experts() else { return all };
    let experts = expert_bytes(layer, map, i);
    let n_experts = moe.n_experts().max(1);
    all - experts + experts / u64::from(n_experts) * u64::from(moe.router.top_k.min(n_experts))
}

fn expert_bytes(layer: &LayerSpec, map: &WeightMap, i: u32) -> u64 {
    let Some(moe) = layer.feed_forward.experts() else { return 0 };
    let inputs = match &moe.experts.inputs {
        ExpertInputs::Gated { gate, up } => vec![&gate.path, &up.path],
        ExpertInputs::Plain(up) => vec![&up.path],
    };
    let paths: Vec<&String> = inputs.into_iter().chain([&moe.experts.down.path]).collect();
    let is_expert = |name: &str| paths.iter().any(|path| name.strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with('.')));
    let parameters = map.parts.get(&Part::Layer(i)).into_iter().flatten();
    parameters.filter(|parameter| is_expert(&parameter.name)).map(|parameter| parameter.bytes).sum()
}

fn layer_work(spec: &ModelSpec, map: &WeightMap, caches: &CacheOptions, i: u32) -> Work {
    let Some(layer) = spec.layers.get(i as usize) else { return Work::default() };
    let experts = expert_bytes(layer, map, i);
    // Of all experts, also those on other ranks: the router is whole everywhere.
    let chosen =
        layer.feed_forward.experts().map_or(0.0, |moe| f64::from(moe.router.top_k) / f64::from(moe.router.linear.output_dims.max(1)));
    let weights = spec.weights(Part::Layer(i));
    let product = |a: u32, b: u32| 2.0 * f64::from(a) * f64::from(b);
    let operations = weights.iter().map(|weight| match weight {
        Weight::Linear(linear) => product(linear.input_dims, linear.output_dims),
        Weight::HeadLinear(linear) => f64::from(linear.n_heads) * product(linear.input_dims, linear.output_dims),
        Weight::Experts(experts) => chosen * f64::from(experts.n_experts) * product(experts.input_dims, experts.output_dims),
        _ => 0.0,
    });
    Work {
        bytes: (map.part_bytes(Part::Layer(i)) - experts) as f64,
        expert_bytes: experts as f64,
        chosen: chosen.min(1.0),
        operations: operations.sum(),
        cache_bytes: caches.bytes_per_token(spec, i..i + 1, activation_dtype(map)) as f64,
        kernels: weights.len() as f64,
    }
}

/// The rows that are here: a rank may have some of the vocabulary only.
fn head_work(spec: &ModelSpec, map: &WeightMap) -> Work {
    let part = if map.part_bytes(Part::Head) == 0 { Part::Embedding } else { Part::Head };
    let table = map.parts.get(&part).and_then(|parameters| parameters.first());
    let rows = table.and_then(|table| table.shape.first()).copied().unwrap_or(0);
    let operations = 2.0 * f64::from(spec.hidden_size) * rows as f64;
    Work { bytes: map.part_bytes(part) as f64, operations, kernels: 2.0, ..Work::default() }
}

/// Elements that a layer holds at once for each token: the outputs of its linears, twice for what is made of them.
pub(super) fn activation_elements(spec: &ModelSpec, layer: u32) -> u64 {
    let top_k = spec.layers_of(layer..layer + 1).iter().find_map(|layer| layer.feed_forward.experts()).map_or(0, |moe| moe.router.top_k);
    let outputs = spec.weights(Part::Layer(layer)).into_iter().map(|weight| match weight {
        Weight::Linear(linear) => u64::from(linear.output_dims),
        Weight::Experts(experts) => u64::from(experts.output_dims) * u64::from(top_k),
        _ => 0,
    });
    2 * outputs.sum::<u64>()
}

/// The most that is in memory beside a parameter while it is made.
pub(super) fn load_peak(map: &WeightMap) -> u64 {
    map.parts.values().flatten().map(|parameter| parameter.transient_bytes).max().unwrap_or(0)
}

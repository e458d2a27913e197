//! Bytes that a stage takes: weights, caches, and what it works in.

use mlx_cluster_common::{
    dtype::DType,
    spec::{FeedForward, HeadSpec, LayerSpec, Mixer, ModelSpec, Part},
    weights::WeightMap,
};
use std::ops::Range;

/// Tokens of the largest step that the working memory is reckoned for.
const CHUNK_TOKENS: u64 = 512;
/// What an engine takes before it holds any weight: the process, MLX, compiled kernels, transport buffers.
const ENGINE_BYTES: u64 = 100_000_000;
/// Activations are reckoned in f32, the widest that a model has.
const ACTIVATION_BYTES: u64 = 4;

/// Sums from which every stage's needs follow. Layer sums are cumulative: entry `i` is for the layers before `i`.
pub(super) struct Costs {
    layer_weights: Vec<u64>,
    layer_cache: Vec<u64>,
    /// Weight bytes that are read to decode one token: of the experts, only those chosen.
    layer_read: Vec<u64>,
    n_layers: u32,
    tied: bool,
    embedding: u64,
    norm_and_head: u64,
    head_read: u64,
    working: u64,
    logits: u64,
}

impl Costs {
    pub(super) fn new(spec: &ModelSpec, map: &WeightMap) -> Self {
        let dtype = map.activation_dtype.unwrap_or(DType::F16);
        let (mut layer_weights, mut layer_cache, mut layer_read) = (vec![0], vec![0], vec![0]);
        let (mut weights, mut cache, mut read) = (0u64, 0u64, 0u64);
        for (i, layer) in (0u32..).zip(&spec.layers) {
            weights += map.part_bytes(Part::Layer(i));
            cache += spec.cache_bytes_per_token(i..i + 1, dtype);
            read += read_bytes(layer, map, i);
            layer_weights.push(weights);
            layer_cache.push(cache);
            layer_read.push(read);
        }
        let tied = spec.head == HeadSpec::Tied;
        let embedding = map.part_bytes(Part::Embedding);
        let head = map.part_bytes(Part::Head);
        let activations = spec.layers.iter().map(activation_elements).max().unwrap_or(0) + 6 * u64::from(spec.hidden_size);
        Self {
            layer_weights,
            layer_cache,
            layer_read,
            n_layers: spec.n_layers(),
            tied,
            embedding,
            norm_and_head: map.part_bytes(Part::FinalNorm) + head,
            head_read: if tied { embedding } else { head },
            working: ENGINE_BYTES + load_peak(map).max(CHUNK_TOKENS * ACTIVATION_BYTES * activations),
            logits: CHUNK_TOKENS * ACTIVATION_BYTES * u64::from(spec.vocab_size),
        }
    }

    pub(super) fn weights(&self, layers: &Range<u32>) -> u64 {
        let (first, last) = (layers.start == 0, layers.end == self.n_layers);
        let embedding = if first || (last && self.tied) { self.embedding } else { 0 };
        between(&self.layer_weights, layers) + embedding + if last { self.norm_and_head } else { 0 }
    }

    pub(super) fn cache_per_token(&self, layers: &Range<u32>) -> u64 {
        between(&self.layer_cache, layers)
    }

    /// Activations of a chunk of 512 tokens or, where more, what making a parameter needs while loading; and a fixed part.
    pub(super) fn working(&self, layers: &Range<u32>) -> u64 {
        self.working + if layers.end == self.n_layers { self.logits } else { 0 }
    }

    pub(super) fn needed(&self, layers: &Range<u32>, cache_tokens: u64) -> u64 {
        let cache = self.cache_per_token(layers).saturating_mul(cache_tokens);
        self.weights(layers).saturating_add(cache).saturating_add(self.working(layers))
    }

    /// Weight bytes that pass through the processor for each decoded token.
    pub(super) fn read(&self, layers: &Range<u32>) -> u64 {
        between(&self.layer_read, layers) + if layers.end == self.n_layers { self.head_read } else { 0 }
    }
}

fn between(sums: &[u64], layers: &Range<u32>) -> u64 {
    let sum = |i: u32| sums.get(i as usize).copied().unwrap_or(0);
    sum(layers.end).saturating_sub(sum(layers.start))
}

fn read_bytes(layer: &LayerSpec, map: &WeightMap, i: u32) -> u64 {
    let all = map.part_bytes(Part::Layer(i));
    let FeedForward::Experts(moe) = &layer.feed_forward else { return all };
    let paths = [&moe.gate.path, &moe.up.path, &moe.down.path];
    let is_expert = |name: &str| paths.iter().any(|path| name.strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with('.')));
    let parameters = map.parts.get(&Part::Layer(i)).into_iter().flatten();
    let experts: u64 = parameters.filter(|parameter| is_expert(&parameter.name)).map(|parameter| parameter.bytes).sum();
    let chosen = experts / u64::from(moe.gate.n_experts.max(1)) * u64::from(moe.top_k.min(moe.gate.n_experts));
    all - experts + chosen
}

/// Elements that a layer holds at once for each token.
fn activation_elements(layer: &LayerSpec) -> u64 {
    let mixer = match &layer.mixer {
        Mixer::Attention(attention) => 2 * u64::from(attention.n_heads + 2 * attention.n_kv_heads) * u64::from(attention.head_dim),
    };
    let feed_forward = match &layer.feed_forward {
        FeedForward::Mlp(mlp) => 3 * u64::from(mlp.gate.output_dims),
        FeedForward::Experts(moe) => 3 * u64::from(moe.top_k) * u64::from(moe.gate.output_dims) + u64::from(moe.gate.n_experts),
    };
    mixer + feed_forward
}

/// The most that is in memory beside a parameter while it is made.
fn load_peak(map: &WeightMap) -> u64 {
    map.parts.values().flatten().map(|parameter| parameter.transient_bytes).max().unwrap_or(0)
}

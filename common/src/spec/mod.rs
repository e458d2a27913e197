//! What a model is, as data: read from `config.json` by an architecture, built into blocks by an engine, counted by the planner.

mod quantization;
mod rope;

pub use quantization::{PublishedQuantization, Quantization, QuantizationMode, QuantizationScheme};
pub use rope::{RopeKind, RopeSpec, rotary_dims, yarn_attention_factor};

use crate::{dtype::DType, published::Published};
use std::ops::Range;

/// A decoder: embedding, layers, final norm, head.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: u32,
    pub vocab_size: u32,
    pub embedding: EmbeddingSpec,
    pub layers: Vec<LayerSpec>,
    pub final_norm: NormSpec,
    pub head: HeadSpec,
    pub quantization: Quantization,
    /// Longest sequence that the model was made for, where the config says.
    pub max_position_embeddings: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    /// How the names and layouts of published checkpoints become those of this spec.
    pub published: Published,
}

/// Rows of a table, one a token: `[vocab_size, dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    pub path: String,
    pub vocab_size: u32,
    pub dims: u32,
}

/// What turns the last hidden state into logits.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadSpec {
    /// The embedding's table, transposed.
    Tied,
    Linear(LinearSpec),
}

/// `y = x Wᵀ + b` with `W` of shape `[output_dims, input_dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    pub path: String,
    pub input_dims: u32,
    pub output_dims: u32,
    pub bias: bool,
}

/// One linear an expert, stacked: `[n_experts, output_dims, input_dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    pub path: String,
    pub n_experts: u32,
    pub input_dims: u32,
    pub output_dims: u32,
}

/// A parameter that belongs to no linear, embedding or norm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its whole name.
    pub name: String,
    pub shape: Vec<u32>,
}

/// Root-mean-square norm over the last axis: `x / sqrt(mean(x²) + eps) · w` (Zhang and Sennrich 2019).
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    pub path: String,
    pub dims: u32,
    pub eps: f32,
}

/// A layer: `h = x + after_mixer(mixer(before_mixer(x)))`, then the same with the feed-forward. A norm that is None is left out,
/// so pre-norm, output-norm and sandwich layers differ in data only.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    pub before_mixer: Option<NormSpec>,
    pub mixer: Mixer,
    pub after_mixer: Option<NormSpec>,
    pub before_feed_forward: Option<NormSpec>,
    pub feed_forward: FeedForward,
    pub after_feed_forward: Option<NormSpec>,
}

/// What mixes the tokens of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Mixer {
    Attention(AttentionSpec),
}

/// Softmax attention with grouped queries (Ainslie et al. 2023).
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    /// Factor on the scores.
    pub scale: f32,
    pub query: LinearSpec,
    pub key: LinearSpec,
    pub value: LinearSpec,
    pub output: LinearSpec,
    /// Norm over each head of the queries, before RoPE.
    pub query_norm: Option<NormSpec>,
    pub key_norm: Option<NormSpec>,
    pub rope: Option<RopeSpec>,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<u32>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FeedForward {
    Mlp(MlpSpec),
    Experts(MoeSpec),
}

/// `down(silu(gate(x)) · up(x))` (Shazeer 2020).
#[derive(Debug, Clone, PartialEq)]
pub struct MlpSpec {
    pub gate: LinearSpec,
    pub up: LinearSpec,
    pub down: LinearSpec,
}

/// Each token goes through the `top_k` experts that its router likes best.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    pub router: LinearSpec,
    pub scoring: RouterScoring,
    pub top_k: u32,
    pub gate: ExpertsSpec,
    pub up: ExpertsSpec,
    pub down: ExpertsSpec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterScoring {
    /// Softmax over all experts, then the best ones; `renormalise` divides by their sum.
    SoftmaxThenTopK { renormalise: bool },
    /// The best ones, then softmax over them.
    TopKThenSoftmax,
}

/// A piece of a model's parameters: stages own whole parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    Embedding,
    Layer(u32),
    FinalNorm,
    Head,
}

/// A parameter group that one block needs, borrowed from the spec.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weight<'a> {
    Embedding(&'a EmbeddingSpec),
    Linear(&'a LinearSpec),
    Experts(&'a ExpertsSpec),
    Norm(&'a NormSpec),
    Tensor(&'a TensorSpec),
}

impl ModelSpec {
    pub fn n_layers(&self) -> u32 {
        self.layers.len() as u32
    }

    /// Every part, in the order of the computation.
    pub fn parts(&self) -> Vec<Part> {
        self.parts_of(0..self.n_layers())
    }

    /// The parts that a stage with these layers holds. A tied head is the embedding, so the last stage holds that too.
    pub fn parts_of(&self, layers: Range<u32>) -> Vec<Part> {
        let (first, last) = (layers.start == 0, layers.end == self.n_layers());
        let tied = self.head == HeadSpec::Tied;
        let mut parts = Vec::new();
        if first || (last && tied) {
            parts.push(Part::Embedding);
        }
        parts.extend(layers.map(Part::Layer));
        if last {
            parts.push(Part::FinalNorm);
            if !tied {
                parts.push(Part::Head);
            }
        }
        parts
    }

    /// The parameter groups of a part.
    pub fn weights(&self, part: Part) -> Vec<Weight<'_>> {
        match part {
            Part::Embedding => vec![Weight::Embedding(&self.embedding)],
            Part::Layer(layer) => self.layers.get(layer as usize).map(LayerSpec::weights).unwrap_or_default(),
            Part::FinalNorm => vec![Weight::Norm(&self.final_norm)],
            Part::Head => match &self.head {
                HeadSpec::Tied => Vec::new(),
                HeadSpec::Linear(linear) => vec![Weight::Linear(linear)],
            },
        }
    }

    /// Bytes that the caches of these layers take for each token of a sequence.
    pub fn cache_bytes_per_token(&self, layers: Range<u32>, dtype: DType) -> u64 {
        let layers = self.layers.get(layers.start as usize..layers.end as usize).unwrap_or_default();
        layers.iter().map(|layer| layer.cache_elements_per_token() * dtype.size()).sum()
    }

    /// What crosses the cut before a layer, as widths of `[tokens, width]` tensors in the model's type, by name.
    pub fn cut_tensors(&self, _layer: u32) -> Vec<(&'static str, u32)> {
        vec![("hidden", self.hidden_size)]
    }
}

impl LayerSpec {
    fn weights(&self) -> Vec<Weight<'_>> {
        let norms = [&self.before_mixer, &self.after_mixer, &self.before_feed_forward, &self.after_feed_forward];
        let mut weights: Vec<_> = norms.into_iter().flatten().map(Weight::Norm).collect();
        match &self.mixer {
            Mixer::Attention(attention) => {
                weights.extend([&attention.query, &attention.key, &attention.value, &attention.output].map(Weight::Linear));
                weights.extend([&attention.query_norm, &attention.key_norm].into_iter().flatten().map(Weight::Norm));
            }
        }
        match &self.feed_forward {
            FeedForward::Mlp(mlp) => weights.extend([&mlp.gate, &mlp.up, &mlp.down].map(Weight::Linear)),
            FeedForward::Experts(moe) => {
                weights.push(Weight::Linear(&moe.router));
                weights.extend([&moe.gate, &moe.up, &moe.down].map(Weight::Experts));
            }
        }
        weights
    }

    fn cache_elements_per_token(&self) -> u64 {
        match &self.mixer {
            Mixer::Attention(attention) => 2 * u64::from(attention.n_kv_heads) * u64::from(attention.head_dim),
        }
    }
}

impl Weight<'_> {
    pub fn path(&self) -> &str {
        match self {
            Weight::Embedding(embedding) => &embedding.path,
            Weight::Linear(linear) => &linear.path,
            Weight::Experts(experts) => &experts.path,
            Weight::Norm(norm) => &norm.path,
            Weight::Tensor(tensor) => &tensor.name,
        }
    }
}

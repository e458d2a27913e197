//! Softmax attention: over grouped heads, and over a latent vector that all heads share.

use super::{HeadLinearSpec, LinearSpec, NormSpec, RopeSpec, TensorSpec, Weight};

/// Softmax attention with grouped queries (Ainslie et al. 2023).
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    pub n_heads: u32,
    pub n_kv_heads: u32,
    pub head_dim: u32,
    /// Factor on the scores.
    pub scale: f32,
    pub projections: Projections,
    pub output: LinearSpec,
    pub head_norms: HeadNorms,
    /// Over each head of the values.
    pub value_norm: Option<NormSpec>,
    pub rope: Option<RopeSpec>,
    pub temperature: Option<TemperatureSpec>,
    /// A token sees itself and the `window - 1` tokens before it.
    pub window: Option<u32>,
    /// A logit a head that takes part in the softmax and has no value: `[n_heads]` (Xiao et al. 2024, as in gpt-oss).
    pub sinks: Option<TensorSpec>,
    /// Scores become `softcap · tanh(score / softcap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// Where the model is in f16, scores and sums are in f32 (Command R7B).
    pub widens_f16: bool,
    pub gate: Option<AttentionGate>,
}

/// From the residual stream to queries, keys and values.
#[derive(Debug, Clone, PartialEq)]
pub enum Projections {
    Separate {
        query: LinearSpec,
        key: LinearSpec,
        value: LinearSpec,
    },
    /// One linear gives all queries, then all keys, then all values.
    Fused(LinearSpec),
    /// One linear gives for each key-value head its queries, then its key, then its value (InternLM 2).
    FusedByGroup(LinearSpec),
    /// What is projected as key, before its norm and RoPE, is the value too (Gemma 4).
    KeyIsValue {
        query: LinearSpec,
        key: LinearSpec,
    },
    /// Keys and values are those that an earlier layer has put into its cache (Gemma 3n and 4).
    Shared {
        query: LinearSpec,
        source_layer: u32,
    },
}

/// Norms of queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub enum HeadNorms {
    None,
    /// Over each head, the same weights for all heads.
    PerHead {
        query: NormSpec,
        key: NormSpec,
    },
    /// Over each head, after RoPE.
    PerHeadAfterRope {
        query: NormSpec,
        key: NormSpec,
    },
    /// Over all heads together, before they are split.
    Whole {
        query: NormSpec,
        key: NormSpec,
    },
    /// Over each head, with weights of its own, `[n_heads, head_dim]`, after an unweighted norm (PLaMo 2, Command R+).
    PerHeadWeights {
        norm: NormSpec,
        query: TensorSpec,
        key: TensorSpec,
    },
}

/// Queries grow with the logarithm of the position: `q · (1 + beta · log(1 + floor(position / original_context)))`, positions counted as
/// the architecture does (Llama 4, after Nakanishi 2025).
#[derive(Debug, Clone, PartialEq)]
pub struct TemperatureSpec {
    pub beta: f32,
    pub original_context: u32,
    /// Added to the position before it is divided.
    pub position_offset: u32,
}

/// A factor between attention and its output projection.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionGate {
    /// The query projection gives for each head its query and then as many numbers more, whose sigmoid is the factor (Qwen3-Next).
    InQuery,
    /// `sigmoid(linear(x))`, one factor a head.
    PerHead(LinearSpec),
}

/// Multi-head latent attention (DeepSeek-AI 2024): keys and values of all heads are linear in one latent vector a token.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentAttentionSpec {
    pub n_heads: u32,
    /// Part of a query or key without position.
    pub nope_dim: u32,
    /// Part of a query or key that carries the position; the key's is shared by all heads.
    pub rope_dim: u32,
    pub value_dim: u32,
    pub latent_dim: u32,
    /// Factor on the scores.
    pub scale: f32,
    pub query: LatentQuery,
    /// Gives the latent vector and, after it, the key's part with the position.
    pub down: LinearSpec,
    pub latent_norm: NormSpec,
    pub up: LatentUp,
    pub output: LinearSpec,
    pub rope: RopeSpec,
    pub temperature: Option<TemperatureSpec>,
    pub indexer: Option<IndexerSpec>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum LatentQuery {
    Direct(LinearSpec),
    LowRank { down: LinearSpec, norm: NormSpec, up: LinearSpec },
}

/// From the latent vector to keys and values.
#[derive(Debug, Clone, PartialEq)]
pub enum LatentUp {
    /// One linear gives for each head its key without position and its value; both are cached in full.
    Expanded(LinearSpec),
    /// The latent vector is cached; at decode queries go to it through `embed_query`, and attention's output comes back through
    /// `unembed_output`.
    Absorbed {
        embed_query: HeadLinearSpec,
        unembed_output: HeadLinearSpec,
        /// When several tokens are read at once, keys are put together of their two parts, for one attention over both. Without, the
        /// scores of the part with the position are added to those of the other.
        joined_keys: bool,
    },
}

/// Picks the `top_k` tokens that a query attends to (DeepSeek-V3.2).
#[derive(Debug, Clone, PartialEq)]
pub struct IndexerSpec {
    pub n_heads: u32,
    pub head_dim: u32,
    pub top_k: u32,
    /// From the low-rank query.
    pub query: LinearSpec,
    pub key: LinearSpec,
    pub key_norm: NormSpec,
    /// A weight a head.
    pub weights: LinearSpec,
    pub rope: RopeSpec,
}

impl AttentionSpec {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match &self.projections {
            Projections::Separate { query, key, value } => out.extend([query, key, value].map(Weight::Linear)),
            Projections::Fused(linear) | Projections::FusedByGroup(linear) => out.push(Weight::Linear(linear)),
            Projections::KeyIsValue { query, key } => out.extend([query, key].map(Weight::Linear)),
            Projections::Shared { query, .. } => out.push(Weight::Linear(query)),
        }
        out.push(Weight::Linear(&self.output));
        let shared = matches!(self.projections, Projections::Shared { .. });
        match &self.head_norms {
            HeadNorms::None => {}
            // A layer that projects no keys has no norm for them.
            HeadNorms::PerHead { query, .. } | HeadNorms::PerHeadAfterRope { query, .. } if shared => out.push(Weight::Norm(query)),
            HeadNorms::PerHead { query, key } | HeadNorms::PerHeadAfterRope { query, key } | HeadNorms::Whole { query, key } => {
                out.extend([query, key].map(Weight::Norm));
            }
            HeadNorms::PerHeadWeights { query, key, .. } => out.extend([query, key].map(Weight::Tensor)),
        }
        out.extend(self.value_norm.iter().filter(|_| !shared).map(Weight::Norm));
        out.extend(self.sinks.iter().map(Weight::Tensor));
        if let Some(AttentionGate::PerHead(linear)) = &self.gate {
            out.push(Weight::Linear(linear));
        }
    }

    /// Numbers of a key and of a value, for each of the key-value heads.
    pub fn cached_dims(&self) -> [u32; 2] {
        [self.head_dim; 2]
    }

    /// The layer whose cache this one reads instead of having its own.
    pub fn source_layer(&self) -> Option<u32> {
        match &self.projections {
            Projections::Shared { source_layer, .. } => Some(*source_layer),
            _ => None,
        }
    }
}

impl LatentAttentionSpec {
    pub(super) fn weights<'a>(&'a self, out: &mut Vec<Weight<'a>>) {
        match &self.query {
            LatentQuery::Direct(linear) => out.push(Weight::Linear(linear)),
            LatentQuery::LowRank { down, norm, up } => out.extend([Weight::Linear(down), Weight::Norm(norm), Weight::Linear(up)]),
        }
        out.extend([Weight::Linear(&self.down), Weight::Norm(&self.latent_norm)]);
        match &self.up {
            LatentUp::Expanded(linear) => out.push(Weight::Linear(linear)),
            LatentUp::Absorbed { embed_query, unembed_output, .. } => out.extend([embed_query, unembed_output].map(Weight::HeadLinear)),
        }
        out.push(Weight::Linear(&self.output));
        if let Some(indexer) = &self.indexer {
            out.extend([&indexer.query, &indexer.key, &indexer.weights].map(Weight::Linear));
            out.push(Weight::Norm(&indexer.key_norm));
        }
    }

    /// Width of what an indexer's queries are made of.
    pub fn query_rank(&self) -> Option<u32> {
        match &self.query {
            LatentQuery::Direct(_) => None,
            LatentQuery::LowRank { up, .. } => Some(up.input_dims),
        }
    }

    /// Elements that the cache takes for each token.
    pub(super) fn cache_elements_per_token(&self) -> u64 {
        let own = match &self.up {
            LatentUp::Expanded(_) => self.n_heads * (self.nope_dim + self.rope_dim + self.value_dim),
            LatentUp::Absorbed { .. } => self.latent_dim + self.rope_dim,
        };
        u64::from(own) + self.indexer.as_ref().map_or(0, |indexer| u64::from(indexer.head_dim))
    }
}

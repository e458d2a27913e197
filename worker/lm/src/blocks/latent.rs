//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in three pieces as any attention.
//!
//! A query has a part without position ("content") and one with (RoPE). Expanded, keys and values of all heads are made before the cache,
//! and the rest is plain attention. Absorbed, the cache holds what they are linear in: the latent vector, and the one rotated key that all
//! heads share.

use super::{attention, indexer, mixer::Projected, norm::Norm};
use crate::{
    cache::{KvCache, Reach},
    error::LmError,
    linear::{HeadLinear, Linear},
    parameters::parameters,
    rope::Rope,
    weights::Weights,
};
use mlx_cluster_common::spec::{LatentAttentionSpec, LatentQuery, LatentUp, Quantization, TemperatureSpec};
use mlx_rs::{Array, fast, fast::ScaledDotProductAttentionMask as SdpaMask, ops};

/// What comes before the cache. Expanded: queries, keys and values `[B, heads, L, dims]`. Absorbed: both parts of the queries, the latent
/// vectors `[B, 1, L, latent_dim]` and the rotated keys `[B, 1, L, rope_dim]`; after them what the indexer makes.
#[derive(Debug, Clone)]
pub(super) struct Project {
    shape: Shape,
    query: Query,
    down: Linear,
    latent_norm: Norm,
    /// Where keys and values are expanded.
    up: Option<Linear>,
    rope: Rope,
    temperature: Option<TemperatureSpec>,
    indexer: Option<indexer::Project>,
}
parameters!(Project: query, down, latent_norm, up, rope, indexer);

#[derive(Debug, Clone, Copy)]
struct Shape {
    n_heads: i32,
    nope_dim: i32,
    rope_dim: i32,
    latent_dim: i32,
}

/// From the stream to the queries, by way of a low rank or at once.
#[derive(Debug, Clone)]
struct Query {
    down: Option<Linear>,
    norm: Option<Norm>,
    up: Linear,
}
parameters!(Query: down, norm, up);

impl Query {
    fn load(weights: &mut Weights, spec: &LatentQuery, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(match spec {
            LatentQuery::Direct(linear) => Self { down: None, norm: None, up: Linear::load(weights, linear, quantization)? },
            LatentQuery::LowRank { down, norm, up } => Self {
                down: Some(Linear::load(weights, down, quantization)?),
                norm: Some(Norm::load(weights, norm)?),
                up: Linear::load(weights, up, quantization)?,
            },
        })
    }

    /// What `up` is given: `[B, L, rank]`, or `x` itself.
    fn low_rank(&self, x: &Array) -> Result<Array, LmError> {
        let down = self.down.as_ref().map_or(Ok(x.clone()), |linear| linear.forward(x))?;
        self.norm.as_ref().map_or(Ok(down.clone()), |norm| norm.forward(&down))
    }
}

impl Project {
    pub(super) fn load(weights: &mut Weights, spec: &LatentAttentionSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let up = match &spec.up {
            LatentUp::Expanded(linear) => Some(Linear::load(weights, linear, quantization)?),
            LatentUp::Absorbed { .. } => None,
        };
        Ok(Self {
            shape: Shape {
                n_heads: spec.n_heads as i32,
                nope_dim: spec.nope_dim as i32,
                rope_dim: spec.rope_dim as i32,
                latent_dim: spec.latent_dim as i32,
            },
            query: Query::load(weights, &spec.query, quantization)?,
            down: Linear::load(weights, &spec.down, quantization)?,
            latent_norm: Norm::load(weights, &spec.latent_norm)?,
            up,
            rope: Rope::new(&spec.rope)?,
            temperature: spec.temperature.clone(),
            indexer: spec.indexer.as_ref().map(|indexer| indexer::Project::load(weights, indexer, quantization)).transpose()?,
        })
    }

    /// Arrays for the cache, and arrays past it.
    pub(super) fn arity(&self) -> (usize, usize) {
        match (&self.up, &self.indexer) {
            (Some(_), _) => (3, 0),
            (None, None) => (4, 0),
            (None, Some(_)) => (4 + indexer::ARITY, 0),
        }
    }

    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`.
    pub(super) fn forward(&self, x: &Array, offsets: &Array) -> Result<Projected, LmError> {
        let Shape { n_heads, nope_dim, rope_dim, latent_dim } = self.shape;
        let (batch, length) = (x.dim(0), x.dim(1));
        let heads = |y: &Array, n: i32| y.reshape(&[batch, length, n, -1])?.transpose_axes(&[0, 2, 1, 3]);
        let low_rank = self.query.low_rank(x)?;
        let [content, position] = two(heads(&self.query.up.forward(&low_rank)?, n_heads)?, nope_dim)?;
        let [latent, key_position] = two(self.down.forward(x)?, latent_dim)?;
        let latent = self.latent_norm.forward(&latent)?;
        let position = self.rope.forward(&position, offsets)?;
        let key_position = self.rope.forward(&heads(&key_position, 1)?, offsets)?;
        let (content, position) = match &self.temperature {
            Some(temperature) => {
                let scaled = |queries| attention::scale_by_position(queries, offsets, temperature);
                (scaled(&content)?, scaled(&position)?)
            }
            None => (content, position),
        };
        let mixed = match &self.up {
            Some(up) => {
                let [keys, values] = two(heads(&up.forward(&latent)?, n_heads)?, nope_dim)?;
                let shared = ops::broadcast_to(&key_position, &[batch, n_heads, length, rope_dim])?;
                vec![ops::concatenate(&[content, position], -1)?, ops::concatenate(&[keys, shared], -1)?, values]
            }
            None => {
                let mut mixed = vec![content, position, latent.expand_dims(1)?, key_position];
                if let Some(indexer) = &self.indexer {
                    mixed.extend(indexer.forward(x, &low_rank, offsets)?);
                }
                mixed
            }
        };
        Ok(Projected { mixed, beside: Vec::new() })
    }
}

/// The last axis up to `at`, and the rest.
fn two(y: Array, at: i32) -> Result<[Array; 2], LmError> {
    let parts = y.split_at_indices(&[at], -1)?;
    <[Array; 2]>::try_from(parts).map_err(|parts| LmError::Mlx(format!("a split gave {} parts, wanted 2", parts.len())))
}

/// Absorbed attention over the cache.
///
/// One token's queries go into the latent space, and what comes out of attention over the latent vectors comes back: so keys and values of
/// the tokens before are never made. Several tokens at once are cheaper the other way round.
#[derive(Debug, Clone)]
pub struct Attend {
    scale: f32,
    joined_keys: bool,
    embed_query: HeadLinear,
    unembed_output: HeadLinear,
    indexer: Option<indexer::Pick>,
}
parameters!(Attend: embed_query, unembed_output);

/// What the cache holds for some tokens, and what each of them sees of it.
struct Seen {
    /// `[1, 1, held, latent_dim]`
    latents: Array,
    /// `[1, 1, held, rope_dim]`
    positions: Array,
    /// `[1, 1, n, top_k]`; None for all that is in reach.
    picked: Option<Array>,
    reach: Reach,
}

impl Attend {
    /// None where keys and values are expanded before the cache.
    pub fn load(weights: &mut Weights, spec: &LatentAttentionSpec, quantization: &Quantization) -> Result<Option<Self>, LmError> {
        let LatentUp::Absorbed { embed_query, unembed_output, joined_keys } = &spec.up else {
            return Ok(None);
        };
        Ok(Some(Self {
            scale: spec.scale,
            joined_keys: *joined_keys,
            embed_query: HeadLinear::load(weights, &embed_query.path, quantization)?,
            unembed_output: HeadLinear::load(weights, &unembed_output.path, quantization)?,
            indexer: spec.indexer.as_ref().map(indexer::Pick::new),
        }))
    }

    /// `rows` are what `Project` made, with `B` = 1 and `L` new tokens: `[1, heads, L, value_dim]`.
    pub fn forward(&self, rows: &[Array], cache: &mut KvCache) -> Result<Array, LmError> {
        self.fill(rows, cache)?;
        let (content, position) = queries(rows)?;
        if content.dim(2) == 1 {
            let attended = self.over_latents(&self.embed_queries(rows)?, cache)?;
            return self.unembed_outputs(&attended);
        }
        self.over_keys(content, position, &self.seen(rows, cache)?)
    }

    /// Puts the new tokens into the cache.
    pub fn fill(&self, rows: &[Array], cache: &mut KvCache) -> Result<(), LmError> {
        match (&self.indexer, rows) {
            (None, [_, _, latent, position]) => cache.extend(&[latent, position]),
            (Some(_), [_, _, latent, position, _, key, _]) => cache.extend(&[latent, position, key]),
            _ => Err(LmError::Mlx(format!("latent attention got {} arrays", rows.len()))),
        }
    }

    /// Rows of single tokens, with the content of their queries `[B, heads, 1, nope_dim]` brought into the latent space.
    pub fn embed_queries(&self, rows: &[Array]) -> Result<Vec<Array>, LmError> {
        let mut rows = rows.to_vec();
        if let Some(content) = rows.first_mut() {
            *content = by_head(&self.embed_query, content)?;
        }
        Ok(rows)
    }

    /// Attention in the latent space of one token, whose query is there, over a cache whose last token it is: `[1, heads, 1, latent_dim]`.
    pub fn over_latents(&self, rows: &[Array], cache: &KvCache) -> Result<Array, LmError> {
        let (content, position) = queries(rows)?;
        let Seen { latents, positions, picked, .. } = self.seen(rows, cache)?;
        let (latents, positions) = match picked.map(|picked| picked.flatten(None, None)).transpose()? {
            Some(picked) => (latents.take_axis(&picked, 2)?, positions.take_axis(&picked, 2)?),
            None => (latents, positions),
        };
        let scores = self.position_scores(position, &positions)?;
        Ok(fast::scaled_dot_product_attention(content, &latents, &latents, self.scale, Some(SdpaMask::Array(&scores)), None)?)
    }

    /// And back: `[B, heads, 1, latent_dim] -> [B, heads, 1, value_dim]`.
    pub fn unembed_outputs(&self, attended: &Array) -> Result<Array, LmError> {
        by_head(&self.unembed_output, attended)
    }

    /// What the tokens of `rows` see of a cache that holds them.
    fn seen(&self, rows: &[Array], cache: &KvCache) -> Result<Seen, LmError> {
        let n = queries(rows)?.0.dim(2);
        let (Some(indexer), [.., index_queries, _, weights]) = (&self.indexer, rows) else {
            let ([latents, positions], reach) = cache.seen_arrays(n)?;
            return Ok(Seen { latents, positions, picked: None, reach });
        };
        let ([latents, positions, keys], reach) = cache.seen_arrays(n)?;
        let picked = indexer.forward(index_queries, &keys, weights, &reach)?;
        Ok(Seen { latents, positions, picked, reach })
    }

    /// Attention of several tokens, with keys and values made of the latent vectors: `[1, heads, n, value_dim]`.
    fn over_keys(&self, content: &Array, position: &Array, seen: &Seen) -> Result<Array, LmError> {
        let Seen { latents, positions, picked, reach } = seen;
        let held = reach.held;
        let keys = self.embed_query.forward(latents, false)?;
        let values = self.unembed_output.forward(latents, true)?;
        let visible = match picked {
            Some(picked) => Some(ops::logical_and(indexer::mask(picked, held)?, attention::visible(reach)?)?),
            None if reach.is_whole() => None,
            None => Some(attention::visible(reach)?),
        };
        if self.joined_keys {
            let shared = ops::broadcast_to(positions, &[1, keys.dim(1), held, positions.dim(3)])?;
            let queries = ops::concatenate(&[content, position], -1)?;
            let keys = ops::concatenate(&[keys, shared], -1)?;
            let mask = visible.as_ref().map_or(SdpaMask::Causal, SdpaMask::Array);
            return Ok(fast::scaled_dot_product_attention(queries, keys, values, self.scale, Some(mask), None)?);
        }
        let visible = visible.map_or_else(|| attention::visible(reach), Ok)?;
        let scores = self.position_scores(position, positions)?;
        let scores = ops::select(&visible, &scores, attention::lowest(scores.dtype())?)?;
        Ok(fast::scaled_dot_product_attention(content, keys, values, self.scale, Some(SdpaMask::Array(&scores)), None)?)
    }

    /// What the parts with the position add to the scores: `[1, heads, n, held]`.
    fn position_scores(&self, queries: &Array, keys: &Array) -> Result<Array, LmError> {
        let scale = Array::from_f32(self.scale).as_dtype(queries.dtype())?;
        Ok(ops::matmul(ops::multiply(queries, scale)?, keys.swap_axes(-1, -2)?)?)
    }
}

/// Both parts of the queries.
fn queries(rows: &[Array]) -> Result<(&Array, &Array), LmError> {
    match rows {
        [content, position, ..] => Ok((content, position)),
        _ => Err(LmError::Mlx("latent attention without queries".into())),
    }
}

/// `[B, heads, 1, input] -> [B, heads, 1, output]`; the rows of a head side by side, so that its matrix is read once.
fn by_head(linear: &HeadLinear, x: &Array) -> Result<Array, LmError> {
    if x.dim(0) == 1 {
        return linear.forward(x, true);
    }
    Ok(linear.forward(&x.swap_axes(0, 2)?, true)?.swap_axes(0, 2)?)
}

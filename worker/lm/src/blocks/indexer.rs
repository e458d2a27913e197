//! The lightning indexer of DeepSeek-V3.2 (DeepSeek-AI 2025): a cheap attention of its own whose best tokens are those that the real one
//! sees.

use super::{attention, norm::Norm};
use crate::{cache::Reach, error::LmError, linear::Linear, parameters::parameters, rope::Rope, weights::Weights};
use mlx_cluster_common::spec::{IndexerSpec, Quantization};
use mlx_rs::{Array, Dtype, ops, stop_gradient};

/// How many arrays `Project` makes.
pub(super) const ARITY: usize = 3;

/// Before the cache: queries `[B, index_heads, L, head_dim]`, one key `[B, 1, L, head_dim]`, and a weight a head `[B, L, index_heads]`.
#[derive(Debug, Clone)]
pub(super) struct Project {
    n_heads: i32,
    query: Linear,
    key: Linear,
    key_norm: Norm,
    weights: Linear,
    weight_scale: f32,
    rope: Rope,
}
parameters!(Project: query, key, key_norm, weights, rope);

impl Project {
    pub(super) fn load(weights: &mut Weights, spec: &IndexerSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            n_heads: spec.n_heads as i32,
            query: Linear::load(weights, &spec.query, quantization)?,
            key: Linear::load(weights, &spec.key, quantization)?,
            key_norm: Norm::load(weights, &spec.key_norm)?,
            weights: Linear::load(weights, &spec.weights, quantization)?,
            weight_scale: (f64::from(spec.n_heads).powf(-0.5) * f64::from(spec.head_dim).powf(-0.5)) as f32,
            rope: Rope::new(&spec.rope)?,
        })
    }

    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`; `low_rank` `[B, L, rank]` is what its queries are made of.
    pub(super) fn forward(&self, x: &Array, low_rank: &Array, offsets: &Array) -> Result<[Array; ARITY], LmError> {
        let queries = self.query.forward(low_rank)?.reshape(&[x.dim(0), x.dim(1), self.n_heads, -1])?.swap_axes(1, 2)?;
        let key = self.key_norm.forward(&self.key.forward(x)?)?.expand_dims(1)?;
        let weights = self.weights.forward(x)?;
        let scale = Array::from_f32(self.weight_scale).as_dtype(weights.dtype())?;
        Ok([self.rope.forward(&queries, offsets)?, self.rope.forward(&key, offsets)?, ops::multiply(weights, scale)?])
    }
}

/// At the cache.
#[derive(Debug, Clone)]
pub(super) struct Pick {
    top_k: i32,
}

impl Pick {
    pub(super) fn new(spec: &IndexerSpec) -> Self {
        Self { top_k: spec.top_k.min(i32::MAX as u32) as i32 }
    }

    /// The tokens that each of `n` new tokens sees, of all that `keys` `[1, 1, held, head_dim]` hold: `[1, 1, n, top_k]`, in no order, and
    /// where fewer than `top_k` come before, with some that do not. None while all are seen.
    pub(super) fn forward(&self, queries: &Array, keys: &Array, weights: &Array, reach: &Reach) -> Result<Option<Array>, LmError> {
        let (n, held) = (queries.dim(2), keys.dim(2));
        if held <= self.top_k {
            return Ok(None);
        }
        let scores = match n {
            1 => one_token(queries, keys, weights)?,
            _ => {
                let scores = several_tokens(queries, keys, weights)?;
                let never = Array::from_f32(f32::NEG_INFINITY).as_dtype(scores.dtype())?;
                ops::select(attention::visible(reach)?, scores, never)?
            }
        };
        let first = held - self.top_k;
        let order = ops::argpartition_axis(scores, first, -1)?;
        // Which tokens were picked has no gradient.
        Ok(Some(stop_gradient(order.split_at_indices(&[first], -1)?.swap_remove(1))?))
    }
}

/// `sum over heads of weight · max(query · key, 0)`: `[1, 1, 1, held]`.
fn one_token(queries: &Array, keys: &Array, weights: &Array) -> Result<Array, LmError> {
    let scores = positive(&ops::matmul(queries, keys.swap_axes(-1, -2)?)?)?;
    let weights = weights.swap_axes(-1, -2)?.expand_dims(-1)?;
    Ok(ops::multiply(scores, weights)?.sum_axis(1, true)?)
}

/// The same for `n` tokens, `[1, 1, n, held]`: head by head, since the scores of all heads are large.
fn several_tokens(queries: &Array, keys: &Array, weights: &Array) -> Result<Array, LmError> {
    let n_heads = queries.dim(1);
    let keys = keys.swap_axes(-1, -2)?;
    let weights = weights.expand_dims(1)?;
    let (queries, weights) = (queries.split_equal(n_heads, 1)?, weights.split_equal(n_heads, -1)?);
    let mut sum: Option<Array> = None;
    for (query, weight) in queries.iter().zip(&weights) {
        let scores = ops::multiply(positive(&ops::matmul(query, &keys)?)?, weight)?;
        sum = Some(match sum {
            Some(sum) => ops::add(sum, scores)?,
            None => scores,
        });
    }
    sum.ok_or_else(|| LmError::Mlx("an indexer without heads".into()))
}

fn positive(scores: &Array) -> Result<Array, LmError> {
    Ok(ops::maximum(scores, Array::from_f32(0.0).as_dtype(scores.dtype())?)?)
}

/// The picked tokens `[1, 1, n, top_k]` as a mask `[1, 1, n, held]`.
pub(super) fn mask(picked: &Array, held: i32) -> Result<Array, LmError> {
    let none = ops::zeros_dtype(&[1, 1, picked.dim(2), held], Dtype::Bool)?;
    Ok(none.put_along_axis(picked, Array::from_bool(true), -1)?)
}

//! Softmax attention with grouped queries, in three pieces: projections before the cache, attention over it, the output after it.

use super::norm::Norm;
use crate::{
    cache::KvCache,
    error::LmError,
    linear::{Linear, Parameters},
    rope::Rope,
    weights::Weights,
};
use mlx_cluster_common::spec::{AttentionSpec, Quantization};
use mlx_rs::{Array, Dtype, fast, fast::ScaledDotProductAttentionMask, ops};

/// Queries `[B, heads, L, head_dim]`, keys and values `[B, kv_heads, L, head_dim]`.
pub struct Heads {
    pub queries: Array,
    pub keys: Array,
    pub values: Array,
}

/// What comes before the cache.
#[derive(Debug, Clone)]
pub struct Project {
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    rope: Option<Rope>,
}

impl Project {
    pub fn load(weights: &mut Weights, spec: &AttentionSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            n_heads: spec.n_heads as i32,
            n_kv_heads: spec.n_kv_heads as i32,
            head_dim: spec.head_dim as i32,
            query: Linear::load(weights, &spec.query, quantization)?,
            key: Linear::load(weights, &spec.key, quantization)?,
            value: Linear::load(weights, &spec.value, quantization)?,
            query_norm: Norm::load_optional(weights, &spec.query_norm)?,
            key_norm: Norm::load_optional(weights, &spec.key_norm)?,
            rope: spec.rope.as_ref().map(Rope::new).transpose()?,
        })
    }

    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`.
    pub fn forward(&self, x: &Array, offsets: &Array) -> Result<Heads, LmError> {
        let (batch, length) = (x.dim(0), x.dim(1));
        let heads = |y: Array, n_heads: i32, norm: &Option<Norm>| -> Result<Array, LmError> {
            let y = y.reshape(&[batch, length, n_heads, self.head_dim])?;
            let y = norm.as_ref().map_or(Ok(y.clone()), |norm| norm.forward(&y))?;
            Ok(y.transpose_axes(&[0, 2, 1, 3])?)
        };
        let rotate = |y: Array| self.rope.as_ref().map_or(Ok(y.clone()), |rope| rope.forward(&y, offsets));
        Ok(Heads {
            queries: rotate(heads(self.query.forward(x)?, self.n_heads, &self.query_norm)?)?,
            keys: rotate(heads(self.key.forward(x)?, self.n_kv_heads, &self.key_norm)?)?,
            values: heads(self.value.forward(x)?, self.n_kv_heads, &None)?,
        })
    }

    /// The numbers that are built into a compiled piece.
    pub(super) fn signature(&self) -> String {
        let Self { n_heads, n_kv_heads, head_dim, query_norm, key_norm, rope, .. } = self;
        let eps = [query_norm, key_norm].map(|norm| norm.as_ref().map(|norm| norm.eps));
        format!("{n_heads}/{n_kv_heads}/{head_dim} {eps:?} {}", rope.as_ref().map(Rope::signature).unwrap_or_default())
    }
}

impl Parameters for Project {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        [&self.query, &self.key, &self.value].into_iter().for_each(|linear| linear.each(visit));
        [&self.query_norm, &self.key_norm].into_iter().for_each(|norm| norm.each(visit));
        self.rope.each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        [&mut self.query, &mut self.key, &mut self.value].into_iter().for_each(|linear| linear.each_mut(visit));
        [&mut self.query_norm, &mut self.key_norm].into_iter().for_each(|norm| norm.each_mut(visit));
        self.rope.each_mut(visit);
    }
}

/// Attention of one sequence's new tokens over all that its cache holds. Has no parameters.
#[derive(Debug, Clone, Copy)]
pub struct Attend {
    scale: f32,
    window: Option<i32>,
}

impl Attend {
    pub fn new(spec: &AttentionSpec) -> Self {
        Self { scale: spec.scale, window: spec.window.map(|window| window.min(i32::MAX as u32) as i32) }
    }

    /// `heads` with `B` = 1 and `L` new tokens -> `[1, heads, L, head_dim]`.
    pub fn forward(&self, heads: &Heads, cache: &mut KvCache) -> Result<Array, LmError> {
        let n = heads.queries.dim(2);
        // The oldest token that any of the new ones sees.
        let visible = self.window.map(|window| window.saturating_add(n - 1));
        let (keys, values) = cache.append(&heads.keys, &heads.values, visible)?;
        let held = keys.dim(2);
        let attend = |mask: Option<ScaledDotProductAttentionMask>| {
            fast::scaled_dot_product_attention(&heads.queries, &keys, &values, self.scale, mask, None)
        };
        Ok(match self.window {
            _ if n == 1 => attend(None)?,
            Some(window) if held > window => attend(Some(ScaledDotProductAttentionMask::Array(&window_mask(n, held, window)?)))?,
            _ => attend(Some(ScaledDotProductAttentionMask::Causal))?,
        })
    }
}

/// `[n, held]`: which of the held tokens each of the last `n` sees.
fn window_mask(n: i32, held: i32, window: i32) -> Result<Array, LmError> {
    let row = |from: i32, to: i32| Array::from_iter(from..to, &[to - from]);
    let queries = row(held - n, held).expand_dims(1)?;
    let keys = row(0, held).expand_dims(0)?;
    let causal = ops::le(&keys, &queries)?;
    let near = ops::gt(ops::add(&keys, Array::from_int(window))?, &queries)?;
    Ok(ops::logical_and(causal, near)?.as_dtype(Dtype::Bool)?)
}

/// What comes after the cache.
#[derive(Debug, Clone)]
pub struct Merge {
    output: Linear,
}

impl Merge {
    pub fn load(weights: &mut Weights, spec: &AttentionSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { output: Linear::load(weights, &spec.output, quantization)? })
    }

    /// `[B, heads, L, head_dim] -> [B, L, D]`.
    pub fn forward(&self, attended: &Array) -> Result<Array, LmError> {
        let (batch, length) = (attended.dim(0), attended.dim(2));
        self.output.forward(&attended.transpose_axes(&[0, 2, 1, 3])?.reshape(&[batch, length, -1])?)
    }
}

impl Parameters for Merge {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.output.each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.output.each_mut(visit);
    }
}

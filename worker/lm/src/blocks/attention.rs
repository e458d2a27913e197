//! Softmax attention with grouped queries, in three pieces: projections before the cache, attention over it, the output after it.

use super::{mixer::Projected, norm::Norm};
use crate::{
    cache::{KvCache, Reach, Seen, Window},
    error::LmError,
    ffi,
    linear::{Linear, Matrix},
    parameters::parameters,
    rope::Rope,
    weights::Weights,
};
use mlx_cluster_common::spec::{AttentionGate, AttentionSpec, HeadNorms, Projections, Quantization, TemperatureSpec, TensorSpec};
use mlx_rs::{Array, Dtype, fast, fast::ScaledDotProductAttentionMask, ops};

/// What comes before the cache: queries `[B, heads, L, head_dim]`, and keys and values `[B, kv_heads, L, head_dim]` where the layer has
/// its own; besides them the numbers that gate the output.
#[derive(Debug, Clone)]
pub(super) struct Project {
    shape: Shape,
    /// As the spec's projections name them.
    linears: Vec<Linear>,
    query_norm: Option<HeadNorm>,
    key_norm: Option<HeadNorm>,
    value_norm: Option<Norm>,
    rope: Option<Rope>,
    temperature: Option<TemperatureSpec>,
    head_gate: Option<Linear>,
}
parameters!(Project: linears, query_norm, key_norm, value_norm, rope, head_gate);

#[derive(Debug, Clone, Copy)]
struct Shape {
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    layout: Layout,
    /// The query projection gives a gate too.
    gate_in_query: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    Separate,
    Fused,
    FusedByGroup,
    KeyIsValue,
    QueryOnly,
}

/// Queries, keys and values `[B, L, heads, head_dim]` as they are projected.
struct Parts {
    queries: Array,
    gate: Option<Array>,
    keys_values: Option<(Array, Array)>,
}

impl Project {
    pub(super) fn load(weights: &mut Weights, spec: &AttentionSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let mut linears =
            |specs: &[&_]| -> Result<Vec<Linear>, LmError> { specs.iter().map(|spec| Linear::load(weights, spec, quantization)).collect() };
        let (layout, linears) = match &spec.projections {
            Projections::Separate { query, key, value } => (Layout::Separate, linears(&[query, key, value])?),
            Projections::Fused(linear) => (Layout::Fused, linears(&[linear])?),
            Projections::FusedByGroup(linear) => (Layout::FusedByGroup, linears(&[linear])?),
            Projections::KeyIsValue { query, key } => (Layout::KeyIsValue, linears(&[query, key])?),
            Projections::Shared { query, .. } => (Layout::QueryOnly, linears(&[query])?),
        };
        let (query_norm, key_norm) = HeadNorm::load(weights, &spec.head_norms, layout == Layout::QueryOnly)?;
        let head_gate = match &spec.gate {
            Some(AttentionGate::PerHead(linear)) => Some(Linear::load(weights, linear, quantization)?),
            _ => None,
        };
        let shape = Shape {
            n_heads: spec.n_heads as i32,
            n_kv_heads: spec.n_kv_heads as i32,
            head_dim: spec.head_dim as i32,
            layout,
            gate_in_query: spec.gate == Some(AttentionGate::InQuery),
        };
        Ok(Self {
            shape,
            linears,
            query_norm,
            key_norm,
            value_norm: Norm::load_optional(weights, &spec.value_norm.clone().filter(|_| layout != Layout::QueryOnly))?,
            rope: spec.rope.as_ref().map(Rope::new).transpose()?,
            temperature: spec.temperature.clone(),
            head_gate,
        })
    }

    /// Arrays for the cache, and arrays past it.
    pub(super) fn arity(&self) -> (usize, usize) {
        let mixed = if self.shape.layout == Layout::QueryOnly { 1 } else { 3 };
        (mixed, usize::from(self.shape.gate_in_query || self.head_gate.is_some()))
    }

    /// `x` `[B, L, D]`, whose row `b` starts at position `offsets[b]`.
    pub(super) fn forward(&self, x: &Array, offsets: &Array) -> Result<Projected, LmError> {
        let parts = self.parts(x)?;
        let rotated = |y: &Array, norm: &Option<HeadNorm>| -> Result<Array, LmError> {
            let y = norm.as_ref().map_or(Ok(y.clone()), |norm| norm.before_rope(y))?.transpose_axes(&[0, 2, 1, 3])?;
            let y = self.rope.as_ref().map_or(Ok(y.clone()), |rope| rope.forward(&y, offsets))?;
            norm.as_ref().map_or(Ok(y.clone()), |norm| norm.after_rope(&y))
        };
        let mut queries = rotated(&parts.queries, &self.query_norm)?;
        if let Some(temperature) = &self.temperature {
            queries = scale_by_position(&queries, offsets, temperature)?;
        }
        let mut mixed = vec![queries];
        if let Some((keys, values)) = &parts.keys_values {
            let values = self.value_norm.as_ref().map_or(Ok(values.clone()), |norm| norm.forward(values))?;
            mixed.extend([rotated(keys, &self.key_norm)?, values.transpose_axes(&[0, 2, 1, 3])?]);
        }
        let head_gate = self.head_gate.as_ref().map(|gate| gate.forward(x)).transpose()?;
        Ok(Projected { mixed, beside: parts.gate.into_iter().chain(head_gate).collect() })
    }

    fn parts(&self, x: &Array) -> Result<Parts, LmError> {
        let Shape { n_heads, n_kv_heads, head_dim, .. } = self.shape;
        let (batch, length) = (x.dim(0), x.dim(1));
        let projected = |i: usize| self.linears[i].forward(x);
        let heads = |y: &Array, n: i32| y.reshape(&[batch, length, n, -1]).map_err(LmError::from);
        let whole = |y: Array, norm: &Option<HeadNorm>| norm.as_ref().map_or(Ok(y.clone()), |norm| norm.whole(&y));
        let keys = |y: Array| heads(&whole(y, &self.key_norm)?, n_kv_heads);
        match self.shape.layout {
            Layout::Fused => {
                let (queries, keys_end) = (n_heads * head_dim, (n_heads + n_kv_heads) * head_dim);
                let parts = projected(0)?.split_at_indices(&[queries, keys_end], -1)?;
                let [query, key, value] = three(parts)?;
                let queries = heads(&whole(query, &self.query_norm)?, n_heads)?;
                Ok(Parts { queries, gate: None, keys_values: Some((keys(key)?, heads(&value, n_kv_heads)?)) })
            }
            Layout::FusedByGroup => {
                let grouped = projected(0)?.reshape(&[batch, length, n_kv_heads, n_heads / n_kv_heads + 2, head_dim])?;
                let repeats = n_heads / n_kv_heads;
                let [query, key, value] = three(grouped.split_at_indices(&[repeats, repeats + 1], -2)?)?;
                Ok(Parts {
                    queries: heads(&query.reshape(&[batch, length, -1])?, n_heads)?,
                    gate: None,
                    keys_values: Some((key.squeeze_axes(&[-2])?, value.squeeze_axes(&[-2])?)),
                })
            }
            Layout::Separate | Layout::KeyIsValue | Layout::QueryOnly => {
                let (queries, gate) = self.queries_and_gate(&whole(projected(0)?, &self.query_norm)?)?;
                let keys_values = match self.shape.layout {
                    Layout::Separate => Some((keys(projected(1)?)?, heads(&projected(2)?, n_kv_heads)?)),
                    Layout::KeyIsValue => Some(projected(1).and_then(|key| Ok((keys(key.clone())?, heads(&key, n_kv_heads)?)))?),
                    _ => None,
                };
                Ok(Parts { queries, gate, keys_values })
            }
        }
    }

    /// `[B, L, heads · head_dim]` or, with a gate, twice as wide: a head's query, then its gate.
    fn queries_and_gate(&self, y: &Array) -> Result<(Array, Option<Array>), LmError> {
        let (batch, length) = (y.dim(0), y.dim(1));
        let heads = y.reshape(&[batch, length, self.shape.n_heads, -1])?;
        if !self.shape.gate_in_query {
            return Ok((heads, None));
        }
        let parts = heads.split_equal(2, -1)?;
        Ok((parts[0].clone(), Some(parts[1].reshape(&[batch, length, -1])?)))
    }
}

fn three(parts: Vec<Array>) -> Result<[Array; 3], LmError> {
    <[Array; 3]>::try_from(parts).map_err(|parts| LmError::Mlx(format!("a split gave {} parts, wanted 3", parts.len())))
}

/// A norm of queries or keys, and where it stands.
#[derive(Debug, Clone)]
struct HeadNorm {
    norm: Norm,
    place: Place,
    /// Weights of each head's own, `[heads, head_dim]`, after an unweighted norm.
    weights: Option<Array>,
}
parameters!(HeadNorm: norm, weights);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Whole,
    BeforeRope,
    AfterRope,
}

impl HeadNorm {
    fn load(weights: &mut Weights, spec: &HeadNorms, query_only: bool) -> Result<(Option<Self>, Option<Self>), LmError> {
        let mut load = |norm: &_, place| Ok::<_, LmError>(Some(HeadNorm { norm: Norm::load(weights, norm)?, place, weights: None }));
        let (query, key, place) = match spec {
            HeadNorms::None => return Ok((None, None)),
            HeadNorms::PerHead { query, key } => (query, key, Place::BeforeRope),
            HeadNorms::PerHeadAfterRope { query, key } => (query, key, Place::AfterRope),
            HeadNorms::Whole { query, key } => (query, key, Place::Whole),
            HeadNorms::PerHeadWeights { norm, query, key } => {
                let norm = Norm::load(weights, norm)?;
                let mut own = |tensor: &TensorSpec| {
                    let weights = Some(weights.take(&tensor.name)?);
                    Ok::<_, LmError>(Some(HeadNorm { norm: norm.clone(), place: Place::BeforeRope, weights }))
                };
                return Ok((own(query)?, own(key)?));
            }
        };
        let query = load(query, place)?;
        Ok((query, if query_only { None } else { load(key, place)? }))
    }

    /// `[B, L, heads · head_dim]`
    fn whole(&self, y: &Array) -> Result<Array, LmError> {
        if self.place == Place::Whole { self.norm.forward(y) } else { Ok(y.clone()) }
    }

    /// `[B, L, heads, head_dim]`
    fn before_rope(&self, y: &Array) -> Result<Array, LmError> {
        match (self.place, &self.weights) {
            (Place::BeforeRope, None) => self.norm.forward(y),
            (Place::BeforeRope, Some(weights)) => Ok(ops::multiply(self.norm.forward(y)?, weights)?),
            _ => Ok(y.clone()),
        }
    }

    /// `[B, heads, L, head_dim]`
    fn after_rope(&self, y: &Array) -> Result<Array, LmError> {
        if self.place == Place::AfterRope { self.norm.forward(y) } else { Ok(y.clone()) }
    }
}

/// `queries` `[B, heads, L, dim]` times the temperature of their positions.
pub(super) fn scale_by_position(queries: &Array, offsets: &Array, spec: &TemperatureSpec) -> Result<Array, LmError> {
    let length = queries.dim(2);
    let steps = Array::from_iter(0..length, &[1, length]);
    let positions = ops::add(offsets.reshape(&[-1, 1])?, &steps)?.as_dtype(Dtype::Float32)?;
    let shifted = ops::add(&positions, Array::from_f32(spec.position_offset as f32))?;
    let periods = ops::floor(ops::divide(&shifted, Array::from_f32(spec.original_context as f32))?)?;
    let growth = ops::log(ops::add(&periods, Array::from_f32(1.0))?)?;
    let factors = ops::add(ops::multiply(&growth, Array::from_f32(spec.beta))?, Array::from_f32(1.0))?;
    let factors = factors.reshape(&[-1, 1, length, 1])?.as_dtype(queries.dtype())?;
    Ok(ops::multiply(queries, &factors)?)
}

/// Numbers that scores may take at once where they are held in memory.
const SCORES_MAX: i32 = 1 << 24;

/// Attention of one sequence's new tokens over all that its cache holds.
#[derive(Debug, Clone)]
pub struct Attend {
    scale: f32,
    softcap: Option<f32>,
    widens_f16: bool,
    sinks: Option<Array>,
}
parameters!(Attend: sinks);

impl Attend {
    /// Over all tokens before, with nothing special.
    pub(super) fn plain(scale: f32) -> Self {
        Self { scale, softcap: None, widens_f16: false, sinks: None }
    }

    pub fn load(weights: &mut Weights, spec: &AttentionSpec) -> Result<Self, LmError> {
        Ok(Self {
            scale: spec.scale,
            softcap: spec.softcap,
            widens_f16: spec.widens_f16,
            sinks: spec.sinks.as_ref().map(|sinks| weights.take(&sinks.name)).transpose()?,
        })
    }

    /// `rows` are what `Project` made, with `B` = 1 and `L` new tokens. With queries alone, the cache has the new tokens' keys already.
    /// Gives `[1, heads, L, head_dim]`.
    pub fn forward(&self, rows: &[Array], cache: &mut KvCache) -> Result<Array, LmError> {
        let queries = rows.first().ok_or_else(|| LmError::Mlx("attention without queries".into()))?;
        if let [_, keys, values] = rows {
            cache.extend(&[keys, values])?;
        }
        let dtype = queries.dtype();
        let queries = if self.widens_f16 && dtype == Dtype::Float16 { queries.as_dtype(Dtype::Float32)? } else { queries.clone() };
        let parts = cache.seen(queries.dim(2))?;
        if let [seen] = parts.as_slice() {
            return Ok(self.over(&queries, seen)?.as_dtype(dtype)?);
        }
        let (mut attended, mut from) = (Vec::with_capacity(parts.len()), 0);
        for seen in &parts {
            let own = ffi::slice(&queries, &[0, 0, from, 0], &[1, queries.dim(1), from + seen.reach().n, queries.dim(3)])?;
            attended.push(self.over(&own, seen)?);
            from += seen.reach().n;
        }
        Ok(ops::concatenate(&attended, 2)?.as_dtype(dtype)?)
    }

    fn over(&self, queries: &Array, seen: &Seen) -> Result<Array, LmError> {
        let reach = seen.reach();
        let Some((keys, values)) = seen.plain().filter(|_| self.softcap.is_none()) else {
            return self.by_scores(queries, seen);
        };
        let visible = if reach.is_whole() { None } else { Some(visible(&reach)?) };
        let mask = match &visible {
            Some(visible) => Some(ScaledDotProductAttentionMask::Array(visible)),
            None if reach.n > 1 => Some(ScaledDotProductAttentionMask::Causal),
            None => None,
        };
        Ok(fast::scaled_dot_product_attention(queries, keys, values, self.scale, mask, self.sinks.as_ref())?)
    }

    /// Scores of a long prompt's queries are large all at once: they are made for some queries at a time.
    fn by_scores(&self, queries: &Array, seen: &Seen) -> Result<Array, LmError> {
        let (reach, heads) = (seen.reach(), queries.dim(1));
        let Reach { n, held, .. } = reach;
        let (keys, values) = seen.matrices()?;
        let mask = (n > 1).then(|| visible(&reach)).transpose()?;
        let n_block = (SCORES_MAX / (heads * held).max(1)).clamp(1, n);
        if n_block == n {
            return self.attend(queries, seen.kv_heads(), [&keys, &values], mask.as_ref());
        }
        let blocks = (0..n).step_by(n_block as usize).map(|from| {
            let to = (from + n_block).min(n);
            let queries = ffi::slice(queries, &[0, 0, from, 0], &[1, heads, to, queries.dim(3)])?;
            let mask = mask.as_ref().map(|mask| ffi::slice(mask, &[from, 0], &[to, held])).transpose()?;
            self.attend(&queries, seen.kv_heads(), [&keys, &values], mask.as_ref())
        });
        Ok(ops::concatenate(&blocks.collect::<Result<Vec<_>, _>>()?, 2)?)
    }

    /// Attention in single operations, in mlx-lm's order: over quantised keys and values, and with a soft cap on the scores.
    fn attend(&self, queries: &Array, kv_heads: i32, held: [&Matrix; 2], mask: Option<&Array>) -> Result<Array, LmError> {
        let [keys, values] = held;
        let scalar = |value: f32, like: &Array| Array::from_f32(value).as_dtype(like.dtype());
        let (heads, n) = (queries.dim(1), queries.dim(2));
        let groups = [1, kv_heads, heads / kv_heads.max(1), n, -1];
        let scores = keys.apply_each(&ops::multiply(queries, scalar(self.scale, queries)?)?.reshape(&groups)?, true)?;
        let scores = match self.softcap {
            Some(softcap) => {
                let softcap = scalar(softcap, &scores)?;
                ops::multiply(ops::tanh(ops::divide(&scores, &softcap)?)?, &softcap)?
            }
            None => scores,
        };
        let scores = match mask {
            Some(mask) => ops::select(mask, &scores, lowest(scores.dtype())?)?,
            None => scores,
        };
        let weights = match &self.sinks {
            Some(sinks) => softmax_with_sinks(&scores, sinks)?,
            None => ops::softmax_axis(&scores, -1, true)?,
        };
        Ok(values.apply_each(&weights, false)?.reshape(&[1, heads, n, -1])?)
    }
}

/// Softmax over scores `[1, kv_heads, group, n, held]` and one more logit a head `[heads]`, whose share is dropped.
fn softmax_with_sinks(scores: &Array, sinks: &Array) -> Result<Array, LmError> {
    let [batch, kv_heads, group, n, held] = *scores.shape() else {
        return Err(LmError::Mlx(format!("scores of shape {:?}", scores.shape())));
    };
    let sinks = sinks.as_dtype(scores.dtype())?.reshape(&[1, kv_heads, group, 1, 1])?;
    let sinks = ops::broadcast_to(&sinks, &[batch, kv_heads, group, n, 1])?;
    let weights = ops::softmax_axis(ops::concatenate(&[scores.clone(), sinks], -1)?, -1, true)?;
    ffi::slice(&weights, &[0; 5], &[batch, kv_heads, group, n, held])
}

/// How far the cache has to reach back.
pub(super) fn window_of(spec: &AttentionSpec) -> Option<i32> {
    spec.window.map(|window| window.min(i32::MAX as u32 / 2) as i32)
}

/// `[n, held]`: which of the held tokens each of the last `n` sees.
pub(super) fn visible(reach: &Reach) -> Result<Array, LmError> {
    let (n, held) = (reach.n, reach.held);
    match reach.window.filter(|_| !reach.is_whole()) {
        None => causal_mask(n, held),
        Some(Window { kept: 0, recent }) => window_mask(n, held, recent),
        Some(Window { kept, recent }) => {
            let is_kept = Array::from_iter((0..held).map(|token| token < kept), &[1, held]);
            Ok(ops::logical_or(ops::logical_and(is_kept, causal_mask(n, held)?)?, window_mask(n, held, recent)?)?)
        }
    }
}

/// The most negative number of a type.
pub(super) fn lowest(dtype: Dtype) -> Result<Array, LmError> {
    let value = if dtype == Dtype::Float16 { -65504.0 } else { f32::MIN };
    // The lowest f32 would round to minus infinity in bf16.
    let value = if dtype == Dtype::Bfloat16 { -3.389_531_4e38 } else { value };
    Ok(Array::from_f32(value).as_dtype(dtype)?)
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

/// `[n, held]`: the last `n` of the held tokens each see themselves and all before.
fn causal_mask(n: i32, held: i32) -> Result<Array, LmError> {
    let row = |from: i32, to: i32| Array::from_iter(from..to, &[to - from]);
    Ok(ops::le(row(0, held).expand_dims(0)?, row(held - n, held).expand_dims(1)?)?)
}

/// What comes after the cache.
#[derive(Debug, Clone)]
pub(super) struct Merge {
    output: Linear,
    gate: Option<Gate>,
}
parameters!(Merge: output);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Gate {
    Elementwise,
    PerHead,
}

impl Merge {
    pub(super) fn plain(output: Linear) -> Self {
        Self { output, gate: None }
    }

    pub(super) fn load(weights: &mut Weights, spec: &AttentionSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let gate = spec.gate.as_ref().map(|gate| match gate {
            AttentionGate::InQuery => Gate::Elementwise,
            AttentionGate::PerHead(_) => Gate::PerHead,
        });
        Ok(Self { output: Linear::load(weights, &spec.output, quantization)?, gate })
    }

    /// `[B, heads, L, head_dim] -> [B, L, D]`; `beside` is the gate `[B, L, heads · head_dim]` or `[B, L, heads]`.
    pub(super) fn forward(&self, attended: &Array, beside: &[Array]) -> Result<Array, LmError> {
        let (batch, length) = (attended.dim(0), attended.dim(2));
        let by_token = attended.transpose_axes(&[0, 2, 1, 3])?;
        let flat = |y: &Array| y.reshape(&[batch, length, -1]);
        let gated = match (self.gate, beside) {
            (Some(Gate::Elementwise), [gate]) => ops::multiply(flat(&by_token)?, ops::sigmoid(gate)?)?,
            (Some(Gate::PerHead), [gate]) => flat(&ops::multiply(&by_token, ops::sigmoid(gate)?.expand_dims(-1)?)?)?,
            _ => flat(&by_token)?,
        };
        self.output.forward(&gated)
    }
}

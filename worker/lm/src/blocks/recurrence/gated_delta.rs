//! Linear attention by the gated delta rule behind a short convolution (Yang et al. 2024).

use super::{convolution::Convolution, delta_rule::Tokens, only};
use crate::{
    blocks::{mixer::Projected, norm::Norm},
    error::LmError,
    linear::Linear,
    parameters::parameters,
    weights::Weights,
};
use mlx_cluster_common::spec::{GatedDeltaProjections, GatedDeltaSpec, Quantization};
use mlx_rs::{Array, Dtype, fast, nn, ops};

/// What is added to the squared length of queries and keys before they are divided by it.
const LENGTH_EPS: f32 = 1e-6;

#[derive(Debug, Clone, Copy)]
struct Shape {
    n_key_heads: i32,
    /// Value heads that share a key head.
    groups: i32,
    key_dim: i32,
    value_dim: i32,
}

/// Before the state: queries, keys and values side by side, the logarithm of the decay and the learning rate go to it, `z` past it.
#[derive(Debug, Clone)]
pub(crate) struct GatedDeltaProject {
    shape: Shape,
    /// As the spec's projections name them.
    linears: Vec<Linear>,
    dt_bias: Array,
    a_log: Array,
}
parameters!(GatedDeltaProject: linears, dt_bias, a_log);

#[derive(Debug, Clone)]
pub struct GatedDelta {
    shape: Shape,
    convolution: Convolution,
}
parameters!(GatedDelta: convolution);

#[derive(Debug, Clone)]
pub(crate) struct GatedDeltaMerge {
    value_dim: i32,
    norm: Norm,
    output: Linear,
}
parameters!(GatedDeltaMerge: norm, output);

impl Shape {
    fn of(spec: &GatedDeltaSpec) -> Self {
        Self {
            n_key_heads: spec.n_key_heads as i32,
            groups: (spec.n_value_heads / spec.n_key_heads) as i32,
            key_dim: spec.key_dim as i32,
            value_dim: spec.value_dim as i32,
        }
    }
}

impl GatedDeltaProject {
    pub(in crate::blocks) const ARITY: (usize, usize) = (3, 1);

    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &GatedDeltaSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let linears: &[_] = match &spec.projections {
            GatedDeltaProjections::ByKeyHead { qkvz, ba } => &[qkvz, ba],
            GatedDeltaProjections::Separate { qkv, z, b, a } => &[qkv, z, b, a],
        };
        Ok(Self {
            shape: Shape::of(spec),
            linears: linears.iter().map(|linear| Linear::load(weights, linear, quantization)).collect::<Result<_, _>>()?,
            dt_bias: weights.take(&spec.dt_bias.name)?,
            a_log: weights.take(&spec.a_log.name)?,
        })
    }

    pub(in crate::blocks) fn forward(&self, x: &Array) -> Result<Projected, LmError> {
        let [qkv, z, b, a] = match self.linears.as_slice() {
            [qkvz, ba] => self.by_key_head(&qkvz.forward(x)?, &ba.forward(x)?)?,
            [qkv, z, b, a] => [qkv.forward(x)?, z.forward(x)?, b.forward(x)?, a.forward(x)?],
            _ => return Err(LmError::Mlx("the gated delta rule has two or four linears".into())),
        };
        let step = nn::softplus(ops::add(a, &self.dt_bias)?)?;
        let log_decay = ops::multiply(ops::exp(self.a_log.as_dtype(Dtype::Float32)?)?.negative()?, step)?;
        Ok(Projected { mixed: vec![qkv, log_decay, ops::sigmoid(b)?], beside: vec![z] })
    }

    /// Takes apart what is there for each key head.
    fn by_key_head(&self, qkvz: &Array, ba: &Array) -> Result<[Array; 4], LmError> {
        let Shape { n_key_heads, groups, key_dim, value_dim } = self.shape;
        let (batch, length) = (qkvz.dim(0), qkvz.dim(1));
        let parts = |y: &Array, ends: &[i32]| y.reshape(&[batch, length, n_key_heads, -1])?.split_at_indices(ends, -1);
        let flat = |y: &Array| y.reshape(&[batch, length, -1]);
        let (keys, values) = (2 * key_dim, 2 * key_dim + groups * value_dim);
        let qkvz = parts(qkvz, &[key_dim, keys, values])?.iter().map(flat).collect::<Result<Vec<_>, _>>()?;
        let ba = parts(ba, &[groups])?;
        Ok([ops::concatenate(&qkvz[..3], -1)?, qkvz[3].clone(), flat(&ba[0])?, flat(&ba[1])?])
    }
}

impl GatedDelta {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &GatedDeltaSpec) -> Result<Self, LmError> {
        Ok(Self { shape: Shape::of(spec), convolution: Convolution::load(weights, &spec.convolution)? })
    }

    /// The convolution's past, and `[key heads, groups, key_dim, value_dim]`.
    pub(super) fn initial_state(&self, dtype: Dtype) -> Result<Vec<Array>, LmError> {
        let Shape { n_key_heads, groups, key_dim, value_dim } = self.shape;
        let memory = ops::zeros::<f32>(&[n_key_heads, groups, key_dim, value_dim])?;
        Ok(vec![self.convolution.initial_state(dtype)?, memory])
    }

    pub(super) fn step(&self, rows: &[Array], state: &[Array]) -> Result<(Array, Vec<Array>), LmError> {
        let ([qkv, log_decay, beta], [past, memory]) = (rows, state) else {
            return Err(LmError::Mlx(format!("the gated delta rule got {} arrays and {} of its state", rows.len(), state.len())));
        };
        let Shape { n_key_heads, groups, key_dim, value_dim } = self.shape;
        let n = qkv.dim(1);
        let (convolved, past) = self.convolution.forward(qkv, past)?;
        let convolved = nn::silu(convolved)?;
        let keys_end = 2 * n_key_heads * key_dim;
        let parts = convolved.split_at_indices(&[keys_end / 2, keys_end], -1)?;
        let exact = |y: &Array, shape: &[i32]| y.as_dtype(Dtype::Float32)?.reshape(shape);
        let by_key_head = |y: &Array, scale: f32| -> Result<Array, LmError> {
            let heads = y.reshape(&[n, n_key_heads, key_dim])?;
            // Divided by the length: the norm divides by the root of the mean, not of the sum.
            let norm = fast::rms_norm(heads, None, LENGTH_EPS / key_dim as f32)?;
            Ok(ops::multiply(&norm, Array::from_f32(scale).as_dtype(norm.dtype())?)?.as_dtype(Dtype::Float32)?)
        };
        let unit = (key_dim as f32).powf(-0.5);
        let tokens = Tokens {
            queries: by_key_head(&parts[0], unit * unit)?,
            keys: by_key_head(&parts[1], unit)?,
            values: exact(&parts[2], &[n, n_key_heads, groups, value_dim])?,
            log_decay: exact(log_decay, &[n, n_key_heads, groups])?,
            beta: exact(beta, &[n, n_key_heads, groups])?,
        };
        let (y, memory) = tokens.forward(memory)?;
        Ok((y.as_dtype(qkv.dtype())?.reshape(&[1, n, -1])?, vec![past, memory]))
    }
}

impl GatedDeltaMerge {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &GatedDeltaSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            value_dim: spec.value_dim as i32,
            norm: Norm::load(weights, &spec.norm)?,
            output: Linear::load(weights, &spec.output, quantization)?,
        })
    }

    /// `output(norm(y) · silu(z))`; `beside` is `z`.
    pub(in crate::blocks) fn forward(&self, y: &Array, beside: &[Array]) -> Result<Array, LmError> {
        let z = only(beside)?;
        let heads = y.reshape(&[y.dim(0), y.dim(1), -1, self.value_dim])?;
        let normed = self.norm.forward(&heads)?.as_dtype(Dtype::Float32)?.reshape(y.shape())?;
        let gated = ops::multiply(nn::silu(z.as_dtype(Dtype::Float32)?)?, normed)?;
        self.output.forward(&gated.as_dtype(y.dtype())?)
    }
}

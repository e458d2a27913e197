//! State space duality (Dao and Gu 2024), Mamba 2: behind a short convolution, a state a head decays and takes in each token.

use super::{convolution::Convolution, gated_norm::GatedNorm, only};
use crate::{blocks::mixer::Projected, error::LmError, ffi, linear::Linear, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::{AfterConvolutionSpec, Quantization, StateSpaceInputs, StateSpaceSpec};
use mlx_rs::{Array, Dtype, fast, nn, ops};

/// Tokens that are mixed at once by matrix products, as in mlx-lm; between such chunks only the state is passed on.
const CHUNK: i32 = 256;

/// Before the state: what the convolution takes, and the time steps where they do not come from it; the gate goes past it.
#[derive(Debug, Clone)]
pub(in crate::blocks) struct StateSpaceProject {
    input: Linear,
    layout: InputLayout,
}
parameters!(StateSpaceProject: input);

#[derive(Debug, Clone, Copy)]
enum InputLayout {
    /// The gate, what the convolution takes, the time steps.
    Joint { inner: i32, convolved: i32 },
    /// The gate and x of each head.
    ByHead { n_heads: i32 },
}

impl StateSpaceProject {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &StateSpaceSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let (input, layout) = match &spec.inputs {
            StateSpaceInputs::Joint(linear) => {
                let inner = (spec.n_heads * spec.head_dim) as i32;
                (linear, InputLayout::Joint { inner, convolved: spec.convolution.channels as i32 })
            }
            StateSpaceInputs::AfterConvolution { gate_and_x, .. } => (gate_and_x, InputLayout::ByHead { n_heads: spec.n_heads as i32 }),
        };
        Ok(Self { input: Linear::load(weights, input, quantization)?, layout })
    }

    /// Arrays for the state, and arrays past it.
    pub(in crate::blocks) fn arity(&self) -> (usize, usize) {
        match self.layout {
            InputLayout::Joint { .. } => (2, 1),
            InputLayout::ByHead { .. } => (1, 1),
        }
    }

    pub(in crate::blocks) fn forward(&self, x: &Array) -> Result<Projected, LmError> {
        let projected = self.input.forward(x)?;
        match self.layout {
            InputLayout::Joint { inner, convolved } => {
                let [gate, input, dt] = super::three(projected.split_at_indices(&[inner, inner + convolved], -1)?)?;
                Ok(Projected { mixed: vec![input, dt], beside: vec![gate] })
            }
            InputLayout::ByHead { n_heads } => {
                let (batch, length) = (x.dim(0), x.dim(1));
                let parts = projected.reshape(&[batch, length, n_heads, -1])?.split_equal(2, -1)?;
                let flat = |y: &Array| y.reshape(&[batch, length, -1]);
                Ok(Projected { mixed: vec![flat(&parts[1])?], beside: vec![flat(&parts[0])?] })
            }
        }
    }
}

/// At the state: the inputs of the last tokens, and `[1, groups, state_dim, heads of a group · head_dim]` in f32, so that a group's heads,
/// which share B and C, go through one matrix product.
#[derive(Debug, Clone)]
pub struct StateSpace {
    convolution: Convolution,
    after_convolution: Option<AfterConvolution>,
    dt_bias: Array,
    a_log: Array,
    d: Array,
    time_step_limit: (f32, f32),
    sizes: Sizes,
}
parameters!(StateSpace: convolution, after_convolution, dt_bias, a_log, d);

#[derive(Debug, Clone, Copy)]
struct Sizes {
    groups: i32,
    /// Of a group.
    heads: i32,
    head_dim: i32,
    state_dim: i32,
}

/// B, C and the time steps, made from x.
#[derive(Debug, Clone)]
struct AfterConvolution {
    bcdt: Linear,
    dt: Linear,
    dt_norm: Array,
    b_norm: Array,
    c_norm: Array,
    eps: f32,
}
parameters!(AfterConvolution: bcdt, dt, dt_norm, b_norm, c_norm);

/// What the tokens of one sequence bring: for each group `u` `[1, groups, n, heads · head_dim]` (x times its time step) and the logarithms
/// of the decays `[1, groups, heads, n]` in f32, `b` and `c` `[1, groups, n, state_dim]` in the stream's type.
struct Tokens {
    u: Array,
    log_decay: Array,
    b: Array,
    c: Array,
}

impl StateSpace {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &StateSpaceSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let after_convolution = match &spec.inputs {
            StateSpaceInputs::Joint(_) => None,
            StateSpaceInputs::AfterConvolution { rest, .. } => Some(AfterConvolution::load(weights, rest, quantization)?),
        };
        Ok(Self {
            convolution: Convolution::load(weights, &spec.convolution)?,
            after_convolution,
            dt_bias: weights.take(&spec.dt_bias.name)?,
            a_log: weights.take(&spec.a_log.name)?,
            d: weights.take(&spec.d.name)?,
            time_step_limit: spec.time_step_limit,
            sizes: Sizes {
                groups: spec.n_groups as i32,
                heads: (spec.n_heads / spec.n_groups) as i32,
                head_dim: spec.head_dim as i32,
                state_dim: spec.state_dim as i32,
            },
        })
    }

    pub(super) fn initial_state(&self, dtype: Dtype) -> Result<Vec<Array>, LmError> {
        let Sizes { groups, heads, head_dim, state_dim } = self.sizes;
        let state = ops::zeros_dtype(&[1, groups, state_dim, heads * head_dim], Dtype::Float32)?;
        Ok(vec![self.convolution.initial_state(dtype)?, state])
    }

    pub(super) fn step(&self, rows: &[Array], state: &[Array]) -> Result<(Array, Vec<Array>), LmError> {
        let ([input, rest @ ..], [past, state]) = (rows, state) else {
            return Err(LmError::Mlx(format!("a state space got {} arrays over {} of its state", rows.len(), state.len())));
        };
        let (convolved, past) = self.convolution.forward(input, past)?;
        let convolved = nn::silu(convolved)?;
        let (x, b, c, dt) = match &self.after_convolution {
            None => {
                let Sizes { groups, heads, head_dim, state_dim } = self.sizes;
                let (inner, width) = (groups * heads * head_dim, groups * state_dim);
                let [x, b, c] = super::three(convolved.split_at_indices(&[inner, inner + width], -1)?)?;
                (x, b, c, only(rest)?.clone())
            }
            Some(inputs) => {
                let [b, c, dt] = inputs.forward(&convolved, self.sizes.state_dim)?;
                (convolved, b, c, dt)
            }
        };
        let tokens = self.tokens(&x, &b, &c, &dt)?;
        let (y, state) = if x.dim(1) == 1 { self.one_token(&tokens, state)? } else { self.chunks(&tokens, state)? };
        let heads = [1, x.dim(1), self.sizes.groups * self.sizes.heads, self.sizes.head_dim];
        let skipped = ops::multiply(x.reshape(&heads)?, self.d.as_dtype(x.dtype())?.expand_dims(-1)?)?;
        let y = y.transpose_axes(&[0, 2, 1, 3])?.reshape(&heads)?.as_dtype(x.dtype())?;
        Ok((ops::add(y, skipped)?.reshape(x.shape())?, vec![past, state]))
    }

    /// `x` `[1, n, inner]`, `b` and `c` `[1, n, groups · state_dim]`, `dt` `[1, n, n_heads]` before bias and softplus.
    fn tokens(&self, x: &Array, b: &Array, c: &Array, dt: &Array) -> Result<Tokens, LmError> {
        let Sizes { groups, heads, head_dim, state_dim } = self.sizes;
        let n = x.dim(1);
        let dt = nn::softplus(ops::add(dt.as_dtype(Dtype::Float32)?, &self.dt_bias)?)?;
        let (least, most) = self.time_step_limit;
        let dt = match (least, most) {
            (0.0, f32::INFINITY) => dt,
            _ => ops::clip(dt, (&Array::from_f32(least), &Array::from_f32(most)))?,
        };
        let a = ops::exp(self.a_log.as_dtype(Dtype::Float32)?)?.negative()?;
        let u = ops::multiply(dt.expand_dims(-1)?, x.reshape(&[1, n, groups * heads, head_dim])?)?;
        let by_group = |y: &Array, width: i32| y.reshape(&[1, n, groups, width])?.transpose_axes(&[0, 2, 1, 3]);
        Ok(Tokens {
            u: by_group(&u, heads * head_dim)?,
            log_decay: ops::multiply(&dt, a)?.reshape(&[1, n, groups, heads])?.transpose_axes(&[0, 2, 3, 1])?,
            b: by_group(b, state_dim)?,
            c: by_group(c, state_dim)?,
        })
    }

    /// `state · exp(decay) + b ⊗ u`, of which `c` reads.
    fn one_token(&self, tokens: &Tokens, state: &Array) -> Result<(Array, Array), LmError> {
        let decay = self.over_heads(&ops::exp(&tokens.log_decay)?.swap_axes(-1, -2)?)?;
        let taken_in = ops::multiply(tokens.b.swap_axes(-1, -2)?, &tokens.u)?;
        let state = ops::add(ops::multiply(state, decay)?, taken_in)?;
        Ok((ops::matmul(&tokens.c, &state)?, state))
    }

    fn chunks(&self, tokens: &Tokens, state: &Array) -> Result<(Array, Array), LmError> {
        let n = tokens.u.dim(2);
        let (mut outputs, mut state) = (Vec::new(), state.clone());
        for start in (0..n).step_by(CHUNK as usize) {
            let (y, next) = self.chunk(&tokens.span(start, n.min(start + CHUNK))?, &state)?;
            outputs.push(y);
            state = next;
        }
        let y = if outputs.len() == 1 { outputs.swap_remove(0) } else { ops::concatenate(&outputs, 2)? };
        Ok((y, state))
    }

    /// Inside a chunk as attention without softmax, whose scores decay with the distance (section 6 of the paper); over the state before it
    /// as one product.
    fn chunk(&self, tokens: &Tokens, state: &Array) -> Result<(Array, Array), LmError> {
        let Tokens { u, log_decay, b, c } = tokens;
        let Sizes { groups, heads, head_dim, .. } = self.sizes;
        let n = u.dim(2);
        let decay = decays_between(log_decay)?;
        let scores = ops::matmul(c, b.swap_axes(-1, -2)?)?.expand_dims(2)?;
        let scores = ops::tril(ops::multiply(scores, &decay)?, 0)?;
        let by_head = u.reshape(&[1, groups, n, heads, head_dim])?.transpose_axes(&[0, 1, 3, 2, 4])?;
        let inside = ops::matmul(scores, by_head)?.transpose_axes(&[0, 1, 3, 2, 4])?.reshape(&[1, groups, n, heads * head_dim])?;

        // From before the chunk to each token, and from each token to the end of the chunk.
        let since_start = self.over_heads(&ops::exp(log_decay.cumsum(-1, None, None)?)?.swap_axes(-1, -2)?)?;
        let to_end = ffi::slice(&decay, &[0, 0, 0, n - 1, 0], &[1, groups, heads, n, n])?.squeeze_axes(&[3])?;
        let to_end = self.over_heads(&to_end.swap_axes(-1, -2)?)?;
        let y = ops::add(inside, ops::multiply(since_start.clone(), ops::matmul(c, state)?)?)?;
        let whole = ffi::slice(&since_start, &[0, 0, n - 1, 0], &[1, groups, n, heads * head_dim])?;
        let taken_in = ops::matmul(b.swap_axes(-1, -2)?, ops::multiply(u, to_end)?)?;
        Ok((y, ops::add(ops::multiply(state, whole)?, taken_in)?))
    }

    /// `[1, groups, n, heads] -> [1, groups, n, heads · head_dim]`
    fn over_heads(&self, y: &Array) -> Result<Array, LmError> {
        let Sizes { groups, heads, head_dim, .. } = self.sizes;
        let n = y.dim(2);
        let wide = ops::broadcast_to(y.expand_dims(-1)?, &[1, groups, n, heads, head_dim])?;
        Ok(wide.reshape(&[1, groups, n, heads * head_dim])?)
    }
}

impl AfterConvolution {
    fn load(weights: &mut Weights, spec: &AfterConvolutionSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            bcdt: Linear::load(weights, &spec.bcdt, quantization)?,
            dt: Linear::load(weights, &spec.dt, quantization)?,
            dt_norm: weights.take(&spec.dt_norm.name)?,
            b_norm: weights.take(&spec.b_norm.name)?,
            c_norm: weights.take(&spec.c_norm.name)?,
            eps: spec.eps,
        })
    }

    /// `x` `[1, n, inner]`: b, c and the time steps.
    fn forward(&self, x: &Array, state_dim: i32) -> Result<[Array; 3], LmError> {
        let [b, c, dt] = super::three(self.bcdt.forward(x)?.split_at_indices(&[state_dim, 2 * state_dim], -1)?)?;
        let normed = |y: &Array, weight: &Array| fast::rms_norm(y, Some(weight), self.eps);
        Ok([normed(&b, &self.b_norm)?, normed(&c, &self.c_norm)?, self.dt.forward(&normed(&dt, &self.dt_norm)?)?])
    }
}

impl Tokens {
    fn span(&self, start: i32, stop: i32) -> Result<Self, LmError> {
        let rows = |y: &Array| ffi::slice(y, &[0, 0, start, 0], &[1, y.dim(1), stop, y.dim(3)]);
        let log_decay = ffi::slice(&self.log_decay, &[0, 0, 0, start], &[1, self.log_decay.dim(1), self.log_decay.dim(2), stop])?;
        Ok(Self { u: rows(&self.u)?, log_decay, b: rows(&self.b)?, c: rows(&self.c)? })
    }
}

/// `[.., n] -> [.., n, n]`: how much is left at token `i` of what token `j` brought; 1 where `j >= i`. The sums are made for each pair, since
/// differences of running sums lose digits where steps are long.
fn decays_between(log_decay: &Array) -> Result<Array, LmError> {
    let n = log_decay.dim(-1);
    let shape = [log_decay.shape(), &[n]].concat();
    let later = ops::tril(ops::broadcast_to(log_decay.expand_dims(-1)?, &shape)?, -1)?;
    Ok(ops::exp(later.cumsum(-2, None, None)?)?)
}

/// After the state: the gate, a norm, the output.
#[derive(Debug, Clone)]
pub(in crate::blocks) struct StateSpaceMerge {
    gated_norm: GatedNorm,
    output: Linear,
}
parameters!(StateSpaceMerge: gated_norm, output);

impl StateSpaceMerge {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &StateSpaceSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { gated_norm: GatedNorm::load(weights, &spec.gated_norm)?, output: Linear::load(weights, &spec.output, quantization)? })
    }

    /// `beside` is the gate.
    pub(in crate::blocks) fn forward(&self, y: &Array, beside: &[Array]) -> Result<Array, LmError> {
        self.output.forward(&self.gated_norm.forward(y, only(beside)?)?)
    }
}

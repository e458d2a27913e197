//! State space duality (Dao and Gu 2024): behind a short convolution, a state a head decays and takes in each token.

use super::{convolution::Convolution, fused::Fused, gated_norm::GatedNorm, only};
use crate::{blocks::mixer::Projected, error::LmError, ffi, linear::Linear, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::{AfterConvolutionSpec, CHUNK_TOKENS, Quantization, StateSpaceInputs, StateSpaceSpec};
use mlx_rs::{Array, Dtype, error::Exception, fast, nn, ops};

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

/// What tokens bring, in chunks of the same length `n`: for each group `u` `[chunks, groups, n, heads · head_dim]` (x times its time step) and
/// the logarithms of the decays `[chunks, groups, heads, n]` in f32, `b` and `c` `[chunks, groups, n, state_dim]` in the stream's type.
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
        let dt = self.time_steps(&dt)?;
        let (y, state) = match x.dim(1) {
            1 => self.one_token(&self.tokens([&x, &b, &c, &dt], 1)?, state)?,
            _ => self.all(&x, [&b, &c, &dt], state)?,
        };
        let heads = [1, x.dim(1), self.d.dim(0), self.sizes.head_dim];
        let skipped = ops::multiply(x.reshape(&heads)?, self.d.as_dtype(x.dtype())?.expand_dims(-1)?)?;
        let y = ops::add(y.reshape(&heads)?.as_dtype(x.dtype())?, skipped)?;
        Ok((y.reshape(x.shape())?, vec![past, state]))
    }

    /// In f32.
    fn time_steps(&self, dt: &Array) -> Result<Array, LmError> {
        let dt = nn::softplus(ops::add(dt.as_dtype(Dtype::Float32)?, &self.dt_bias)?)?;
        Ok(match self.time_step_limit {
            (0.0, f32::INFINITY) => dt,
            (least, most) => ops::clip(dt, (&Array::from_f32(least), &Array::from_f32(most)))?,
        })
    }

    /// x `[1, tokens, inner]`, b and c `[1, tokens, groups · state_dim]` and time steps `[1, tokens, n_heads]`.
    fn tokens(&self, [x, b, c, dt]: [&Array; 4], chunks: i32) -> Result<Tokens, LmError> {
        let Sizes { groups, heads, head_dim, state_dim } = self.sizes;
        let n = x.dim(1) / chunks;
        let a = ops::exp(self.a_log.as_dtype(Dtype::Float32)?)?.negative()?;
        let u = ops::multiply(dt.expand_dims(-1)?, x.reshape(&[1, x.dim(1), groups * heads, head_dim])?)?;
        let by_group = |y: &Array, width: i32| y.reshape(&[chunks, n, groups, width])?.transpose_axes(&[0, 2, 1, 3]);
        Ok(Tokens {
            u: by_group(&u, heads * head_dim)?,
            log_decay: ops::multiply(dt, a)?.reshape(&[chunks, n, groups, heads])?.transpose_axes(&[0, 2, 3, 1])?,
            b: by_group(b, state_dim)?,
            c: by_group(c, state_dim)?,
        })
    }

    /// `state · exp(decay) + b ⊗ u`, of which `c` reads.
    fn one_token(&self, tokens: &Tokens, state: &Array) -> Result<(Array, Array), LmError> {
        let taken_in = ops::multiply(tokens.b.swap_axes(-1, -2)?, &tokens.u)?;
        let decay = ops::exp(tokens.log_decay.swap_axes(-1, -2)?)?;
        let state = ops::add(self.times(state, &decay)?, taken_in)?;
        Ok((ops::matmul(&tokens.c, &state)?, state))
    }

    /// Whole chunks at once, then what is left: so a token's numbers do not depend on how many come after it.
    fn all(&self, x: &Array, [b, c, dt]: [&Array; 3], state: &Array) -> Result<(Array, Array), LmError> {
        let (n, chunk) = (x.dim(1), CHUNK_TOKENS as i32);
        let whole = n / chunk * chunk;
        let (mut outputs, mut state) = (Vec::new(), state.clone());
        for (start, stop, chunks) in [(0, whole, n / chunk), (whole, n, 1)] {
            if start < stop {
                let rows = |y: &Array| ffi::slice(y, &[0, start, 0], &[1, stop, y.dim(2)]);
                let (y, next) = self.chunks(&self.tokens([&rows(x)?, &rows(b)?, &rows(c)?, &rows(dt)?], chunks)?, &state)?;
                outputs.push(y.transpose_axes(&[0, 2, 1, 3])?.reshape(&[1, stop - start, -1])?);
                state = next;
            }
        }
        let y = if outputs.len() == 1 { outputs.swap_remove(0) } else { ops::concatenate(&outputs, 1)? };
        Ok((y, state))
    }

    /// Inside a chunk as attention without softmax, whose scores decay with the distance (section 6 of the paper); between chunks the state
    /// is passed on.
    fn chunks(&self, tokens: &Tokens, state: &Array) -> Result<(Array, Array), LmError> {
        let Tokens { u, log_decay, b, c } = tokens;
        let Sizes { groups, heads, head_dim, .. } = self.sizes;
        let (chunks, n) = (u.dim(0), u.dim(2));
        let between = log_decays_between(log_decay)?;
        let scores = ops::matmul(c, b.swap_axes(-1, -2)?)?.expand_dims(2)?;
        let scores = DECAYED.with(|decayed| decayed.call(&[scores, between.clone(), causal(n)?]))?;
        let by_head = u.reshape(&[chunks, groups, n, heads, head_dim])?.transpose_axes(&[0, 1, 3, 2, 4])?;
        let inside = ops::matmul(scores, by_head)?.transpose_axes(&[0, 1, 3, 2, 4])?.reshape(u.shape())?;

        // From before the chunk to each token, and from each token to the end of the chunk: `[chunks, groups, n, heads]`.
        let since_start = ops::exp(log_decay.cumsum(-1, None, None)?)?.swap_axes(-1, -2)?;
        let to_end = ffi::slice(&between, &[0, 0, 0, n - 1, 0], &[chunks, groups, heads, n, n])?;
        let to_end = ops::exp(to_end.squeeze_axes(&[3])?)?.swap_axes(-1, -2)?;
        let taken_in = ops::matmul(b.swap_axes(-1, -2)?, self.times(u, &to_end)?)?;
        let kept = ffi::slice(&since_start, &[0, 0, n - 1, 0], &[chunks, groups, n, heads])?;
        let (starts, state) = self.pass_on(state, &kept, &taken_in)?;
        let before = self.times(&ops::matmul(c, starts)?, &since_start)?;
        Ok((ops::add(inside, before)?, state))
    }

    /// The state that each chunk begins with, and the one after the last: a chunk keeps the part `kept` of it and adds `taken_in`.
    fn pass_on(&self, state: &Array, kept: &Array, taken_in: &Array) -> Result<(Array, Array), LmError> {
        let chunks = kept.dim(0);
        let (mut state, mut starts) = (state.clone(), Vec::new());
        for (kept, taken_in) in kept.split_equal(chunks, 0)?.iter().zip(taken_in.split_equal(chunks, 0)?) {
            let next = ops::add(self.times(&state, kept)?, taken_in)?;
            starts.push(std::mem::replace(&mut state, next));
        }
        let starts = if chunks == 1 { starts.swap_remove(0) } else { ops::concatenate(&starts, 0)? };
        Ok((starts, state))
    }

    /// `y` `[.., rows, heads · head_dim]` times a factor a head `[.., rows or 1, heads]`.
    fn times(&self, y: &Array, factors: &Array) -> Result<Array, LmError> {
        let Sizes { heads, head_dim, .. } = self.sizes;
        let by_head = y.reshape(&[y.dim(0), y.dim(1), y.dim(2), heads, head_dim])?;
        Ok(ops::multiply(by_head, factors.expand_dims(-1)?)?.reshape(y.shape())?)
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

/// `[.., n] -> [.., n, n]`: the logarithm of how much is left at token `i` of what token `j` brought; 0 where `j >= i`. The sums are made for
/// each pair, since differences of running sums lose digits where steps are long.
fn log_decays_between(log_decay: &Array) -> Result<Array, LmError> {
    let n = log_decay.dim(-1);
    let shape = [log_decay.shape(), &[n]].concat();
    let later = ops::tril(ops::broadcast_to(log_decay.expand_dims(-1)?, &shape)?, -1)?;
    Ok(later.cumsum(-2, None, None)?)
}

/// `[n, n]`: whether token `i` sees token `j`.
fn causal(n: i32) -> Result<Array, LmError> {
    let tokens = Array::from_iter(0..n, &[n]);
    Ok(ops::ge(tokens.expand_dims(1)?, tokens.expand_dims(0)?)?)
}

thread_local! {
    static DECAYED: Fused = Fused::new(decayed);
}

/// `scores · exp(log_decay)` where `causal`, else 0.
fn decayed(inputs: &[Array]) -> Result<Array, Exception> {
    let [scores, log_decay, causal] = inputs else {
        return Err(Exception::custom("scores decay by two further inputs"));
    };
    let decayed = ops::multiply(scores, ops::exp(log_decay)?)?;
    ops::select(causal, &decayed, Array::from_f32(0.0))
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

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_cluster_common::spec::{ConvolutionSpec, GatedNorm as GatedNormSpec, LinearSpec, TensorSpec};
    use mlx_rs::random;

    const HEADS: u32 = 6;

    fn numbers(shape: &[i32], seed: u64) -> Array {
        random::normal::<f32>(shape, None, None, &random::key(seed).expect("a key")).expect("random numbers")
    }

    /// Two groups of three heads.
    fn state_space() -> StateSpace {
        let by_head = |name: &str| TensorSpec::new(name, &[HEADS]);
        let spec = StateSpaceSpec {
            n_heads: HEADS,
            head_dim: 4,
            state_dim: 8,
            n_groups: 2,
            inputs: StateSpaceInputs::Joint(LinearSpec::new("in_proj", 16, 86, false)),
            convolution: ConvolutionSpec { path: "conv1d".into(), channels: 56, kernel: 4, bias: false },
            dt_bias: by_head("dt_bias"),
            a_log: by_head("A_log"),
            d: by_head("D"),
            time_step_limit: (0.001, 2.0),
            gated_norm: GatedNormSpec::None,
            output: LinearSpec::new("out_proj", 24, 16, false),
        };
        let arrays = [("conv1d.weight", vec![56, 4, 1]), ("dt_bias", vec![6]), ("A_log", vec![6]), ("D", vec![6])];
        let arrays = (0..).zip(arrays).map(|(seed, (name, shape))| (name.to_owned(), numbers(&shape, seed)));
        StateSpace::load(&mut Weights::from_arrays(arrays), &spec, &Quantization::default()).expect("loads")
    }

    /// What comes out and the state after, when the tokens come in pieces of these lengths.
    fn run(state_space: &StateSpace, lengths: &[i32]) -> Vec<Array> {
        let n = lengths.iter().sum();
        let inputs = [numbers(&[1, n, 56], 10), numbers(&[1, n, HEADS as i32], 11)];
        let (mut state, mut outputs, mut start) = (state_space.initial_state(Dtype::Float32).expect("zeros"), Vec::new(), 0);
        for length in lengths {
            let stop = start + length;
            let rows = inputs.each_ref().map(|y| ffi::slice(y, &[0, start, 0], &[1, stop, y.dim(2)]).expect("rows"));
            let (y, next) = state_space.step(&rows, &state).expect("runs");
            outputs.push(y);
            (start, state) = (stop, next);
        }
        state.push(ops::concatenate(&outputs, 1).expect("joins"));
        state
    }

    #[test]
    fn chunks_give_what_single_tokens_give() {
        let state_space = state_space();
        let one_by_one = run(&state_space, &[1; 150]);
        for (chunks, single) in run(&state_space, &[150]).iter().zip(&one_by_one) {
            assert_eq!(chunks.shape(), single.shape());
            assert!(chunks.all_close(single, 1e-4, 1e-4, None).expect("compares"));
        }
    }

    #[test]
    fn a_cut_between_chunks_changes_nothing() {
        let state_space = state_space();
        let whole = run(&state_space, &[150]);
        for lengths in [&[64, 86][..], &[128, 22], &[64, 64, 22]] {
            for (cut, whole) in run(&state_space, lengths).iter().zip(&whole) {
                assert_eq!(ffi::array_to_bytes(cut).expect("bytes"), ffi::array_to_bytes(whole).expect("bytes"), "{lengths:?}");
            }
        }
    }
}

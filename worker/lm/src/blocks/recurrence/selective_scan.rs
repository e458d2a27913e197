//! Selective scan (Gu and Dao 2023), Mamba 1: behind a short convolution, a state a channel whose decay and intake hang on the token.

use super::{convolution::Convolution, only};
use crate::{
    blocks::{mixer::Projected, norm::Norm},
    error::LmError,
    linear::Linear,
    parameters::parameters,
    weights::Weights,
};
use mlx_cluster_common::spec::{Quantization, SelectiveScanSpec};
use mlx_rs::{Array, Dtype, nn, ops};

/// Up to this many tokens go through the state one after the other; more are cut into blocks.
const ONE_BY_ONE: i32 = 16;

/// Before the state: x goes to the convolution, the gate past it.
#[derive(Debug, Clone)]
pub(in crate::blocks) struct SelectiveScanProject {
    input: Linear,
}
parameters!(SelectiveScanProject: input);

impl SelectiveScanProject {
    pub(in crate::blocks) const ARITY: (usize, usize) = (1, 1);

    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &SelectiveScanSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { input: Linear::load(weights, &spec.input, quantization)? })
    }

    pub(in crate::blocks) fn forward(&self, x: &Array) -> Result<Projected, LmError> {
        let mut parts = self.input.forward(x)?.split_equal(2, -1)?;
        let gate = parts.split_off(1);
        Ok(Projected { mixed: parts, beside: gate })
    }
}

/// At the state: the inputs of the last tokens, and `[1, state_dim, inner]` in f32.
#[derive(Debug, Clone)]
pub struct SelectiveScan {
    convolution: Convolution,
    dt_b_c: Linear,
    dt: Linear,
    /// Of the time step's low rank, of B and of C; or none.
    norms: Vec<Norm>,
    a_log: Array,
    d: Array,
    dt_rank: i32,
    state_dim: i32,
}
parameters!(SelectiveScan: convolution, dt_b_c, dt, norms, a_log, d);

/// What tokens bring, in blocks of the same length: time steps `dt` and `u` (x times its time step) `[blocks, n, inner]`, `b` and `c`
/// `[blocks, n, state_dim]`, all in f32; and the decay for a time step of 1, `a` `[state_dim, inner]`.
struct Tokens {
    dt: Array,
    u: Array,
    b: Array,
    c: Array,
    a: Array,
}

impl SelectiveScan {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &SelectiveScanSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            convolution: Convolution::load(weights, &spec.convolution)?,
            dt_b_c: Linear::load(weights, &spec.dt_b_c, quantization)?,
            dt: Linear::load(weights, &spec.dt, quantization)?,
            norms: spec.norms.iter().flatten().map(|norm| Norm::load(weights, norm)).collect::<Result<_, _>>()?,
            a_log: weights.take(&spec.a_log.name)?,
            d: weights.take(&spec.d.name)?,
            dt_rank: spec.dt_rank as i32,
            state_dim: spec.state_dim as i32,
        })
    }

    pub(super) fn initial_state(&self, dtype: Dtype) -> Result<Vec<Array>, LmError> {
        let state = ops::zeros_dtype(&[1, self.state_dim, self.d.dim(0)], Dtype::Float32)?;
        Ok(vec![self.convolution.initial_state(dtype)?, state])
    }

    pub(super) fn step(&self, rows: &[Array], state: &[Array]) -> Result<(Array, Vec<Array>), LmError> {
        let [past, state] = state else {
            return Err(LmError::Mlx(format!("a selective scan got {} arrays of state, wanted 2", state.len())));
        };
        let (convolved, past) = self.convolution.forward(only(rows)?, past)?;
        let x = nn::silu(convolved)?;
        let tokens = self.tokens(&x)?;
        let n = x.dim(1);
        let (y, state) = if n <= ONE_BY_ONE { tokens.through(state)? } else { tokens.in_blocks(n, state)? };
        let skipped = ops::multiply(self.d.as_dtype(x.dtype())?, &x)?;
        Ok((ops::add(y.as_dtype(x.dtype())?, skipped)?, vec![past, state]))
    }

    /// All tokens as one block. Scans are done in f32 whatever the stream's type is: in bf16 a decay near 1 would be 1.
    fn tokens(&self, x: &Array) -> Result<Tokens, LmError> {
        let parts = self.dt_b_c.forward(x)?.split_at_indices(&[self.dt_rank, self.dt_rank + self.state_dim], -1)?;
        let [mut dt, mut b, mut c] = super::three(parts)?;
        if let [dt_norm, b_norm, c_norm] = self.norms.as_slice() {
            (dt, b, c) = (dt_norm.forward(&dt)?, b_norm.forward(&b)?, c_norm.forward(&c)?);
        }
        let wide = |y: &Array| y.as_dtype(Dtype::Float32);
        let dt = wide(&nn::softplus(self.dt.forward(&dt)?)?)?;
        let a = ops::exp(wide(&self.a_log)?)?.negative()?.t().contiguous()?;
        Ok(Tokens { u: ops::multiply(&dt, wide(x)?)?, dt, b: wide(&b)?, c: wide(&c)?, a })
    }
}

impl Tokens {
    /// One token after the other, in all blocks at once, from the states `[blocks, state_dim, inner]`: what is read `[blocks, n, inner]`, and
    /// the states after.
    fn through(&self, state: &Array) -> Result<(Array, Array), LmError> {
        let n = self.dt.dim(1);
        let reading = self.c.split_equal(n, 1)?;
        let (mut state, mut read) = (state.clone(), Vec::new());
        self.advance(&mut state, |i, state| {
            read.push(ops::matmul(&reading[i], state)?);
            Ok(())
        })?;
        let read = if read.len() == 1 { read.swap_remove(0) } else { ops::concatenate(&read, 1)? };
        Ok((read, state))
    }

    /// `state = exp(dt · a) · state + u ⊗ b`, token by token.
    fn advance(&self, state: &mut Array, mut each: impl FnMut(usize, &Array) -> Result<(), LmError>) -> Result<(), LmError> {
        let n = self.dt.dim(1);
        let (dt, u, b) = (self.dt.split_equal(n, 1)?, self.u.split_equal(n, 1)?, self.b.swap_axes(-1, -2)?.split_equal(n, 2)?);
        for (i, ((dt, u), b)) in dt.iter().zip(&u).zip(&b).enumerate() {
            let decay = ops::exp(ops::multiply(dt, &self.a)?)?;
            *state = ops::add(ops::multiply(decay, &*state)?, ops::multiply(u, b)?)?;
            each(i, state)?;
        }
        Ok(())
    }

    /// A long run of tokens in blocks, so that the number of operations grows with the square root of its length: first what each block alone
    /// leaves, then the state that each block begins with, then all blocks from there.
    fn in_blocks(&self, n: i32, state: &Array) -> Result<(Array, Array), LmError> {
        let length = f64::from(n).sqrt().ceil() as i32 / 2;
        let blocks = self.cut(n, length)?;
        let n_blocks = blocks.dt.dim(0);
        let mut left = ops::zeros_dtype(&[n_blocks, state.dim(1), state.dim(2)], Dtype::Float32)?;
        blocks.advance(&mut left, |_, _| Ok(()))?;
        let decays = ops::exp(ops::multiply(blocks.dt.sum_axis(1, true)?, &self.a)?)?;
        let (mut state, mut starts) = (state.clone(), Vec::new());
        for (decay, left) in decays.split_equal(n_blocks, 0)?.iter().zip(left.split_equal(n_blocks, 0)?) {
            let next = ops::add(ops::multiply(decay, &state)?, left)?;
            starts.push(std::mem::replace(&mut state, next));
        }
        let (read, _) = blocks.through(&ops::concatenate(&starts, 0)?)?;
        let read = read.reshape(&[1, n_blocks * length, -1])?;
        Ok((crate::ffi::slice(&read, &[0, 0, 0], &[1, n, read.dim(2)])?, state))
    }

    /// `[1, n, ..] -> [blocks, length, ..]`. Time steps of zero fill the last block: they leave a state as it is.
    fn cut(&self, n: i32, length: i32) -> Result<Tokens, LmError> {
        let n_blocks = (n + length - 1) / length;
        let cut = |y: &Array| {
            let padded = ops::pad(y, &[(0, 0), (0, n_blocks * length - n), (0, 0)], None, None)?;
            Ok::<_, LmError>(padded.reshape(&[n_blocks, length, -1])?)
        };
        Ok(Tokens { dt: cut(&self.dt)?, u: cut(&self.u)?, b: cut(&self.b)?, c: cut(&self.c)?, a: self.a.clone() })
    }
}

/// After the state: the gate, the output.
#[derive(Debug, Clone)]
pub(in crate::blocks) struct SelectiveScanMerge {
    output: Linear,
}
parameters!(SelectiveScanMerge: output);

impl SelectiveScanMerge {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &SelectiveScanSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { output: Linear::load(weights, &spec.output, quantization)? })
    }

    /// `beside` is the gate.
    pub(in crate::blocks) fn forward(&self, y: &Array, beside: &[Array]) -> Result<Array, LmError> {
        self.output.forward(&ops::multiply(nn::silu(only(beside)?)?, y)?)
    }
}

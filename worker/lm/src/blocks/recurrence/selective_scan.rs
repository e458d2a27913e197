//! Selective scan (Gu and Dao 2023): behind a short convolution, a state a channel whose decay and intake hang on the token.

use super::{convolution::Convolution, fused::Fused, only};
use crate::{
    blocks::{mixer::Projected, norm::Norm},
    error::LmError,
    ffi,
    linear::Linear,
    parameters::parameters,
    weights::Weights,
};
use mlx_cluster_common::spec::{CHUNK_TOKENS, Quantization, SelectiveScanSpec};
use mlx_rs::{Array, Dtype, error::Exception, nn, ops};

/// Tokens of a block. A run of tokens goes through its state in blocks, so that the number of operations is the block's length and the number
/// of blocks, not their product; it divides `CHUNK_TOKENS`, so that a token's numbers do not depend on where prompts are cut.
const BLOCK: i32 = 16;
const _: () = assert!(CHUNK_TOKENS.is_multiple_of(BLOCK as u32));

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
        let (y, state) = if x.dim(1) < BLOCK { tokens.through(state)? } else { tokens.in_blocks(state)? };
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
            let inputs = [state.clone(), dt.clone(), self.a.clone(), u.clone(), b.clone()];
            *state = ADVANCE.with(|advance| advance.call(&inputs))?;
            each(i, state)?;
        }
        Ok(())
    }

    /// First what each block alone leaves, then the state that each block begins with, then all blocks from there.
    fn in_blocks(&self, state: &Array) -> Result<(Array, Array), LmError> {
        let n = self.dt.dim(1);
        let blocks = self.cut()?;
        let n_blocks = blocks.dt.dim(0);
        let mut left = ops::zeros_dtype(&[n_blocks, state.dim(1), state.dim(2)], Dtype::Float32)?;
        blocks.advance(&mut left, |_, _| Ok(()))?;
        let decays = ops::exp(ops::multiply(blocks.dt.sum_axis(1, true)?, &self.a)?)?;
        let (mut state, mut starts) = (state.clone(), Vec::new());
        for (decay, left) in decays.split_equal(n_blocks, 0)?.iter().zip(left.split_equal(n_blocks, 0)?) {
            let next = ops::add(ops::multiply(decay, &state)?, left)?;
            starts.push(std::mem::replace(&mut state, next));
        }
        let (read, ends) = blocks.through(&ops::concatenate(&starts, 0)?)?;
        if n % BLOCK != 0 {
            // As the tokens of the last block alone would leave it.
            state = ffi::slice(&ends, &[n_blocks - 1, 0, 0], ends.shape())?;
        }
        let read = read.reshape(&[1, n_blocks * BLOCK, -1])?;
        Ok((ffi::slice(&read, &[0, 0, 0], &[1, n, read.dim(2)])?, state))
    }

    /// `[1, n, ..] -> [blocks, BLOCK, ..]`. Time steps of zero fill the last block: they leave a state as it is.
    fn cut(&self) -> Result<Tokens, LmError> {
        let n = self.dt.dim(1);
        let n_blocks = (n + BLOCK - 1) / BLOCK;
        let cut = |y: &Array| {
            let padded = match n_blocks * BLOCK - n {
                0 => y.clone(),
                missing => ops::pad(y, &[(0, 0), (0, missing), (0, 0)], None, None)?,
            };
            Ok::<_, LmError>(padded.reshape(&[n_blocks, BLOCK, -1])?)
        };
        Ok(Tokens { dt: cut(&self.dt)?, u: cut(&self.u)?, b: cut(&self.b)?, c: cut(&self.c)?, a: self.a.clone() })
    }
}

thread_local! {
    static ADVANCE: Fused = Fused::new(advanced);
}

/// `exp(dt · a) · state + u · b` of `[state, dt, a, u, b]`.
fn advanced(inputs: &[Array]) -> Result<Array, Exception> {
    let [state, dt, a, u, b] = inputs else {
        return Err(Exception::custom("a step of a selective scan has five inputs"));
    };
    let decay = ops::exp(ops::multiply(dt, a)?)?;
    ops::add(ops::multiply(decay, state)?, ops::multiply(u, b)?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_cluster_common::spec::{ConvolutionSpec, LinearSpec, TensorSpec};
    use mlx_rs::random;

    fn numbers(shape: &[i32], seed: u64) -> Array {
        random::normal::<f32>(shape, None, None, &random::key(seed).expect("a key")).expect("random numbers")
    }

    fn scan() -> SelectiveScan {
        let spec = SelectiveScanSpec {
            inner_dim: 12,
            state_dim: 4,
            dt_rank: 3,
            input: LinearSpec::new("in_proj", 8, 24, false),
            convolution: ConvolutionSpec { path: "conv1d".into(), channels: 12, kernel: 4, bias: false },
            dt_b_c: LinearSpec::new("x_proj", 12, 11, false),
            dt: LinearSpec::new("dt_proj", 3, 12, true),
            a_log: TensorSpec::new("A_log", &[12, 4]),
            d: TensorSpec::new("D", &[12]),
            norms: None,
            output: LinearSpec::new("out_proj", 12, 8, false),
        };
        let shapes = [
            ("conv1d.weight", vec![12, 4, 1]),
            ("x_proj.weight", vec![11, 12]),
            ("dt_proj.weight", vec![12, 3]),
            ("dt_proj.bias", vec![12]),
            ("A_log", vec![12, 4]),
            ("D", vec![12]),
        ];
        let arrays = (0..).zip(shapes).map(|(seed, (name, shape))| (name.to_owned(), numbers(&shape, seed)));
        SelectiveScan::load(&mut Weights::from_arrays(arrays), &spec, &Quantization::default()).expect("loads")
    }

    /// What comes out and the state after, when the tokens come in pieces of these lengths.
    fn run(scan: &SelectiveScan, lengths: &[i32]) -> Vec<Array> {
        let input = numbers(&[1, lengths.iter().sum(), 12], 10);
        let (mut state, mut outputs, mut start) = (scan.initial_state(Dtype::Float32).expect("zeros"), Vec::new(), 0);
        for length in lengths {
            let rows = ffi::slice(&input, &[0, start, 0], &[1, start + length, 12]).expect("rows");
            let (y, next) = scan.step(&[rows], &state).expect("runs");
            outputs.push(y);
            (start, state) = (start + length, next);
        }
        state.push(ops::concatenate(&outputs, 1).expect("joins"));
        state
    }

    #[test]
    fn blocks_give_what_single_tokens_give() {
        let scan = scan();
        for n in [2, 16, 50] {
            let one_by_one = run(&scan, &vec![1; n as usize]);
            for (blocks, single) in run(&scan, &[n]).iter().zip(&one_by_one) {
                assert_eq!(blocks.shape(), single.shape());
                assert!(blocks.all_close(single, 1e-4, 1e-4, None).expect("compares"), "{n}");
            }
        }
    }

    #[test]
    fn a_cut_between_blocks_changes_nothing() {
        let scan = scan();
        let whole = run(&scan, &[150]);
        for lengths in [&[64, 86][..], &[128, 22], &[64, 80, 6], &[16, 128, 6]] {
            for (cut, whole) in run(&scan, lengths).iter().zip(&whole) {
                assert_eq!(ffi::array_to_bytes(cut).expect("bytes"), ffi::array_to_bytes(whole).expect("bytes"), "{lengths:?}");
            }
        }
    }
}

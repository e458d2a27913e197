//! The gated delta rule (Yang et al. 2024): a matrix a head that forgets by a factor and learns keys with their values.
//!
//! For each token `S ← g S`, `u = beta (v - k S)`, `S ← S + kᵀ u`, `y = q S`. Everything is f32; the state is `[heads, groups, key_dim,
//! value_dim]`: `groups` value heads share a key head.

use crate::{error::LmError, ffi};
use mlx_cluster_common::spec::CHUNK_TOKENS;
use mlx_rs::{Array, Device, DeviceType, ops};

/// Tokens that are done at once. More make fewer steps one after the other, and more work for each token.
/// It divides `CHUNK_TOKENS`, so that a token's numbers do not depend on where prompts are cut.
const CHUNK: i32 = 32;
const _: () = assert!(CHUNK_TOKENS.is_multiple_of(CHUNK as u32));

/// What a sequence's new tokens bring.
pub(super) struct Tokens {
    /// `[n, heads, key_dim]`, with the factor on the scores.
    pub(super) queries: Array,
    /// `[n, heads, key_dim]`
    pub(super) keys: Array,
    /// `[n, heads, groups, value_dim]`
    pub(super) values: Array,
    /// Logarithms of the factors, `[n, heads, groups]`.
    pub(super) log_decay: Array,
    /// How much of the error is learned, `[n, heads, groups]`.
    pub(super) beta: Array,
}

impl Tokens {
    /// What comes out, `[n, heads, groups, value_dim]`, and the state after.
    pub(super) fn forward(&self, state: &Array) -> Result<(Array, Array), LmError> {
        match self.queries.dim(0) {
            1 => self.one(state),
            n if n <= CHUNK => Chunks::new(self, n)?.forward(state),
            n if n % CHUNK == 0 => Chunks::new(self, CHUNK)?.forward(state),
            // What is left is not filled up: so its numbers are those that it would have in a step of its own.
            n => {
                let whole = n / CHUNK * CHUNK;
                let (first, state) = self.span(0, whole)?.forward(state)?;
                let (rest, state) = self.span(whole, n)?.forward(&state)?;
                Ok((ops::concatenate(&[first, rest], 0)?, state))
            }
        }
    }

    /// One token, in few operations.
    fn one(&self, state: &Array) -> Result<(Array, Array), LmError> {
        // [heads, 1, 1, key_dim], [heads, groups, 1, value_dim] and [heads, groups, 1, 1].
        let row = |y: &Array| y.reshape(&[y.dim(1), 1, 1, y.dim(2)]);
        let (query, key) = (row(&self.queries)?, row(&self.keys)?);
        let (heads, groups, value_dim) = (self.values.dim(1), self.values.dim(2), self.values.dim(3));
        let value = self.values.reshape(&[heads, groups, 1, value_dim])?;
        let gate = |y: &Array| y.reshape(&[heads, groups, 1, 1]);
        let (decay, beta) = (ops::exp(gate(&self.log_decay)?)?, gate(&self.beta)?);
        let recalled = ops::multiply(&decay, ops::matmul(&key, state)?)?;
        let learned = ops::multiply(ops::subtract(value, recalled)?, beta)?;
        let state = remember(state, &decay, &key, &learned)?;
        Ok((ops::matmul(query, &state)?.reshape(&[1, heads, groups, value_dim])?, state))
    }

    fn span(&self, start: i32, stop: i32) -> Result<Self, LmError> {
        let span = |y: &Array| {
            let (from, to) = (vec![0; y.ndim() - 1], y.shape()[1..].to_vec());
            ffi::slice(y, &[vec![start], from].concat(), &[vec![stop], to].concat())
        };
        Ok(Self {
            queries: span(&self.queries)?,
            keys: span(&self.keys)?,
            values: span(&self.values)?,
            log_decay: span(&self.log_decay)?,
            beta: span(&self.beta)?,
        })
    }
}

/// Tokens in chunks that follow each other (Yang et al. 2024, section 3.3).
///
/// `D[t, i]` is what is left at token `t` of what token `i` wrote, `G[t]` what is left of the state `S` that the chunk began with. Then with
/// `A = beta (K Kᵀ ∘ D)` below the diagonal
/// `(1 + A) U = beta (V - G K S)`, `Y = G Q S + (Q Kᵀ ∘ D) U` and `S ← G[last] S + Kᵀ (D[last] U)`.
///
/// The axes are `[heads, groups, chunks, tokens of the chunk, ..]`, with one group where groups share.
struct Chunks {
    /// `K` and after it `Q`: `2 · tokens` rows.
    keys_queries: Array,
    /// `Kᵀ`
    keys_turned: Array,
    values: Array,
    beta: Array,
    /// `(1 + A)⁻¹`
    solve: Array,
    /// `Q Kᵀ ∘ D`
    read: Array,
    /// `G`
    left: Array,
    /// `G[last]`, one row.
    left_at_end: Array,
    /// `D[last]`, one a row.
    written_at_end: Array,
}

impl Chunks {
    fn new(tokens: &Tokens, length: i32) -> Result<Self, LmError> {
        let (heads, key_dim) = (tokens.keys.dim(1), tokens.keys.dim(2));
        let (groups, value_dim) = (tokens.values.dim(2), tokens.values.dim(3));
        let n = tokens.keys.dim(0) / length;
        let ordered = |y: &Array, groups: i32, dim: i32| -> Result<Array, LmError> {
            Ok(y.reshape(&[n, length, heads, groups, dim])?.transpose_axes(&[2, 3, 0, 1, 4])?)
        };
        let (queries, keys) = (ordered(&tokens.queries, 1, key_dim)?, ordered(&tokens.keys, 1, key_dim)?);
        let (log_decay, beta) = (ordered(&tokens.log_decay, groups, 1)?, ordered(&tokens.beta, groups, 1)?);
        let below = below_diagonal(length)?;
        let between = decay_between(&log_decay, &below)?;
        let left = ops::exp(log_decay.cumsum(-2, None, None)?)?;
        let keys_queries = ops::concatenate(&[&keys, &queries], 3)?;
        let keys_turned = keys.swap_axes(-1, -2)?;
        let scores = ops::matmul(&keys_queries, &keys_turned)?.split_equal(2, 3)?;
        let among = ops::multiply(ops::multiply(&scores[0], &between)?, &beta)?;
        Ok(Self {
            keys_queries,
            keys_turned,
            values: ordered(&tokens.values, groups, value_dim)?,
            solve: inverse_of_unit_plus(&ops::select(&below, among, Array::from_f32(0.0))?)?,
            beta,
            read: ops::multiply(&scores[1], &between)?,
            left_at_end: last_row(&left)?,
            left,
            written_at_end: last_row(&between)?.swap_axes(-1, -2)?,
        })
    }

    /// `[n, heads, groups, value_dim]`, and the state after.
    fn forward(&self, state: &Array) -> Result<(Array, Array), LmError> {
        let n = self.keys_queries.dim(2);
        let (mut state, mut outputs) = (state.clone(), Vec::with_capacity(n as usize));
        for chunk in 0..n {
            let own = |y: &Array| -> Result<Array, LmError> {
                let (start, mut stop) = ([0, 0, chunk, 0, 0], [0; 5]);
                stop.copy_from_slice(y.shape());
                stop[2] = chunk + 1;
                Ok(ffi::slice(y, &start, &stop)?.squeeze_axes(&[2])?)
            };
            let from_state = ops::matmul(own(&self.keys_queries)?, &state)?.split_equal(2, 2)?;
            let left = own(&self.left)?;
            let errors = ops::subtract(own(&self.values)?, ops::multiply(&left, &from_state[0])?)?;
            let learned = ops::matmul(own(&self.solve)?, ops::multiply(errors, own(&self.beta)?)?)?;
            outputs.push(ops::add(ops::multiply(&left, &from_state[1])?, ops::matmul(own(&self.read)?, &learned)?)?);
            let written = ops::matmul(own(&self.keys_turned)?, ops::multiply(own(&self.written_at_end)?, learned)?)?;
            state = ops::add(ops::multiply(own(&self.left_at_end)?, state)?, written)?;
        }
        let y = ops::stack(&outputs, 0)?.transpose_axes(&[0, 3, 1, 2, 4])?;
        Ok((y.reshape(&[n * y.dim(1), y.dim(2), y.dim(3), y.dim(4)])?, state))
    }
}

/// `state · decay + keyᵀ learned`, for one token.
fn remember(state: &Array, decay: &Array, key: &Array, learned: &Array) -> Result<Array, LmError> {
    match Device::try_default()?.get_type()? {
        DeviceType::Cpu => remember_apart(state, decay, key, learned),
        _ => remember_at_once(state, decay, key, learned),
    }
}

/// To be compiled into one kernel, which reads and writes the state once.
fn remember_at_once(state: &Array, decay: &Array, key: &Array, learned: &Array) -> Result<Array, LmError> {
    Ok(ops::add(ops::multiply(state, decay)?, ops::multiply(key.swap_axes(-1, -2)?, learned)?)?)
}

/// In three kernels. On a CPU a compiled one goes element by element when its inputs are broadcast, and plain ones go by vectors. What is
/// spread by strides is not compiled into others, and neither is `contiguous`, which copies nothing here.
fn remember_apart(state: &Array, decay: &Array, key: &Array, learned: &Array) -> Result<Array, LmError> {
    let shape = state.shape();
    let [groups, key_dim, value_dim] = [shape[1], shape[2], shape[3]].map(i64::from);
    let spread = |y: &Array, strides: [i64; 4]| y.as_strided(shape, strides.as_slice(), 0);
    let kept = ops::multiply(state, spread(decay, [groups, 1, 0, 0])?)?.contiguous()?;
    let written = ops::multiply(spread(key, [key_dim, 0, 1, 0])?, spread(learned, [groups * value_dim, value_dim, 0, 1])?)?;
    Ok(ops::add(kept, written.contiguous()?)?)
}

/// Row and column numbers of a square matrix.
fn numbers(length: i32) -> Result<(Array, Array), LmError> {
    let numbers = Array::from_iter(0..length, &[length]);
    Ok((numbers.expand_dims(1)?, numbers.expand_dims(0)?))
}

fn below_diagonal(length: i32) -> Result<Array, LmError> {
    let (rows, columns) = numbers(length)?;
    Ok(ops::gt(rows, columns)?)
}

/// `exp` of the sum of the entries after `i` up to `t`, zero above the diagonal: `[.., length, 1]` to `[.., length, length]`. Summed up for
/// each pair, since the difference of two long sums is inexact.
fn decay_between(log_decay: &Array, below: &Array) -> Result<Array, LmError> {
    let zero = Array::from_f32(0.0);
    let sums = ops::select(below, log_decay, &zero)?.cumsum(-2, None, None)?;
    let (rows, columns) = numbers(below.dim(0))?;
    Ok(ops::select(ops::ge(rows, columns)?, ops::exp(sums)?, zero)?)
}

fn last_row(y: &Array) -> Result<Array, LmError> {
    let mut start = [0; 5];
    start[3] = y.dim(3) - 1;
    ffi::slice(y, &start, y.shape())
}

/// `(1 + A)⁻¹` for `A` `[.., length, length]` that is zero on and above the diagonal.
///
/// Blocks on the diagonal are inverted in pairs: of `[[P, 0], [B, R]]` the inverse is `[[P⁻¹, 0], [-R⁻¹ B P⁻¹, R⁻¹]]`. The series
/// `(1 - A)(1 + A²)(1 + A⁴)..` needs fewer products, but cancels badly when keys are alike.
fn inverse_of_unit_plus(a: &Array) -> Result<Array, LmError> {
    let length = a.dim(-1);
    let (rows, columns) = numbers(length)?;
    let mut inverse = ops::eye::<f32>(length, None, None)?;
    let mut block = 1;
    while block < length {
        // Rows of the second block of a pair, columns of the first.
        let number = |entries: &Array| ops::floor_divide(entries, Array::from_int(block));
        let (row, column) = (number(&rows)?, number(&columns)?);
        let is_second = ops::eq(ops::remainder(&row, Array::from_int(2))?, Array::from_int(1))?;
        let pairs = ops::logical_and(is_second, ops::eq(ops::subtract(row, Array::from_int(1))?, column)?)?;
        let between = ops::select(pairs, a, Array::from_f32(0.0))?;
        inverse = match block {
            1 => ops::subtract(inverse, between)?,
            _ => ops::subtract(&inverse, ops::matmul(&inverse, ops::matmul(between, &inverse)?)?)?,
        };
        block *= 2;
    }
    Ok(inverse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::random;

    const HEADS: i32 = 2;
    const GROUPS: i32 = 3;

    fn normal(shape: &[i32], seed: u64) -> Array {
        random::normal::<f32>(shape, None, None, &random::key(seed).expect("a key")).expect("random numbers")
    }

    fn scaled(y: Array, factor: f32) -> Array {
        ops::multiply(y, Array::from_f32(factor)).expect("scales")
    }

    /// `alike`: how much all keys have in common. `forgetting`: the size of the logarithms of the factors.
    fn tokens(n: i32, alike: f32, forgetting: f32) -> Tokens {
        let direction = |seed| {
            let y = ops::add(normal(&[n, HEADS, 16], seed), Array::from_f32(alike)).expect("adds");
            scaled(mlx_rs::fast::rms_norm(y, None, 1e-6).expect("norms"), 0.25)
        };
        let gates = |seed| ops::sigmoid(normal(&[n, HEADS, GROUPS], seed)).expect("gates");
        Tokens {
            queries: direction(1),
            keys: direction(2),
            values: normal(&[n, HEADS, GROUPS, 8], 3),
            log_decay: scaled(gates(4), -forgetting),
            beta: gates(5),
        }
    }

    fn state() -> Array {
        normal(&[HEADS, GROUPS, 16, 8], 6)
    }

    fn by_token(tokens: &Tokens, state: &Array) -> (Array, Array) {
        let mut state = state.clone();
        let outputs: Vec<Array> = (0..tokens.keys.dim(0))
            .map(|i| {
                let own = |y: &Array| y.take_axis(Array::from_slice(&[i], &[1]), 0).expect("a row");
                let one = Tokens {
                    queries: own(&tokens.queries),
                    keys: own(&tokens.keys),
                    values: own(&tokens.values),
                    log_decay: own(&tokens.log_decay),
                    beta: own(&tokens.beta),
                };
                let (y, moved) = one.forward(&state).expect("steps");
                state = moved;
                y
            })
            .collect();
        (ops::concatenate(&outputs, 0).expect("joins"), state)
    }

    fn difference(a: &Array, b: &Array) -> f32 {
        assert_eq!(a.shape(), b.shape());
        ops::subtract(a, b).and_then(|y| ops::abs(&y)?.max(None)).expect("compares").item_exact::<f32>()
    }

    #[test]
    fn both_ways_to_remember_agree() {
        let gates = |seed| ops::sigmoid(normal(&[HEADS, GROUPS, 1, 1], seed)).expect("gates");
        let (decay, key, learned) = (gates(7), normal(&[HEADS, 1, 1, 16], 8), normal(&[HEADS, GROUPS, 1, 8], 9));
        let at_once = remember_at_once(&state(), &decay, &key, &learned).expect("runs");
        let apart = remember_apart(&state(), &decay, &key, &learned).expect("runs");
        assert!(difference(&at_once, &apart) < 1e-6);
    }

    #[test]
    fn chunks_are_the_tokens_one_by_one() {
        for n in [2, 3, 31, 32, 33, 64, 100] {
            for (alike, forgetting) in [(0.0, 1.0), (3.0, 0.01), (0.0, 60.0)] {
                let (tokens, state) = (tokens(n, alike, forgetting), state());
                let (y, after) = tokens.forward(&state).expect("runs");
                let (wanted, wanted_after) = by_token(&tokens, &state);
                let found = (difference(&y, &wanted), difference(&after, &wanted_after));
                assert!(found.0 < 1e-5 && found.1 < 1e-5, "{n} tokens, alike {alike}, forgetting {forgetting}: {found:?}");
            }
        }
    }

    #[test]
    fn cuts_at_multiples_change_no_bit() {
        for n in [90, 97, 129, 200] {
            let (tokens, state) = (tokens(n, 0.5, 1.0), state());
            let (whole, after) = tokens.forward(&state).expect("goes through");
            for cut in (64..n - 1).step_by(64) {
                let (first, middle) = tokens.span(0, cut).expect("cut").forward(&state).expect("goes through");
                let (rest, end) = tokens.span(cut, n).expect("cut").forward(&middle).expect("goes through");
                let joined = ops::concatenate(&[first, rest], 0).expect("joined");
                assert_eq!((difference(&joined, &whole), difference(&end, &after)), (0.0, 0.0), "{n} tokens cut at {cut}");
            }
        }
    }
}

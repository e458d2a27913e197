//! Arrays by token: what every kind of cache is written, cut and put together of.

use crate::{error::LmError, ffi, linear::Matrix};
use mlx_cluster_common::spec::QuantizationScheme;
use mlx_rs::{Array, ops};

/// Buffers grow by this many tokens, so that most steps write into room that is there and the allocator sees few sizes.
const GROWTH: i32 = 256;

/// Arrays `[1, heads, tokens, dim]` of the same tokens, mostly keys and values. Quantised, each stands as words, scales and biases, one
/// after the other.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    arrays: Vec<Array>,
    scheme: Option<QuantizationScheme>,
}

/// The next multiple of the step by which buffers grow.
pub(super) fn rounded(tokens: i32) -> i32 {
    (tokens + GROWTH - 1) / GROWTH * GROWTH
}

impl Rows {
    pub(super) fn plain(arrays: &[&Array]) -> Self {
        Self { arrays: arrays.iter().map(|array| (*array).clone()).collect(), scheme: None }
    }

    pub(super) fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    pub(super) fn is_plain(&self) -> bool {
        self.scheme.is_none()
    }

    /// Tokens that there is room for.
    pub(super) fn capacity(&self) -> i32 {
        self.arrays.first().map_or(0, |array| array.dim(2))
    }

    /// Each array in groups along its last axis.
    pub(super) fn quantised(&self, scheme: QuantizationScheme) -> Result<Self, LmError> {
        let mut arrays = Vec::with_capacity(3 * self.arrays.len());
        for array in &self.arrays {
            let (words, scales, biases) = ffi::quantize(array, scheme)?;
            arrays.extend([words, scales]);
            arrays.extend(biases);
        }
        Ok(Self { arrays, scheme: Some(scheme) })
    }

    /// Room for so many tokens of the kind of these.
    pub(super) fn room(&self, capacity: i32) -> Result<Self, LmError> {
        self.each(|array| Ok(ops::zeros_dtype(&[1, array.dim(1), capacity, array.dim(3)], array.dtype())?))
    }

    pub(super) fn slice(&self, from: i32, to: i32) -> Result<Self, LmError> {
        self.each(|array| ffi::slice(array, &[0, 0, from, 0], &[1, array.dim(1), to, array.dim(3)]))
    }

    /// With `new` at `at`; in place when nobody else holds the buffers.
    pub(super) fn write(&self, new: &Rows, at: i32) -> Result<Self, LmError> {
        if (self.arrays.len(), self.scheme) != (new.arrays.len(), new.scheme) {
            return Err(LmError::Mlx(format!("a cache of {} arrays was given {}", self.arrays.len(), new.arrays.len())));
        }
        let write =
            |(buffer, new): (&Array, &Array)| ffi::slice_update(buffer, new, &[0, 0, at, 0], &[1, new.dim(1), at + new.dim(2), new.dim(3)]);
        let arrays = self.arrays.iter().zip(&new.arrays).map(write).collect::<Result<_, _>>()?;
        Ok(Self { arrays, scheme: self.scheme })
    }

    /// The tokens `from..to` at the front of buffers of another size.
    pub(super) fn moved(&self, from: i32, to: i32, capacity: i32) -> Result<Self, LmError> {
        let filled = self.slice(from, to)?;
        let spare = self.room(capacity - (to - from))?;
        Self::joined(&[filled, spare])
    }

    /// One behind the other; there must be at least one.
    pub(super) fn joined(parts: &[Rows]) -> Result<Self, LmError> {
        let [first, rest @ ..] = parts else { return Err(LmError::Mlx("no tokens to put together".into())) };
        if rest.is_empty() {
            return Ok(first.clone());
        }
        let joined = |i: usize| {
            let arrays: Vec<&Array> = parts.iter().filter_map(|part| part.arrays.get(i)).collect();
            Ok::<_, LmError>(ops::concatenate(&arrays, 2)?)
        };
        Ok(Self { arrays: (0..first.arrays.len()).map(joined).collect::<Result<_, _>>()?, scheme: first.scheme })
    }

    /// As operands of matrix products, with an axis of 1 before the tokens.
    pub(super) fn matrices(&self) -> Result<Vec<Matrix>, LmError> {
        let expanded = self.each(|array| Ok(array.expand_dims(2)?))?;
        let Some(scheme) = self.scheme else {
            return Ok(expanded.arrays.into_iter().map(|weight| Matrix::Dense { weight }).collect());
        };
        let matrix = |parts: &[Array]| match parts {
            [weight, scales, biases] => {
                let (weight, scales, biases) = (weight.clone(), scales.clone(), Some(biases.clone()));
                Ok(Matrix::Quantised { weight, scales, biases, scheme })
            }
            _ => Err(LmError::Mlx(format!("{} arrays of a quantised cache", parts.len()))),
        };
        expanded.arrays.chunks(3).map(matrix).collect()
    }

    fn each(&self, f: impl Fn(&Array) -> Result<Array, LmError>) -> Result<Self, LmError> {
        Ok(Self { arrays: self.arrays.iter().map(f).collect::<Result<_, _>>()?, scheme: self.scheme })
    }
}

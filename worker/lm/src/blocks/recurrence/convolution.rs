//! Causal depthwise convolution over time, with what it remembers of the tokens before.

use crate::{error::LmError, ffi, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::ConvolutionSpec;
use mlx_rs::{Array, Dtype, ops};

#[derive(Debug, Clone)]
pub(super) struct Convolution {
    /// `[channels, kernel, 1]`
    weight: Array,
    bias: Option<Array>,
}
parameters!(Convolution: weight, bias);

impl Convolution {
    pub(super) fn load(weights: &mut Weights, spec: &ConvolutionSpec) -> Result<Self, LmError> {
        let weight = weights.take(&format!("{}.weight", spec.path))?;
        let bias = spec.bias.then(|| weights.take(&format!("{}.bias", spec.path))).transpose()?;
        Ok(Self { weight, bias })
    }

    /// The inputs of the `kernel - 1` tokens before the first: zeros `[1, kernel - 1, channels]`.
    pub(super) fn initial_state(&self, dtype: Dtype) -> Result<Array, LmError> {
        Ok(ops::zeros_dtype(&[1, self.weight.dim(1) - 1, self.weight.dim(0)], dtype)?)
    }

    /// `x` `[1, n, channels]` after the inputs `past`: `[1, n, channels]`, and the past of the next token.
    pub(super) fn forward(&self, x: &Array, past: &Array) -> Result<(Array, Array), LmError> {
        let (channels, n) = (x.dim(2), x.dim(1));
        let input = ops::concatenate(&[past, x], 1)?;
        let moved = ffi::slice(&input, &[0, n, 0], &[1, input.dim(1), channels])?;
        let y = ops::conv1d(&input, &self.weight, 1, 0, 1, channels)?;
        let y = self.bias.as_ref().map_or(Ok(y.clone()), |bias| ops::add(&y, bias))?;
        Ok((y, moved))
    }
}

//! Causal depthwise convolution over time, with what it remembers of the tokens before.

use crate::{error::LmError, ffi, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::ConvolutionSpec;
use mlx_rs::{Array, Dtype, ops};

#[derive(Debug, Clone)]
pub(super) struct Convolution {
    /// `[kernel, channels]`
    taps: Array,
    bias: Option<Array>,
}
parameters!(Convolution: taps, bias);

impl Convolution {
    pub(super) fn load(weights: &mut Weights, spec: &ConvolutionSpec) -> Result<Self, LmError> {
        let weight = weights.take(&format!("{}.weight", spec.path))?;
        let taps = weight.squeeze_axes(&[2])?.t().contiguous()?;
        let bias = spec.bias.then(|| weights.take(&format!("{}.bias", spec.path))).transpose()?;
        Ok(Self { taps, bias })
    }

    /// The inputs of the `kernel - 1` tokens before the first: zeros `[1, kernel - 1, channels]`.
    pub(super) fn initial_state(&self, dtype: Dtype) -> Result<Array, LmError> {
        Ok(ops::zeros_dtype(&[1, self.taps.dim(0) - 1, self.taps.dim(1)], dtype)?)
    }

    /// `x` `[1, n, channels]` after the inputs `past`: `[1, n, channels]`, and the past of the next token.
    pub(super) fn forward(&self, x: &Array, past: &Array) -> Result<(Array, Array), LmError> {
        let (channels, n) = (x.dim(2), x.dim(1));
        let input = ops::concatenate(&[past, x], 1)?;
        let moved = ffi::slice(&input, &[0, n, 0], &[1, input.dim(1), channels])?;
        let y = match n {
            // Elementwise, so that it is compiled into what follows.
            1 => self.last(&input)?,
            _ => ops::conv1d(&input, self.taps.t().expand_dims(-1)?, 1, 0, 1, channels)?,
        };
        let y = self.bias.as_ref().map_or(Ok(y.clone()), |bias| ops::add(&y, bias))?;
        Ok((y, moved))
    }

    /// `input` `[1, kernel, channels]`: what comes out at its last token.
    fn last(&self, input: &Array) -> Result<Array, LmError> {
        let (kernel, channels) = (self.taps.dim(0), self.taps.dim(1));
        let mut sum = None;
        for tap in 0..kernel {
            let value = ffi::slice(input, &[0, tap, 0], &[1, tap + 1, channels])?.as_dtype(Dtype::Float32)?;
            let product = ops::multiply(value, ffi::slice(&self.taps, &[tap, 0], &[tap + 1, channels])?)?;
            sum = Some(match sum {
                Some(sum) => ops::add(&sum, product)?,
                None => product,
            });
        }
        let sum = sum.ok_or_else(|| LmError::Mlx("a convolution without a kernel".into()))?;
        Ok(sum.as_dtype(input.dtype())?)
    }
}

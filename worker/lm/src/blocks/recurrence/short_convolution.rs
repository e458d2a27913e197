//! `output(c · convolution(b · x))` (LFM 2).

use super::{convolution::Convolution, only};
use crate::{blocks::mixer::Projected, error::LmError, linear::Linear, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::{Quantization, ShortConvolutionSpec};
use mlx_rs::{Array, Dtype, ops};

/// Before the state: `b · x` goes to the convolution, `c` past it.
#[derive(Debug, Clone)]
pub(crate) struct ShortConvolutionProject {
    input: Linear,
}
parameters!(ShortConvolutionProject: input);

#[derive(Debug, Clone)]
pub struct ShortConvolution {
    convolution: Convolution,
}
parameters!(ShortConvolution: convolution);

#[derive(Debug, Clone)]
pub(crate) struct ShortConvolutionMerge {
    output: Linear,
}
parameters!(ShortConvolutionMerge: output);

impl ShortConvolutionProject {
    pub(in crate::blocks) const ARITY: (usize, usize) = (1, 1);

    pub(in crate::blocks) fn load(
        weights: &mut Weights,
        spec: &ShortConvolutionSpec,
        quantization: &Quantization,
    ) -> Result<Self, LmError> {
        Ok(Self { input: Linear::load(weights, &spec.input, quantization)? })
    }

    pub(in crate::blocks) fn forward(&self, x: &Array) -> Result<Projected, LmError> {
        let parts = self.input.forward(x)?.split_equal(3, -1)?;
        Ok(Projected { mixed: vec![ops::multiply(&parts[0], &parts[2])?], beside: vec![parts[1].clone()] })
    }
}

impl ShortConvolution {
    pub(in crate::blocks) fn load(weights: &mut Weights, spec: &ShortConvolutionSpec) -> Result<Self, LmError> {
        Ok(Self { convolution: Convolution::load(weights, &spec.convolution)? })
    }

    pub(super) fn initial_state(&self, dtype: Dtype) -> Result<Vec<Array>, LmError> {
        Ok(vec![self.convolution.initial_state(dtype)?])
    }

    pub(super) fn step(&self, rows: &[Array], state: &[Array]) -> Result<(Array, Vec<Array>), LmError> {
        let (y, moved) = self.convolution.forward(only(rows)?, only(state)?)?;
        Ok((y, vec![moved]))
    }
}

impl ShortConvolutionMerge {
    pub(in crate::blocks) fn load(
        weights: &mut Weights,
        spec: &ShortConvolutionSpec,
        quantization: &Quantization,
    ) -> Result<Self, LmError> {
        Ok(Self { output: Linear::load(weights, &spec.output, quantization)? })
    }

    /// `beside` is `c`.
    pub(in crate::blocks) fn forward(&self, y: &Array, beside: &[Array]) -> Result<Array, LmError> {
        self.output.forward(&ops::multiply(only(beside)?, y)?)
    }
}

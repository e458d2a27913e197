//! Several residual streams, one of which each layer works on: AltUp (Baykal et al. 2023) with LAuReL (Menghani et al. 2024). Streams stand
//! side by side on the last axis: `[B, L, n · D]`.

use super::norm::Norm;
use crate::{error::LmError, ffi, linear::Linear, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::{AlternatingUpdatesSpec, LinearSpec, Quantization};
use mlx_rs::{Array, Dtype, ops};
use std::f32::consts::FRAC_1_SQRT_2;

/// Before a layer: guesses the streams after it.
#[derive(Debug, Clone)]
pub(super) struct Predict {
    modalities: Modalities,
    /// `[n², n]`, f32.
    coefficients: Array,
    laurel: Laurel,
}
parameters!(Predict: modalities, coefficients, laurel);

/// After a layer: mends the guess by what the layer has made of the active stream.
#[derive(Debug, Clone)]
pub(super) struct Correct {
    modalities: Modalities,
    /// `[n, n]`, f32.
    coefficients: Array,
    output_scale: Option<Array>,
}
parameters!(Correct: modalities, coefficients, output_scale);

pub(super) fn load(
    weights: &mut Weights,
    spec: &AlternatingUpdatesSpec,
    quantization: &Quantization,
) -> Result<(Predict, Correct), LmError> {
    let modalities = Modalities {
        norm: Norm::load(weights, &spec.router_norm)?,
        router: Linear::load(weights, &spec.modality_router, quantization)?,
        n: spec.n_streams as i32,
        active: spec.active as i32,
    };
    let predict = Predict {
        modalities: modalities.clone(),
        coefficients: coefficients(weights, &spec.prediction, spec.coefficient_clip)?,
        laurel: Laurel {
            left: Linear::load(weights, &spec.laurel_left, quantization)?,
            right: Linear::load(weights, &spec.laurel_right, quantization)?,
            norm: Norm::load(weights, &spec.laurel_norm)?,
        },
    };
    let output_scale = spec.correct_output_scale.as_ref().map(|scale| weights.take(&scale.name)).transpose()?;
    Ok((predict, Correct { modalities, coefficients: coefficients(weights, &spec.correction, spec.coefficient_clip)?, output_scale }))
}

/// A matrix that is used in f32; its rows are too short for the groups of any quantisation.
fn coefficients(weights: &mut Weights, spec: &LinearSpec, clip: Option<f32>) -> Result<Array, LmError> {
    let weight = weights.take(&format!("{}.weight", spec.path))?.as_dtype(Dtype::Float32)?;
    match clip {
        Some(bound) => Ok(ops::clip(weight, (&Array::from_f32(-bound), &Array::from_f32(bound)))?),
        None => Ok(weight),
    }
}

impl Predict {
    /// `[B, L, n · D] -> [B, L, n · D]`: each stream plus a mixture of all.
    pub(super) fn forward(&self, x: &Array) -> Result<Array, LmError> {
        let Modalities { n, .. } = self.modalities;
        let (batch, length) = (x.dim(0), x.dim(1));
        let modalities = self.modalities.forward(&self.active(x)?)?;
        let mixture = ops::matmul(modalities, self.coefficients.t())?.reshape(&[batch, length, n, n])?;
        let streams = x.reshape(&[batch, length, n, -1])?.as_dtype(Dtype::Float32)?;
        let predicted = ops::add(ops::matmul(mixture, &streams)?, &streams)?;
        Ok(predicted.as_dtype(x.dtype())?.reshape(x.shape())?)
    }

    /// The stream that the layer works on, `[B, L, D]`.
    pub(super) fn active(&self, streams: &Array) -> Result<Array, LmError> {
        self.modalities.active(streams)
    }

    /// A low-rank path around the mixer: `x + norm(right(left(x)))`.
    pub(super) fn laurel(&self, normed: &Array) -> Result<Array, LmError> {
        let Laurel { left, right, norm } = &self.laurel;
        Ok(ops::add(normed, norm.forward(&right.forward(&left.forward(normed)?)?)?)?)
    }
}

impl Correct {
    /// The active stream after the mixer, `[B, L, D]`.
    pub(super) fn mixed(&self, predicted: &Array, mixed: Option<&Array>, laurel: &Array) -> Result<Array, LmError> {
        let active = self.modalities.active(predicted)?;
        let gated = mixed.map_or(Ok(active.clone()), |mixed| ops::add(&active, mixed))?;
        let sum = ops::add(gated, laurel)?;
        Ok(ops::multiply(&sum, Array::from_f32(FRAC_1_SQRT_2).as_dtype(sum.dtype())?)?)
    }

    /// All streams after the layer, `[B, L, n · D]`. `activated` `[B, L, D]` is what it has made of the active one; `layer_input` is given
    /// that stream corrected, and what it gives is added to all streams but the first.
    pub(super) fn forward(
        &self,
        predicted: &Array,
        activated: &Array,
        layer_input: impl FnOnce(&Array) -> Result<Option<Array>, LmError>,
    ) -> Result<Array, LmError> {
        let Modalities { n, .. } = self.modalities;
        let (batch, length) = (activated.dim(0), activated.dim(1));
        let modalities = self.modalities.forward(activated)?;
        let factors = ops::add(ops::matmul(modalities, self.coefficients.t())?, Array::from_f32(1.0))?.expand_dims(-1)?;
        let innovation = ops::subtract(activated, self.modalities.active(predicted)?)?.expand_dims(2)?;
        let streams = predicted.reshape(&[batch, length, n, -1])?;
        let corrected = ops::add(ops::multiply(innovation, factors)?, streams)?.as_dtype(activated.dtype())?;
        let corrected = corrected.reshape(predicted.shape())?;
        let active = self.modalities.active(&corrected)?;
        let active = self.output_scale.as_ref().map_or(Ok(active.clone()), |scale| ops::multiply(&active, scale))?;
        let Some(input) = layer_input(&active)? else {
            return Ok(corrected);
        };
        let mut streams = corrected.split_equal(n, -1)?;
        for stream in &mut streams[1..] {
            *stream = ops::add(&*stream, &input)?;
        }
        Ok(ops::concatenate(&streams, -1)?)
    }
}

/// What the coefficients are linear in.
#[derive(Debug, Clone)]
struct Modalities {
    norm: Norm,
    router: Linear,
    n: i32,
    active: i32,
}
parameters!(Modalities: norm, router);

impl Modalities {
    /// `[B, L, D] -> [B, L, n]` in f32.
    fn forward(&self, x: &Array) -> Result<Array, LmError> {
        let normed = self.norm.forward(x)?;
        let scale = Array::from_f32(1.0 / x.dim(-1) as f32).as_dtype(normed.dtype())?;
        let routed = self.router.forward(&ops::multiply(normed, scale)?)?;
        Ok(ops::tanh(routed.as_dtype(Dtype::Float32)?)?)
    }

    fn active(&self, streams: &Array) -> Result<Array, LmError> {
        let (batch, length, dims) = (streams.dim(0), streams.dim(1), streams.dim(2) / self.n);
        ffi::slice(streams, &[0, 0, self.active * dims], &[batch, length, (self.active + 1) * dims])
    }
}

#[derive(Debug, Clone)]
struct Laurel {
    left: Linear,
    right: Linear,
    norm: Norm,
}
parameters!(Laurel: left, right, norm);

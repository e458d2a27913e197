//! How the outputs of a layer's mixer and feed-forward join the residual stream.

use super::alternating_updates::{self, Correct, Predict};
use crate::{error::LmError, parameters::Parameters, served::Adaptable, weights::Weights};
use mlx_cluster_common::spec::{Quantization, Residual};
use mlx_rs::{Array, Dtype, ops};

/// Before the mixer: what of the stream the layer works on, and what it keeps for the end.
#[derive(Debug, Clone)]
pub(super) enum Split {
    Plain,
    /// The normed stream goes past the mixer to the feed-forward.
    Parallel,
    /// Predictions of all streams and the low-rank path go past the mixer.
    Streams(Box<Predict>),
}

/// The stream that a layer works on.
pub(super) struct Active {
    pub(super) stream: Array,
    /// What `Split` has computed on the way.
    pub(super) kept: Vec<Array>,
}

/// After the mixer.
#[derive(Debug, Clone)]
pub(super) enum Join {
    Serial { multiplier: f32 },
    SerialClipped,
    Parallel,
    Streams(Box<Correct>),
}

pub(super) fn load(weights: &mut Weights, spec: &Residual, quantization: &Quantization) -> Result<(Split, Join), LmError> {
    Ok(match spec {
        Residual::Serial { multiplier } => (Split::Plain, Join::Serial { multiplier: *multiplier }),
        Residual::SerialClipped => (Split::Plain, Join::SerialClipped),
        Residual::Parallel => (Split::Parallel, Join::Parallel),
        Residual::AlternatingUpdates(spec) => {
            let (predict, correct) = alternating_updates::load(weights, spec, quantization)?;
            (Split::Streams(Box::new(predict)), Join::Streams(Box::new(correct)))
        }
    })
}

impl Split {
    /// How many arrays `beside` gives.
    pub(super) fn arity(&self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Parallel => 1,
            Self::Streams(_) => 2,
        }
    }

    /// `x` `[B, L, streams · D]`.
    pub(super) fn active(&self, x: &Array) -> Result<Active, LmError> {
        match self {
            Self::Plain | Self::Parallel => Ok(Active { stream: x.clone(), kept: Vec::new() }),
            Self::Streams(predict) => {
                let predicted = predict.forward(x)?;
                Ok(Active { stream: predict.active(&predicted)?, kept: vec![predicted] })
            }
        }
    }

    /// What goes past the mixer to `Join`.
    pub(super) fn beside(&self, active: Active, normed: &Array) -> Result<Vec<Array>, LmError> {
        let mut beside = active.kept;
        match self {
            Self::Plain => {}
            Self::Parallel => beside.push(normed.clone()),
            Self::Streams(predict) => beside.push(predict.laurel(normed)?),
        }
        Ok(beside)
    }
}

impl Join {
    /// The stream after the mixer, `[B, L, D]`; beside a feed-forward, what the mixer gives.
    pub(super) fn mixed(&self, x: &Array, mixed: Option<Array>, beside: &[Array]) -> Result<Array, LmError> {
        match (self, beside, mixed) {
            (Self::Streams(correct), [predicted, laurel], mixed) => correct.mixed(predicted, mixed.as_ref(), laurel),
            (Self::Parallel, _, mixed) => mixed.ok_or_else(|| LmError::Mlx("a parallel layer needs a mixer".into())),
            (_, _, Some(mixed)) => self.add(x, &mixed),
            (_, _, None) => Ok(x.clone()),
        }
    }

    /// What the feed-forward sees.
    pub(super) fn feed_forward_input(
        &self,
        h: &Array,
        beside: &[Array],
        norm: impl FnOnce(Array) -> Result<Array, LmError>,
    ) -> Result<Array, LmError> {
        match (self, beside) {
            (Self::Parallel, [normed, ..]) => Ok(normed.clone()),
            _ => norm(h.clone()),
        }
    }

    /// The stream after the feed-forward and the layer's own input, `[B, L, streams · D]`. `x` is the stream before the layer, `h` what
    /// `mixed` gave.
    pub(super) fn forwarded(
        &self,
        x: &Array,
        h: Array,
        forwarded: Option<Array>,
        beside: &[Array],
        layer_input: impl FnOnce(&Array) -> Result<Option<Array>, LmError>,
    ) -> Result<Array, LmError> {
        let y = match forwarded {
            Some(forwarded) => self.add(&h, &forwarded)?,
            None => h,
        };
        // In this order, as in 16 bits it matters: what the layer gives is small beside the stream.
        let y = if matches!(self, Self::Parallel) { self.add(&y, x)? } else { y };
        if let (Self::Streams(correct), [predicted, ..]) = (self, beside) {
            return correct.forward(predicted, &y, layer_input);
        }
        match layer_input(&y)? {
            Some(input) => Ok(ops::add(&y, &input)?),
            None => Ok(y),
        }
    }

    fn add(&self, x: &Array, y: &Array) -> Result<Array, LmError> {
        match self {
            Self::Serial { multiplier } if *multiplier != 1.0 => {
                Ok(ops::add(x, ops::multiply(y, Array::from_f32(*multiplier).as_dtype(y.dtype())?)?)?)
            }
            Self::SerialClipped if x.dtype() == Dtype::Float16 => {
                let bound = Array::from_f32(65504.0);
                let sum = ops::add(x.as_dtype(Dtype::Float32)?, y.as_dtype(Dtype::Float32)?)?;
                Ok(ops::clip(sum, (&bound.negative()?, &bound))?.as_dtype(Dtype::Float16)?)
            }
            _ => Ok(ops::add(x, y)?),
        }
    }
}

impl Parameters for Split {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        if let Self::Streams(predict) = self {
            predict.each(visit);
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        if let Self::Streams(predict) = self {
            predict.each_mut(visit);
        }
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        if let Self::Streams(predict) = self {
            predict.each_matrix(visit);
        }
    }
}

impl Parameters for Join {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        if let Self::Streams(correct) = self {
            correct.each(visit);
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        if let Self::Streams(correct) = self {
            correct.each_mut(visit);
        }
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        if let Self::Streams(correct) = self {
            correct.each_matrix(visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clipped_stream_stays_within_f16() {
        let sum = |dtype: Dtype| {
            let x = Array::from_slice(&[60_000.0f32, -60_000.0, 1.0], &[1, 1, 3]).as_dtype(dtype).expect("casts");
            let sum = Join::SerialClipped.add(&x, &x).expect("adds");
            assert_eq!(sum.dtype(), dtype);
            sum.as_dtype(Dtype::Float32).expect("casts").to_vec_exact::<f32>().expect("numbers")
        };
        assert_eq!(sum(Dtype::Float16), [65_504.0, -65_504.0, 2.0]);
        assert_eq!(sum(Dtype::Float32), [120_000.0, -120_000.0, 2.0]);
    }
}

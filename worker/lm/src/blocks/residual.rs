//! How the outputs of a layer's mixer and feed-forward join the residual stream.

use crate::{error::LmError, parameters::Parameters, weights::Weights};
use mlx_cluster_common::spec::{Quantization, Residual};
use mlx_rs::{Array, Dtype, ops};

/// Before the mixer: what of the stream the layer works on, and what it keeps for the end.
#[derive(Debug, Clone)]
pub enum Split {
    Plain,
    /// The normed stream goes past the mixer to the feed-forward.
    Parallel,
}

/// The stream that a layer works on.
pub struct Active {
    pub stream: Array,
    /// What `Split` has computed on the way.
    pub kept: Vec<Array>,
}

/// After the mixer.
#[derive(Debug, Clone)]
pub enum Join {
    Serial { multiplier: f32 },
    SerialClipped,
    Parallel,
}

pub(super) fn load(_weights: &mut Weights, spec: &Residual, _quantization: &Quantization) -> Result<(Split, Join), LmError> {
    Ok(match spec {
        Residual::Serial { multiplier } => (Split::Plain, Join::Serial { multiplier: *multiplier }),
        Residual::SerialClipped => (Split::Plain, Join::SerialClipped),
        Residual::Parallel => (Split::Parallel, Join::Parallel),
        other => return Err(LmError::Mlx(format!("no block for {other:?}"))),
    })
}

impl Split {
    /// How many arrays `beside` gives.
    pub fn arity(&self) -> usize {
        match self {
            Self::Plain => 0,
            Self::Parallel => 1,
        }
    }

    pub fn active(&self, x: &Array) -> Result<Active, LmError> {
        Ok(Active { stream: x.clone(), kept: Vec::new() })
    }

    /// What goes past the mixer to `Join`.
    pub fn beside(&self, active: Active, normed: &Array) -> Result<Vec<Array>, LmError> {
        match self {
            Self::Plain => Ok(active.kept),
            Self::Parallel => Ok(vec![normed.clone()]),
        }
    }
}

impl Join {
    /// The stream after the mixer.
    pub fn mixed(&self, x: &Array, mixed: Option<Array>, _beside: &[Array]) -> Result<Array, LmError> {
        match mixed {
            Some(mixed) => self.add(x, &mixed),
            None => Ok(x.clone()),
        }
    }

    /// What the feed-forward sees.
    pub fn feed_forward_input(
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

    /// The stream after the feed-forward and the layer's own input.
    pub fn forwarded(
        &self,
        h: Array,
        forwarded: Option<Array>,
        _beside: &[Array],
        layer_input: impl FnOnce(&Array) -> Result<Option<Array>, LmError>,
    ) -> Result<Array, LmError> {
        let y = match forwarded {
            Some(forwarded) => self.add(&h, &forwarded)?,
            None => h,
        };
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
    fn each<'a>(&'a self, _visit: &mut dyn FnMut(&'a Array)) {}

    fn each_mut(&mut self, _visit: &mut dyn FnMut(&mut Array)) {}
}

impl Parameters for Join {
    fn each<'a>(&'a self, _visit: &mut dyn FnMut(&'a Array)) {}

    fn each_mut(&mut self, _visit: &mut dyn FnMut(&mut Array)) {}
}

//! What each token goes through alone: an MLP, routed experts, or both.

use super::{activation, experts::Moe, norm::Norm};
use crate::{
    error::LmError,
    linear::Linear,
    parameters::{Parameters, parameters},
    served::Adaptable,
    weights::Weights,
};
use mlx_cluster_common::spec::{Activation, FeedForward, MlpInputs, MlpSpec, Quantization};
use mlx_rs::{Array, ops};

#[derive(Debug, Clone)]
pub(super) enum FeedForwardBlock {
    Mlp(Mlp),
    Experts(Box<Moe>),
    MlpAndExperts(Box<MlpAndExperts>),
}

impl FeedForwardBlock {
    /// None where the layer has no feed-forward.
    pub(super) fn load(weights: &mut Weights, spec: &FeedForward, quantization: &Quantization) -> Result<Option<Self>, LmError> {
        Ok(Some(match spec {
            FeedForward::None => return Ok(None),
            FeedForward::Mlp(spec) => Self::Mlp(Mlp::load(weights, spec, quantization)?),
            FeedForward::Experts(spec) => Self::Experts(Box::new(Moe::load(weights, spec, quantization)?)),
            FeedForward::MlpAndExperts { mlp, moe, dense_norm, before_routed, routed_norm } => {
                Self::MlpAndExperts(Box::new(MlpAndExperts {
                    mlp: Mlp::load(weights, mlp, quantization)?,
                    moe: Moe::load(weights, moe, quantization)?,
                    dense_norm: Norm::load(weights, dense_norm)?,
                    before_routed: Norm::load(weights, before_routed)?,
                    routed_norm: Norm::load(weights, routed_norm)?,
                }))
            }
        }))
    }

    /// `normed` is `stream` after the norm before the feed-forward: `[B, L, D] -> [B, L, D]`.
    pub(super) fn forward(&self, normed: &Array, stream: &Array) -> Result<Array, LmError> {
        match self {
            Self::Mlp(mlp) => mlp.forward(normed),
            Self::Experts(moe) => moe.forward(normed),
            Self::MlpAndExperts(both) => both.forward(normed, stream),
        }
    }
}

impl Parameters for FeedForwardBlock {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Self::Mlp(mlp) => mlp.each(visit),
            Self::Experts(moe) => moe.each(visit),
            Self::MlpAndExperts(both) => both.each(visit),
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Self::Mlp(mlp) => mlp.each_mut(visit),
            Self::Experts(moe) => moe.each_mut(visit),
            Self::MlpAndExperts(both) => both.each_mut(visit),
        }
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        match self {
            Self::Mlp(mlp) => mlp.each_matrix(visit),
            Self::Experts(moe) => moe.each_matrix(visit),
            Self::MlpAndExperts(both) => both.each_matrix(visit),
        }
    }
}

/// A dense MLP and routed experts beside it, each with norms of its own.
#[derive(Debug, Clone)]
pub(super) struct MlpAndExperts {
    mlp: Mlp,
    moe: Moe,
    dense_norm: Norm,
    before_routed: Norm,
    routed_norm: Norm,
}
parameters!(MlpAndExperts: mlp, moe, dense_norm, before_routed, routed_norm);

impl MlpAndExperts {
    fn forward(&self, normed: &Array, stream: &Array) -> Result<Array, LmError> {
        let dense = self.dense_norm.forward(&self.mlp.forward(normed)?)?;
        let routed = self.moe.forward_with_router_input(&self.before_routed.forward(stream)?, stream)?;
        Ok(ops::add(dense, self.routed_norm.forward(&routed)?)?)
    }
}

/// `down(activation(gate(x)) · up(x))`, or `down(activation(up(x)))`.
#[derive(Debug, Clone)]
pub(super) struct Mlp {
    inputs: Vec<Linear>,
    /// One linear gives gate and `up`.
    is_fused: bool,
    activation: Activation,
    down: Linear,
}
parameters!(Mlp: inputs, down);

impl Mlp {
    pub(super) fn load(weights: &mut Weights, spec: &MlpSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let mut load = |linear| Linear::load(weights, linear, quantization);
        let (inputs, is_fused) = match &spec.inputs {
            MlpInputs::Gated { gate, up } => (vec![load(gate)?, load(up)?], false),
            MlpInputs::GatedFused(linear) => (vec![load(linear)?], true),
            MlpInputs::Plain(linear) => (vec![load(linear)?], false),
        };
        Ok(Self { inputs, is_fused, activation: spec.activation, down: load(&spec.down)? })
    }

    /// Leaves the sum over the ranks to the caller; None when there is nothing to sum.
    pub(super) fn without_sum(self) -> Option<Self> {
        let down = self.down.without_sum()?;
        Some(Self { down, ..self })
    }

    pub(super) fn forward(&self, x: &Array) -> Result<Array, LmError> {
        let inner = match self.inputs.as_slice() {
            [gate, up] => activation::gated(self.activation, &gate.forward(x)?, &up.forward(x)?)?,
            [fused] if self.is_fused => {
                let parts = fused.forward(x)?.split_equal(2, -1)?;
                activation::gated(self.activation, &parts[0], &parts[1])?
            }
            [up] => activation::plain(self.activation, &up.forward(x)?)?,
            _ => return Err(LmError::Mlx("an MLP has one or two input linears".into())),
        };
        self.down.forward(&inner)
    }
}

//! Norms over the last axis.

use crate::{error::LmError, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::{NormKind, NormSpec};
use mlx_rs::{Array, fast, ops};

#[derive(Debug, Clone)]
pub(super) struct Norm {
    kind: NormKind,
    weight: Option<Array>,
    bias: Option<Array>,
    eps: f32,
}
parameters!(Norm: weight, bias);

impl Norm {
    pub(super) fn load(weights: &mut Weights, spec: &NormSpec) -> Result<Self, LmError> {
        let weight = match spec.kind {
            NormKind::RmsUnweighted | NormKind::LayerUnweighted => None,
            NormKind::Rms { offset } if offset != 0.0 => {
                let weight = weights.take(&format!("{}.weight", spec.path))?;
                Some(ops::add(Array::from_f32(offset).as_dtype(weight.dtype())?, &weight)?)
            }
            NormKind::Rms { .. } | NormKind::Layer { .. } => Some(weights.take(&format!("{}.weight", spec.path))?),
        };
        let bias = match spec.kind {
            NormKind::Layer { bias: true } => Some(weights.take(&format!("{}.bias", spec.path))?),
            _ => None,
        };
        Ok(Self { kind: spec.kind, weight, bias, eps: spec.eps })
    }

    pub(super) fn load_optional(weights: &mut Weights, spec: &Option<NormSpec>) -> Result<Option<Self>, LmError> {
        spec.as_ref().map(|spec| Norm::load(weights, spec)).transpose()
    }

    pub(super) fn forward(&self, x: &Array) -> Result<Array, LmError> {
        Ok(match self.kind {
            NormKind::Rms { .. } | NormKind::RmsUnweighted => fast::rms_norm(x, self.weight.as_ref(), self.eps)?,
            NormKind::Layer { .. } | NormKind::LayerUnweighted => fast::layer_norm(x, self.weight.as_ref(), self.bias.as_ref(), self.eps)?,
        })
    }
}

//! How a gate and a norm act on what comes out of a scan.

use crate::{blocks::norm::Norm, error::LmError, parameters::parameters, weights::Weights};
use mlx_cluster_common::spec::{self, NormSpec};
use mlx_rs::{Array, fast, nn, ops};

#[derive(Debug, Clone)]
pub(super) struct GatedNorm {
    norm: Option<Norm>,
    /// The norm's weights where it goes over parts of the width.
    weight: Option<Array>,
    order: Order,
}
parameters!(GatedNorm: norm, weight);

#[derive(Debug, Clone, Copy)]
enum Order {
    GateAlone,
    GateFirst,
    /// The norm goes over each of `groups` equal parts.
    GateFirstByGroup {
        groups: i32,
        eps: f32,
    },
    NormFirst,
}

impl GatedNorm {
    pub(super) fn load(weights: &mut Weights, spec: &spec::GatedNorm) -> Result<Self, LmError> {
        let mut whole = |norm: &NormSpec, order| Ok(Self { norm: Some(Norm::load(weights, norm)?), weight: None, order });
        match spec {
            spec::GatedNorm::None => Ok(Self { norm: None, weight: None, order: Order::GateAlone }),
            spec::GatedNorm::GateThenNorm { norm, groups: 1 } => whole(norm, Order::GateFirst),
            spec::GatedNorm::GateThenNorm { norm, groups } => {
                let order = Order::GateFirstByGroup { groups: *groups as i32, eps: norm.eps };
                Ok(Self { norm: None, weight: Some(weights.take(&format!("{}.weight", norm.path))?), order })
            }
            spec::GatedNorm::NormThenGate { norm } => whole(norm, Order::NormFirst),
        }
    }

    /// `y` and `gate` `[.., width]`.
    pub(super) fn forward(&self, y: &Array, gate: &Array) -> Result<Array, LmError> {
        let gated = |y: &Array| Ok::<_, LmError>(ops::multiply(nn::silu(gate)?, y)?);
        let normed = |y: Array| self.norm.as_ref().map_or(Ok(y.clone()), |norm| norm.forward(&y));
        match self.order {
            Order::GateAlone | Order::GateFirst => normed(gated(y)?),
            Order::NormFirst => gated(&normed(y.clone())?),
            Order::GateFirstByGroup { groups, eps } => {
                let gated = gated(y)?;
                let (batch, length) = (gated.dim(0), gated.dim(1));
                let normed = fast::rms_norm(gated.reshape(&[batch, length, groups, -1])?, None, eps)?.reshape(gated.shape())?;
                self.weight.as_ref().map_or(Ok(normed.clone()), |weight| Ok(ops::multiply(weight, &normed)?))
            }
        }
    }
}

//! What each token goes through alone: a gated MLP, or the experts that its router picks.

use crate::{
    error::LmError,
    linear::{Experts, Linear, Parameters},
    weights::Weights,
};
use mlx_cluster_common::spec::{FeedForward, MlpSpec, MoeSpec, Quantization, RouterScoring};
use mlx_rs::{Array, nn, ops};

/// From this many routed rows on, rows are sorted by expert, so that each expert's weights are read once (as in mlx-lm).
const SORT_FROM: i32 = 64;

#[derive(Debug, Clone)]
pub enum FeedForwardBlock {
    Mlp(Mlp),
    Experts(Moe),
}

impl FeedForwardBlock {
    pub fn load(weights: &mut Weights, spec: &FeedForward, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(match spec {
            FeedForward::Mlp(spec) => Self::Mlp(Mlp::load(weights, spec, quantization)?),
            FeedForward::Experts(spec) => Self::Experts(Moe::load(weights, spec, quantization)?),
        })
    }

    /// `[B, L, D] -> [B, L, D]`.
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
        match self {
            Self::Mlp(mlp) => mlp.forward(x),
            Self::Experts(moe) => moe.forward(x),
        }
    }

    pub(super) fn signature(&self) -> String {
        match self {
            Self::Mlp(_) => "mlp".into(),
            Self::Experts(moe) => format!("{:?} {}", moe.scoring, moe.top_k),
        }
    }
}

impl Parameters for FeedForwardBlock {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Self::Mlp(mlp) => [&mlp.gate, &mlp.up, &mlp.down].into_iter().for_each(|linear| linear.each(visit)),
            Self::Experts(moe) => {
                moe.router.each(visit);
                [&moe.gate, &moe.up, &moe.down].into_iter().for_each(|experts| experts.each(visit));
            }
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Self::Mlp(mlp) => [&mut mlp.gate, &mut mlp.up, &mut mlp.down].into_iter().for_each(|linear| linear.each_mut(visit)),
            Self::Experts(moe) => {
                moe.router.each_mut(visit);
                [&mut moe.gate, &mut moe.up, &mut moe.down].into_iter().for_each(|experts| experts.each_mut(visit));
            }
        }
    }
}

/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn load(weights: &mut Weights, spec: &MlpSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            gate: Linear::load(weights, &spec.gate, quantization)?,
            up: Linear::load(weights, &spec.up, quantization)?,
            down: Linear::load(weights, &spec.down, quantization)?,
        })
    }

    fn forward(&self, x: &Array) -> Result<Array, LmError> {
        self.down.forward(&swiglu(&self.gate.forward(x)?, &self.up.forward(x)?)?)
    }
}

fn swiglu(gate: &Array, up: &Array) -> Result<Array, LmError> {
    Ok(ops::multiply(nn::silu(gate)?, up)?)
}

/// Mixture of experts with a linear router.
#[derive(Debug, Clone)]
pub struct Moe {
    router: Linear,
    scoring: RouterScoring,
    top_k: i32,
    gate: Experts,
    up: Experts,
    down: Experts,
}

impl Moe {
    fn load(weights: &mut Weights, spec: &MoeSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            router: Linear::load(weights, &spec.router, quantization)?,
            scoring: spec.scoring,
            top_k: spec.top_k as i32,
            gate: Experts::load(weights, &spec.gate, false, quantization)?,
            up: Experts::load(weights, &spec.up, false, quantization)?,
            down: Experts::load(weights, &spec.down, false, quantization)?,
        })
    }

    fn forward(&self, x: &Array) -> Result<Array, LmError> {
        let (indices, scores) = self.route(x)?;
        let y = self.experts(x, &indices)?;
        let weighted = ops::multiply(&y, scores.expand_dims(-1)?)?.sum_axis(-2, false)?;
        Ok(weighted.as_dtype(y.dtype())?)
    }

    /// The experts of each token `[B, L, k]` and their weights.
    fn route(&self, x: &Array) -> Result<(Array, Array), LmError> {
        let logits = self.router.forward(x)?;
        let (n_experts, k) = (logits.dim(-1), self.top_k);
        match self.scoring {
            RouterScoring::SoftmaxThenTopK { renormalise } => {
                let probabilities = ops::softmax_axis(&logits, -1, true)?;
                let indices = ops::argpartition_axis(&probabilities, n_experts - k, -1)?;
                let indices = indices.split_at_indices(&[n_experts - k], -1)?.swap_remove(1);
                let scores = probabilities.take_along_axis(&indices, -1)?;
                let scores = match renormalise {
                    true => ops::divide(&scores, scores.sum_axis(-1, true)?)?,
                    false => scores,
                };
                Ok((indices, scores))
            }
            RouterScoring::TopKThenSoftmax => {
                let indices = ops::argpartition_axis(logits.negative()?, k - 1, -1)?;
                let indices = indices.split_at_indices(&[k], -1)?.swap_remove(0);
                let scores = logits.take_along_axis(&indices, -1)?;
                Ok((indices, ops::softmax_axis(scores, -1, true)?))
            }
        }
    }

    /// `x` `[B, L, D]` through the experts `indices` `[B, L, k]`: `[B, L, k, D]`.
    fn experts(&self, x: &Array, indices: &Array) -> Result<Array, LmError> {
        let x = x.expand_dims_axes(&[-2, -3])?;
        if (indices.size() as i32) < SORT_FROM {
            return Ok(self.gated(&x, indices, false)?.squeeze_axes(&[-2])?);
        }
        let flat = indices.flatten(None, None)?;
        let order = ops::argsort_axis(&flat, -1)?;
        let back = ops::argsort_axis(&order, -1)?;
        let row = ops::floor_divide(&order, Array::from_int(self.top_k).as_dtype(order.dtype())?)?;
        let sorted = x.reshape(&[-1, 1, x.dim(-1)])?.take_axis(row, 0)?;
        let y = self.gated(&sorted, &flat.take_axis(&order, 0)?, true)?.take_axis(back, 0)?;
        let shape = [indices.shape(), &[y.dim(-1)]].concat();
        Ok(y.reshape(&shape)?)
    }

    fn gated(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        let (up, gate) = (self.up.forward(x, indices, sorted)?, self.gate.forward(x, indices, sorted)?);
        self.down.forward(&swiglu(&gate, &up)?, indices, sorted)
    }
}

//! The nonlinearities of MLPs.

use crate::error::LmError;
use mlx_cluster_common::spec::Activation;
use mlx_rs::{Array, nn, ops};

/// `activation(x)`
pub(super) fn plain(activation: Activation, x: &Array) -> Result<Array, LmError> {
    Ok(match activation {
        Activation::Silu => nn::silu(x)?,
        Activation::Gelu => nn::gelu(x)?,
        Activation::GeluTanh => nn::gelu_approximate(x)?,
        Activation::Relu => nn::relu(x)?,
        Activation::ReluSquared => nn::relu(x)?.square()?,
        Activation::SparseGeluTanh { std_multiplier } => {
            let mean = x.mean_axis(-1, true)?;
            let deviation = ops::std_axis(x, -1, true, None)?;
            let cutoff = ops::add(mean, ops::multiply(&deviation, scalar(std_multiplier, &deviation)?)?)?;
            nn::gelu_approximate(ops::maximum(scalar(0.0, x)?, ops::subtract(x, cutoff)?)?)?
        }
        Activation::ClippedSwiGlu { .. } | Activation::ClampedSwiGlu { .. } => {
            return Err(LmError::Mlx("a clipped SwiGLU needs a gate and a value".into()));
        }
    })
}

/// `activation(gate) · up`
pub(super) fn gated(activation: Activation, gate: &Array, up: &Array) -> Result<Array, LmError> {
    Ok(match activation {
        Activation::ClippedSwiGlu { alpha, limit } => {
            let gate = ops::minimum(gate, scalar(limit, gate)?)?;
            let up = ops::clip(up, (&scalar(-limit, up)?, &scalar(limit, up)?))?;
            let sigmoid = ops::sigmoid(ops::multiply(&gate, scalar(alpha, &gate)?)?)?;
            ops::multiply(ops::multiply(&gate, sigmoid)?, ops::add(&up, scalar(1.0, &up)?)?)?
        }
        Activation::ClampedSwiGlu { limit } => {
            let gate = ops::minimum(nn::silu(gate)?, scalar(limit, gate)?)?;
            ops::multiply(gate, ops::clip(up, (&scalar(-limit, up)?, &scalar(limit, up)?))?)?
        }
        _ => ops::multiply(plain(activation, gate)?, up)?,
    })
}

fn scalar(value: f32, like: &Array) -> Result<Array, LmError> {
    Ok(Array::from_f32(value).as_dtype(like.dtype())?)
}

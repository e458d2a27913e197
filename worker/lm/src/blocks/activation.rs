//! The nonlinearities of MLPs.

use crate::error::LmError;
use mlx_cluster_common::spec::Activation;
use mlx_rs::{Array, error::Exception, nn, ops, transforms::compile::compile};
use std::f64::consts::{FRAC_2_PI, SQRT_2};

/// `activation(x)`
pub(super) fn plain(activation: Activation, x: &Array) -> Result<Array, LmError> {
    Ok(match activation {
        Activation::Silu => nn::silu(x)?,
        Activation::Gelu => gelu(x)?,
        Activation::GeluTanh => gelu_tanh(x)?,
        Activation::Relu => nn::relu(x)?,
        Activation::ReluSquared => nn::relu(x)?.square()?,
        Activation::SparseGeluTanh { std_multiplier } => {
            let mean = x.mean_axis(-1, true)?;
            let deviation = ops::std_axis(x, -1, true, None)?;
            let cutoff = ops::add(mean, ops::multiply(&deviation, scalar(std_multiplier, &deviation)?)?)?;
            gelu_tanh(&ops::maximum(scalar(0.0, x)?, ops::subtract(x, cutoff)?)?)?
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

/// `x · (1 + erf(x / sqrt(2))) / 2`, in the type of `x`: the one of mlx-rs gives f32 for all.
fn gelu(x: &Array) -> Result<Array, LmError> {
    let formula = |x: &Array| {
        let erf = ops::erf(ops::divide(x, scalar(SQRT_2 as f32, x)?)?)?;
        ops::divide(ops::multiply(x, ops::add(scalar(1.0, x)?, erf)?)?, scalar(2.0, x)?)
    };
    Ok(compile(formula, true)(x)?)
}

/// `x / 2 · (1 + tanh(sqrt(2 / π) · (x + 0.044715 · x³)))`, in the type of `x`.
pub(super) fn gelu_tanh(x: &Array) -> Result<Array, LmError> {
    let formula = |x: &Array| {
        let cubic = ops::multiply(scalar(0.044715, x)?, ops::power(x, scalar(3.0, x)?)?)?;
        let inner = ops::multiply(scalar(FRAC_2_PI.sqrt() as f32, x)?, ops::add(x, cubic)?)?;
        ops::multiply(ops::multiply(scalar(0.5, x)?, x)?, ops::add(scalar(1.0, x)?, ops::tanh(inner)?)?)
    };
    Ok(compile(formula, true)(x)?)
}

fn scalar(value: f32, like: &Array) -> Result<Array, Exception> {
    Array::from_f32(value).as_dtype(like.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::Dtype;

    #[test]
    fn every_activation_keeps_the_type_of_its_input() {
        let activations =
            [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared, SPARSE, CLIPPED, CLAMPED];
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            let x = Array::from_slice(&[-2.0f32, -0.5, 0.0, 3.0], &[1, 4]).as_dtype(dtype).expect("casts");
            for activation in activations {
                assert_eq!(gated(activation, &x, &x).expect("computes").dtype(), dtype, "{activation:?}");
            }
        }
    }

    const SPARSE: Activation = Activation::SparseGeluTanh { std_multiplier: 1.6 };
    const CLIPPED: Activation = Activation::ClippedSwiGlu { alpha: 1.7, limit: 7.0 };
    const CLAMPED: Activation = Activation::ClampedSwiGlu { limit: 7.0 };

    // The numbers are those of mlx-lm's functions.
    #[test]
    fn clipped_gates() {
        let gate = Array::from_slice(&[-9.0f32, -1.0, 0.0, 0.5, 2.0, 6.9, 7.5], &[7]);
        let up = Array::from_slice(&[3.0f32, -8.0, 0.5, -0.5, 9.0, 1.0, -7.0], &[7]);
        for (activation, wanted) in [
            (
                Activation::ClippedSwiGlu { alpha: 1.702, limit: 7.0 },
                [-0.000_008, 0.925_225_4, 0.0, 0.175_194_2, 15.485_269, 13.799_89, -41.999_718f32],
            ),
            (Activation::ClampedSwiGlu { limit: 2.0 }, [-0.002_221_1, 0.537_882_9, 0.0, -0.155_614_8, 3.523_188_4, 2.0, -4.0]),
        ] {
            let found = gated(activation, &gate, &up).expect("activates");
            assert!(found.all_close(Array::from_slice(&wanted, &[7]), 1e-5, 1e-6, None).expect("compares"), "{activation:?}: {found:?}");
            assert!(plain(activation, &gate).is_err());
        }
    }
}

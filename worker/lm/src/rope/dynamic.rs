//! RoPE whose base grows with the position (dynamic NTK scaling).

use crate::error::LmError;
use mlx_rs::{Array, Dtype, error::Exception, ops};

/// mlx-lm takes the base from the length of the whole call (`x.shape[-2] + offset`), so there a prompt that reaches past
/// `max_position_embeddings` gives other numbers when it is cut into other chunks. Here each token has the base of its own position: the
/// same as mlx-lm's for every token of a chunk that ends within `max_position_embeddings` and for every single-token step beyond it, and
/// the same however a prompt is cut.
///
/// Angles and the rotation are in single precision, as in MLX's Metal kernel.
#[derive(Debug, Clone)]
pub(super) struct DynamicNtk {
    dims: i32,
    /// `ln(theta)`, and what rounding took from it.
    log_theta: f32,
    log_theta_rest: f32,
    /// `dims / (dims - 2)`
    exponent: f32,
    /// `factor / max_position_embeddings`
    growth: f32,
    max_position_embeddings: f32,
}

impl DynamicNtk {
    pub(super) fn new(dims: u32, theta: f32, factor: f64, max_position_embeddings: u32) -> Self {
        let log_theta = theta.ln();
        let dims_f64 = f64::from(dims);
        DynamicNtk {
            dims: dims as i32,
            log_theta,
            log_theta_rest: (f64::from(theta).ln() - f64::from(log_theta)) as f32,
            exponent: (dims_f64 / (dims_f64 - 2.0)) as f32,
            growth: (factor / f64::from(max_position_embeddings)) as f32,
            max_position_embeddings: max_position_embeddings as f32,
        }
    }

    /// `x` `[B, H, L, head_dim]`, `offsets` `[B]`.
    pub(super) fn rotate(&self, x: &Array, offsets: &Array, interleaved: bool) -> Result<Array, LmError> {
        let angles = self.angles(x.dim(2), offsets)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let (batch, heads, length, head_dim) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
        let parts = x.split_at_indices(&[self.dims], -1)?;
        let rotated = parts[0].as_dtype(Dtype::Float32)?;
        let half = [batch, heads, length, self.dims / 2];
        let pairs = match interleaved {
            true => rotated.reshape(&[batch, heads, length, self.dims / 2, 2])?.split_equal(2, -1)?,
            false => rotated.split_equal(2, -1)?,
        };
        let (first, second) = (pairs[0].reshape(&half)?, pairs[1].reshape(&half)?);
        let turned = [
            ops::subtract(ops::multiply(&first, &cos)?, ops::multiply(&second, &sin)?)?,
            ops::add(ops::multiply(&first, &sin)?, ops::multiply(&second, &cos)?)?,
        ];
        let turned = match interleaved {
            true => ops::stack(&turned, -1)?.reshape(&[batch, heads, length, self.dims])?,
            false => ops::concatenate(&turned, -1)?,
        };
        let turned = turned.as_dtype(x.dtype())?;
        match head_dim == self.dims {
            true => Ok(turned),
            false => Ok(ops::concatenate(&[turned, parts[1].clone()], -1)?),
        }
    }

    /// `[B, 1, L, dims / 2]`
    fn angles(&self, length: i32, offsets: &Array) -> Result<Array, Exception> {
        let steps = Array::from_iter((0..length).map(|i| i as f32), &[length, 1]);
        let positions = ops::add(steps, offsets.reshape(&[-1, 1, 1, 1])?)?;
        // `factor * n / max - (factor - 1)` is `1 + factor * (n - max) / max`, and its logarithm is exact near 1 that way.
        let beyond = ops::subtract(&positions, Array::from_f32(self.max_position_embeddings - 1.0))?;
        let beyond = ops::maximum(beyond, Array::from_f32(0.0))?;
        let growth = ops::log1p(ops::multiply(beyond, Array::from_f32(self.growth))?)?;
        let growth = ops::multiply(growth, Array::from_f32(self.exponent))?;
        let log_base = ops::add(Array::from_f32(self.log_theta), ops::add(growth, Array::from_f32(self.log_theta_rest))?)?;
        let half = self.dims / 2;
        let step = ops::divide(log_base, Array::from_f32(half as f32))?;
        let pairs = Array::from_iter((0..half).map(|i| -(i as f32)), &[half]);
        ops::multiply(positions, ops::exp(ops::multiply(pairs, step)?)?)
    }
}

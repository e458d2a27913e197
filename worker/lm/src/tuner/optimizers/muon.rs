//! Muon: momentum made orthogonal by Newton–Schulz iterations (Jordan, <https://kellerjordan.github.io/posts/muon/>).

use super::{State, Update, moved, plus, times};
use crate::error::LmError;
use mlx_rs::{
    Array,
    error::Exception,
    linalg::{self, NormOptions},
    ops,
};

/// Of the fifth-degree polynomial that is iterated.
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];

/// `w - λ O(v)`, where `O` makes a matrix orthogonal and leaves vectors alone. Of more than two axes all but the first are taken as one, as
/// for the filters of a convolution.
pub(super) fn apply(
    update: &Update<'_>,
    state: &mut State,
    momentum: f64,
    weight_decay: f64,
    nesterov: bool,
    ns_steps: u32,
) -> Result<Array, LmError> {
    let gradient = update.penalised(weight_decay)?;
    let v = moved(momentum, state.get("v")?, &gradient)?;
    state.set("v", &v);
    let mut direction = match nesterov {
        true => times(1.0 - momentum, &gradient)?.add(times(momentum, &v)?)?,
        false => v,
    };
    let mut rate = update.rate()?;
    let shape = direction.shape().to_vec();
    if let [first, .., last] = shape[..] {
        let matrix = direction.reshape(&[first, -1])?;
        direction = orthogonal(matrix, ns_steps)?.reshape(&shape)?;
        let ratio = f64::from(shape[shape.len() - 2]) / f64::from(last);
        rate = times(ratio.max(1.0).sqrt(), &rate)?;
    }
    Ok(update.parameter.subtract(rate.multiply(direction)?)?)
}

/// The matrix `[M, N]` with its singular values brought near 1.
fn orthogonal(x: Array, steps: u32) -> Result<Array, Exception> {
    let is_tall = x.dim(0) > x.dim(1);
    // Row-major: sums are then made in the order in which mlx-lm's compiled update makes them.
    let mut x = if is_tall { x.transpose()?.contiguous()? } else { x };
    let norm = linalg::norm_l2(&x, NormOptions { keep_dims: true, ..Default::default() })?;
    x = x.divide(plus(&norm, 1e-7)?)?;
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..steps {
        let square = x.matmul(x.transpose()?)?;
        let polynomial = ops::addmm(times(b.into(), &square)?, &square, &square, c, 1.0)?;
        x = ops::addmm(times(a.into(), &x)?, &polynomial, &x, 1.0, 1.0)?;
    }
    Ok(if is_tall { x.transpose()? } else { x })
}

//! Stochastic gradient descent, with or without momentum.

use super::{State, Update, times};
use crate::error::LmError;
use mlx_rs::Array;

/// `w - λ v` with `v = μ v + (1 - τ) g`; `v = g` without momentum.
pub(super) fn apply(
    update: &Update<'_>,
    state: &mut State,
    momentum: f64,
    weight_decay: f64,
    dampening: f64,
    nesterov: bool,
) -> Result<Array, LmError> {
    let gradient = update.penalised(weight_decay)?;
    let rate = update.rate()?;
    if momentum <= 0.0 {
        return Ok(update.parameter.subtract(rate.multiply(gradient)?)?);
    }
    let v = times(momentum, state.get("v")?)?;
    let v = match dampening > 0.0 {
        true => v.add(times(1.0 - dampening, &gradient)?)?,
        false => v.add(&gradient)?,
    };
    state.set("v", &v);
    let direction = if nesterov { gradient.add(times(momentum, &v)?)? } else { v };
    Ok(update.parameter.subtract(rate.multiply(direction)?)?)
}

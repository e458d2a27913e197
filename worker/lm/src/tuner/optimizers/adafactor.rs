//! Adafactor (Shazeer and Stern, arXiv 1804.04235): a matrix's squared gradients are remembered as means over its rows and columns alone.

use super::{State, Update, like, moved, plus, times};
use crate::error::LmError;
use mlx_cluster_common::training::optimizer::Adafactor;
use mlx_rs::{Array, error::Exception, ops};

pub(super) fn apply(update: &Update<'_>, state: &mut State, adafactor: &Adafactor) -> Result<Array, LmError> {
    let rate = learning_rate(update, adafactor)?;
    let scaled = scaled_gradient(update, state, adafactor)?;
    let size = root_mean_square(&scaled)?;
    let excess = size.divide(like(adafactor.clip_threshold, &size)?)?;
    let clipped = scaled.divide(ops::maximum(like(1.0, &excess)?, &excess)?)?;
    let mut change = rate.multiply(clipped)?;
    if let Some(beta_1) = adafactor.beta_1 {
        change = moved(beta_1, state.get("exp_avg")?, &change)?;
        state.set("exp_avg", &change);
    }
    let parameter = match adafactor.weight_decay {
        0.0 => update.parameter.clone(),
        decay => update.parameter.add(update.parameter.multiply(times(-decay, &rate)?)?)?,
    };
    Ok(parameter.subtract(change)?)
}

/// Relative to the size of the parameter where that is wanted, `[]`.
fn learning_rate(update: &Update<'_>, adafactor: &Adafactor) -> Result<Array, Exception> {
    let size = root_mean_square(update.parameter)?;
    let rate = match adafactor.relative_step {
        true => {
            let step = Array::from_f32(update.step as f32);
            let most = if adafactor.warmup_init { times(1e-6, &step)? } else { Array::from_f32(1e-2) };
            ops::minimum(most, step.rsqrt()?)?
        }
        false => Array::from_f32(update.learning_rate),
    };
    let rate = rate.as_dtype(size.dtype())?;
    match adafactor.scale_parameter {
        true => ops::maximum(like(adafactor.eps[1], &size)?, &size)?.multiply(rate),
        false => Ok(rate),
    }
}

/// The gradient over the root of its moving mean square.
fn scaled_gradient(update: &Update<'_>, state: &mut State, adafactor: &Adafactor) -> Result<Array, LmError> {
    let gradient = update.gradient;
    // tᵈ in f32, the rest in the gradient's type.
    let power = Array::from_f32(update.step as f32).power(Array::from_f32(adafactor.decay_rate as f32))?;
    let power = power.as_dtype(gradient.dtype())?;
    let beta_2 = like(1.0, &power)?.subtract(power)?;
    let mut mean = |name: &'static str, new: &Array| -> Result<Array, LmError> {
        let rest = like(1.0, &beta_2)?.subtract(&beta_2)?;
        let mean = beta_2.multiply(state.get(name)?)?.add(rest.multiply(new)?)?;
        state.set(name, &mean);
        Ok(mean)
    };
    let square = plus(&gradient.square()?, adafactor.eps[0])?;
    if gradient.ndim() < 2 {
        return Ok(mean("exp_avg_sq", &square)?.rsqrt()?.multiply(gradient)?);
    }
    let rows = mean("exp_avg_sq_row", &square.mean_axis(-1, false)?)?;
    let columns = mean("exp_avg_sq_col", &square.mean_axis(-2, false)?)?;
    let rows = rows.divide(rows.mean_axis(-1, true)?)?.rsqrt()?;
    Ok(rows.expand_dims(-1)?.multiply(columns.rsqrt()?.expand_dims(-2)?)?.multiply(gradient)?)
}

fn root_mean_square(x: &Array) -> Result<Array, Exception> {
    x.square()?.mean(false)?.sqrt()
}

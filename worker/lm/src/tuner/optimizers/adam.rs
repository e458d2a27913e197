//! Adam (Kingma and Ba, arXiv 1412.6980) and AdamW (Loshchilov and Hutter, arXiv 1711.05101).

use super::{State, Update, like, moved, plus, times};
use crate::error::LmError;
use mlx_rs::Array;

/// `w - λ m / (√v + ε)` with moving means `m` of the gradient and `v` of its square.
pub(super) fn apply(update: &Update<'_>, state: &mut State, betas: [f64; 2], eps: f64, bias_correction: bool) -> Result<Array, LmError> {
    let Update { parameter, gradient, .. } = update;
    let rate = update.rate()?;
    let m = moved(betas[0], state.get("m")?, gradient)?;
    let v = moved(betas[1], state.get("v")?, &gradient.square()?)?;
    state.set("m", &m);
    state.set("v", &v);
    if !bias_correction {
        return Ok(parameter.subtract(rate.multiply(&m)?.divide(plus(&v.sqrt()?, eps)?)?)?);
    }
    let step = Array::from_f32(update.step as f32);
    // 1 - βᵗ, in f32 also where the parameter is in 16 bits.
    let started = |beta: f64| Array::from_f32(1.0).subtract(Array::from_f32(beta as f32).power(&step)?);
    let m_scale = rate.divide(started(betas[0])?)?.as_dtype(gradient.dtype())?;
    let v_scale = started(betas[1])?.rsqrt()?.as_dtype(gradient.dtype())?;
    let denominator = plus(&v.sqrt()?.multiply(v_scale)?, eps)?;
    Ok(parameter.subtract(m_scale.multiply(&m)?.divide(denominator)?)?)
}

/// AdamW's share: the parameter, made smaller by `weight_decay` in units of the learning rate.
pub(super) fn decayed(update: &Update<'_>, weight_decay: f64) -> Result<Array, LmError> {
    let rate = update.rate()?;
    let kept = like(1.0, &rate)?.subtract(times(weight_decay, &rate)?)?;
    Ok(update.parameter.multiply(kept)?)
}

//! Wavelengths over 2π that are not plain powers of theta, computed by MLX in single precision and in mlx-lm's order, so that the bits are
//! the same.

use crate::error::LmError;
use mlx_cluster_common::spec::{RopeKind, RopeSpec};
use mlx_rs::{Array, error::Exception, ops};
use std::f64::consts::PI;

/// `[dims / 2]`, evaluated. The kinds without wavelengths of their own have those of plain RoPE.
pub(super) fn of(spec: &RopeSpec) -> Result<Array, LmError> {
    let frequencies = match &spec.kind {
        RopeKind::Default | RopeKind::Linear { .. } | RopeKind::DynamicNtk { .. } => powers(spec.theta, spec.dims, spec.dims)?,
        RopeKind::Llama3 { .. } => llama3(spec)?,
        RopeKind::Yarn { .. } => yarn(spec)?,
        RopeKind::NtkAlpha { alpha } => powers(ntk_theta(spec, *alpha), spec.dims, spec.dims)?,
        RopeKind::LongRope { factors, .. } => {
            let factors = Array::from_slice(factors, &[factors.len() as i32]);
            ops::multiply(factors, powers(spec.theta, spec.dims, spec.dims)?)?
        }
        RopeKind::Proportional { rotated_dims, factor } => {
            let turning = ops::multiply(scalar(*factor), powers(spec.theta, *rotated_dims, spec.dims)?)?;
            let still = vec![f32::INFINITY; ((spec.dims - rotated_dims) / 2) as usize];
            ops::concatenate(&[turning, Array::from_slice(&still, &[still.len() as i32])], 0)?
        }
    };
    frequencies.eval()?;
    Ok(frequencies)
}

fn scalar(value: f64) -> Array {
    Array::from_f32(value as f32)
}

/// `theta^(2i / dims)` for the first `rotated_dims` of `dims`.
fn powers(theta: f32, rotated_dims: u32, dims: u32) -> Result<Array, Exception> {
    let even: Vec<f32> = (0..rotated_dims).step_by(2).map(|i| i as f32).collect();
    let exponents = ops::divide(Array::from_slice(&even, &[even.len() as i32]), scalar(dims.into()))?;
    ops::power(Array::from_f32(theta), exponents)
}

fn ntk_theta(spec: &RopeSpec, alpha: f64) -> f32 {
    let dims = f64::from(spec.dims);
    (f64::from(spec.theta) * alpha.powf(dims / (dims - 2.0))) as f32
}

/// Llama 3.1's ramp between kept and divided wavelengths.
fn llama3(spec: &RopeSpec) -> Result<Array, Exception> {
    let plain = powers(spec.theta, spec.dims, spec.dims)?;
    let RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } = spec.kind else { return Ok(plain) };
    let original = f64::from(original_context);
    let (longest, shortest) = (scalar(original / low_freq_factor), scalar(original / high_freq_factor));
    let wavelengths = ops::multiply(scalar(2.0 * PI), &plain)?;
    let divided = ops::select(ops::gt(&wavelengths, &longest)?, ops::multiply(&plain, scalar(factor))?, &plain)?;
    let between = ops::logical_and(ops::gt(&wavelengths, &shortest)?, ops::lt(&wavelengths, &longest)?)?;
    let rotations = ops::divide(scalar(original), &wavelengths)?;
    let smooth = ops::divide(ops::subtract(rotations, scalar(low_freq_factor))?, scalar(high_freq_factor - low_freq_factor))?;
    let kept_part = ops::add(ops::divide(ops::subtract(scalar(1.0), &smooth)?, scalar(factor))?, &smooth)?;
    ops::select(between, ops::divide(&divided, kept_part)?, &divided)
}

/// YaRN (Peng et al. 2023): interpolates long wavelengths, extrapolates short ones, a linear ramp between.
fn yarn(spec: &RopeSpec) -> Result<Array, Exception> {
    let extrapolated = powers(spec.theta, spec.dims, spec.dims)?;
    let RopeKind::Yarn { factor, beta_fast, beta_slow, original_context, .. } = spec.kind else { return Ok(extrapolated) };
    let dims = f64::from(spec.dims);
    let correction =
        |rotations: f64| dims * (f64::from(original_context) / (rotations * 2.0 * PI)).ln() / (2.0 * f64::from(spec.theta).ln());
    let low = correction(beta_fast).floor().max(0.0);
    let high = correction(beta_slow).ceil().min(dims - 1.0);
    let width = if low == high { (high + 0.001) - low } else { high - low };
    let pairs: Vec<f32> = (0..spec.dims / 2).map(|i| i as f32).collect();
    let pairs = Array::from_slice(&pairs, &[pairs.len() as i32]);
    let ramp = ops::clip(ops::divide(ops::subtract(pairs, scalar(low))?, scalar(width))?, (0.0, 1.0))?;
    let mask = ops::subtract(scalar(1.0), ramp)?;
    let interpolated = ops::multiply(scalar(factor), &extrapolated)?;
    let product = ops::multiply(&interpolated, &extrapolated)?;
    let mixed = ops::add(ops::multiply(&interpolated, &mask)?, ops::multiply(&extrapolated, ops::subtract(scalar(1.0), &mask)?)?)?;
    ops::divide(product, mixed)
}

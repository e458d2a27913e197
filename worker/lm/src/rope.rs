//! Rotary position embedding (Su et al. 2021) with its stretched kinds; the formulas are those of mlx-lm's `rope_utils.py`.

use crate::{error::LmError, parameters::Parameters};
use mlx_cluster_common::spec::{RopeKind, RopeSpec};
use mlx_rs::{Array, fast, ops};
use std::f64::consts::PI;

#[derive(Debug, Clone)]
pub struct Rope {
    dims: i32,
    interleaved: bool,
    theta: f32,
    /// Factor on the positions.
    position_scale: f32,
    /// Wavelengths over 2π, where they are not plain powers of theta.
    frequencies: Option<Array>,
    /// Factor on the rotated part (YaRN's attention temperature).
    magnitude: f32,
}

impl Rope {
    pub fn new(spec: &RopeSpec) -> Result<Self, LmError> {
        let mut rope = Rope {
            dims: spec.dims as i32,
            interleaved: spec.interleaved,
            theta: spec.theta,
            position_scale: 1.0,
            frequencies: None,
            magnitude: 1.0,
        };
        match &spec.kind {
            RopeKind::Default => {}
            RopeKind::Linear { factor } => rope.position_scale = 1.0 / factor,
            RopeKind::Llama3 { .. } => rope.frequencies = Some(to_array(&llama3(spec)?)),
            RopeKind::Yarn { factor, mscale, mscale_all_dim, .. } => {
                rope.frequencies = Some(to_array(&yarn(spec)?));
                rope.magnitude = yarn_mscale(*factor, *mscale) / yarn_mscale(*factor, *mscale_all_dim);
            }
        }
        Ok(rope)
    }

    /// The numbers that are built into a compiled piece.
    pub(crate) fn signature(&self) -> String {
        format!("{}/{}/{}/{}/{}", self.dims, self.interleaved, self.theta, self.position_scale, self.magnitude)
    }

    /// Rotates `x` `[B, H, L, head_dim]`, whose row `b` starts at position `offsets[b]`.
    pub fn forward(&self, x: &Array, offsets: &Array) -> Result<Array, LmError> {
        let scaled = match self.magnitude == 1.0 {
            true => None,
            false => Some(self.scale_rotated(x)?),
        };
        let base = self.frequencies.is_none().then_some(self.theta);
        let x = scaled.as_ref().unwrap_or(x);
        Ok(fast::rope_dynamic(x, self.dims, self.interleaved, base, self.position_scale, offsets, self.frequencies.as_ref())?)
    }

    fn scale_rotated(&self, x: &Array) -> Result<Array, LmError> {
        let magnitude = Array::from_f32(self.magnitude).as_dtype(x.dtype())?;
        if x.shape().last() == Some(&self.dims) {
            return Ok(ops::multiply(x, magnitude)?);
        }
        let parts = x.split_at_indices(&[self.dims], -1)?;
        Ok(ops::concatenate(&[ops::multiply(&parts[0], magnitude)?, parts[1].clone()], -1)?)
    }
}

impl Parameters for Rope {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.frequencies.iter().for_each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.frequencies.iter_mut().for_each(visit);
    }
}

fn to_array(values: &[f32]) -> Array {
    Array::from_slice(values, &[values.len() as i32])
}

/// `theta^(2i / dims)`, by MLX's own power so that the bits are those of mlx-lm.
fn powers(spec: &RopeSpec) -> Result<Vec<f32>, LmError> {
    let exponents: Vec<f32> = (0..spec.dims).step_by(2).map(|i| i as f32 / spec.dims as f32).collect();
    let powers = ops::power(Array::from_f32(spec.theta), to_array(&exponents))?;
    powers.eval()?;
    powers.to_vec_exact::<f32>().map_err(|error| LmError::Mlx(error.to_string()))
}

/// Llama 3.1's ramp between kept and divided wavelengths.
fn llama3(spec: &RopeSpec) -> Result<Vec<f32>, LmError> {
    let RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } = spec.kind else {
        return Ok(Vec::new());
    };
    let original = original_context as f32;
    let (longest, shortest) = (original / low_freq_factor, original / high_freq_factor);
    let stretch = |frequency: f32| {
        let wavelength = (2.0 * PI) as f32 * frequency;
        let divided = if wavelength > longest { frequency * factor } else { frequency };
        if wavelength > shortest && wavelength < longest {
            let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
            return divided / ((1.0 - smooth) / factor + smooth);
        }
        divided
    };
    Ok(powers(spec)?.into_iter().map(stretch).collect())
}

/// YaRN (Peng et al. 2023): interpolates long wavelengths, extrapolates short ones, a linear ramp between.
fn yarn(spec: &RopeSpec) -> Result<Vec<f32>, LmError> {
    let RopeKind::Yarn { factor, beta_fast, beta_slow, original_context, .. } = spec.kind else {
        return Ok(Vec::new());
    };
    let dims = f64::from(spec.dims);
    let correction =
        |rotations: f32| dims * (f64::from(original_context) / (f64::from(rotations) * 2.0 * PI)).ln() / (2.0 * f64::from(spec.theta).ln());
    let low = correction(beta_fast).floor().max(0.0) as f32;
    let mut high = correction(beta_slow).ceil().min(dims - 1.0) as f32;
    if low == high {
        high += 0.001;
    }
    let mix = |(i, extrapolated): (usize, f32)| {
        let ramp = ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
        let mask = 1.0 - ramp;
        let interpolated = factor * extrapolated;
        (interpolated * extrapolated) / (interpolated * mask + extrapolated * (1.0 - mask))
    };
    Ok(powers(spec)?.into_iter().enumerate().map(mix).collect())
}

fn yarn_mscale(factor: f32, mscale: f32) -> f32 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

//! Rotary position embedding (Su et al. 2021) with its stretched kinds; the formulas are those of mlx-lm's `rope_utils.py`.

mod dynamic;
mod frequencies;
#[cfg(test)]
mod tests;

use crate::{error::LmError, parameters::Parameters, served::Adaptable};
use dynamic::DynamicNtk;
use mlx_cluster_common::spec::{RopeKind, RopeSpec};
use mlx_rs::{Array, fast, ops};

#[derive(Debug, Clone)]
pub struct Rope {
    dims: i32,
    interleaved: bool,
    wavelengths: Wavelengths,
    /// Factor on the rotated part (YaRN's and LongRoPE's attention temperature).
    magnitude: f32,
}

#[derive(Debug, Clone)]
enum Wavelengths {
    /// Over 2π they are `theta^(2i / dims)`; positions are multiplied by `position_scale`.
    Powers { theta: f32, position_scale: f32 },
    /// Over 2π, `[dims / 2]`.
    Given(Array),
    /// They depend on the position.
    Dynamic(DynamicNtk),
}

impl Rope {
    /// Computes the wavelengths on the default device.
    pub fn new(spec: &RopeSpec) -> Result<Self, LmError> {
        let wavelengths = match &spec.kind {
            RopeKind::Default => Wavelengths::Powers { theta: spec.theta, position_scale: 1.0 },
            RopeKind::Linear { factor } => Wavelengths::Powers { theta: spec.theta, position_scale: (1.0 / factor) as f32 },
            RopeKind::DynamicNtk { factor, max_position_embeddings } => {
                Wavelengths::Dynamic(DynamicNtk::new(spec.dims, spec.theta, *factor, *max_position_embeddings))
            }
            RopeKind::Llama3 { .. }
            | RopeKind::Yarn { .. }
            | RopeKind::NtkAlpha { .. }
            | RopeKind::LongRope { .. }
            | RopeKind::Proportional { .. } => Wavelengths::Given(frequencies::of(spec)?),
        };
        let magnitude = spec.kind.magnitude() as f32;
        Ok(Rope { dims: spec.dims as i32, interleaved: spec.interleaved, wavelengths, magnitude })
    }

    /// Rotates `x` `[B, H, L, head_dim]`, whose row `b` starts at position `offsets[b]` (int, `[B]`).
    pub fn forward(&self, x: &Array, offsets: &Array) -> Result<Array, LmError> {
        let scaled = match self.magnitude == 1.0 {
            true => None,
            false => Some(self.scale_rotated(x)?),
        };
        let x = scaled.as_ref().unwrap_or(x);
        let rope = |base: Option<f32>, scale, frequencies| {
            Ok(fast::rope_dynamic(x, self.dims, self.interleaved, base, scale, offsets, frequencies)?)
        };
        match &self.wavelengths {
            Wavelengths::Powers { theta, position_scale } => rope(Some(*theta), *position_scale, None),
            Wavelengths::Given(frequencies) => rope(None, 1.0, Some(frequencies)),
            Wavelengths::Dynamic(dynamic) => dynamic.rotate(x, offsets, self.interleaved),
        }
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
        if let Wavelengths::Given(frequencies) = &self.wavelengths {
            visit(frequencies);
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        if let Wavelengths::Given(frequencies) = &mut self.wavelengths {
            visit(frequencies);
        }
    }

    fn each_matrix(&mut self, _: &mut dyn FnMut(Adaptable<'_>)) {}
}

//! The learning rate of each update, as mlx.optimizers' schedules give it, in f32.

use serde::{Deserialize, Serialize};

/// As mlx-lm's `learning_rate` and `lr_schedule` make it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Before `decay`, which counts from its end.
    pub warmup: Option<Warmup>,
    pub decay: Decay,
}

/// A line from `init` to the decay's first value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Warmup {
    pub init: f64,
    pub steps: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    Constant { rate: f64 },
    Cosine { init: f64, steps: u64, end: f64 },
    Exponential { init: f64, rate: f64 },
    Step { init: f64, rate: f64, size: u64 },
    Linear { init: f64, end: f64, steps: u64 },
}

impl Schedule {
    pub fn constant(rate: f64) -> Self {
        Self { warmup: None, decay: Decay::Constant { rate } }
    }

    /// The rate of the update after `step` updates.
    pub fn at(&self, step: u64) -> f32 {
        match self.warmup {
            Some(Warmup { init, steps }) => {
                // mlx-lm joins the two one step after the warm-up's end.
                let boundary = steps + 1;
                if step < boundary { linear(init, self.decay.first(), steps, step) } else { self.decay.at(step - boundary) }
            }
            None => self.decay.at(step),
        }
    }
}

impl Decay {
    fn first(self) -> f64 {
        match self {
            Decay::Constant { rate } => rate,
            Decay::Cosine { init, .. } | Decay::Exponential { init, .. } | Decay::Step { init, .. } | Decay::Linear { init, .. } => init,
        }
    }

    fn at(self, step: u64) -> f32 {
        match self {
            Decay::Constant { rate } => rate as f32,
            Decay::Cosine { init, steps, end } => {
                let s = step.min(steps) as f32;
                let decay = 0.5 * (1.0 + cos((std::f64::consts::PI / steps as f64) as f32 * s));
                end as f32 + decay * (init - end) as f32
            }
            Decay::Exponential { init, rate } => init as f32 * (rate as f32).powf(step as f32),
            Decay::Step { init, rate, size } => init as f32 * (rate as f32).powf((step / size) as f32),
            Decay::Linear { init, end, steps } => linear(init, end, steps, step),
        }
    }
}

/// Of an angle from 0 to pi, as MLX computes it on a CPU (mlx/backend/cpu/simd/math.h, after Cephes): the last bits are not those
/// of the standard library.
fn cos(angle: f32) -> f32 {
    let octant = ((angle * 1.273_239_5) as u32 + 1) & !1;
    let y = octant as f32;
    let x = y.mul_add(-3.774_895e-8, y.mul_add(-2.418_756_5e-4, y.mul_add(-0.785_156_25, angle)));
    let z = x * x;
    let cosine = z.mul_add(-0.5, z.mul_add(2.443_315_7e-5, -1.388_731_6e-3).mul_add(z, 4.166_664_6e-2) * z * z) + 1.0;
    let sine = x.mul_add(z.mul_add(-1.951_529_6e-4, 8.332_161e-3).mul_add(z, -1.666_665_5e-1) * z, x);
    let of_octant = if octant & 2 != 0 { sine } else { cosine };
    if octant.wrapping_sub(2) & 4 != 0 { of_octant } else { -of_octant }
}

fn linear(init: f64, end: f64, steps: u64, step: u64) -> f32 {
    step.min(steps) as f32 * ((end - init) / steps as f64) as f32 + init as f32
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;

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
                let decay = 0.5 * (1.0 + ((std::f64::consts::PI / steps as f64) as f32 * s).cos());
                end as f32 + decay * (init - end) as f32
            }
            Decay::Exponential { init, rate } => init as f32 * (rate as f32).powf(step as f32),
            Decay::Step { init, rate, size } => init as f32 * (rate as f32).powf((step / size) as f32),
            Decay::Linear { init, end, steps } => linear(init, end, steps, step),
        }
    }
}

fn linear(init: f64, end: f64, steps: u64, step: u64) -> f32 {
    step.min(steps) as f32 * ((end - init) / steps as f64) as f32 + init as f32
}

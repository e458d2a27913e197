//! Optimizers by their hyper-parameters, with mlx.optimizers' names and defaults. The maths is in `worker/lm`.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    Adam { betas: [f32; 2], eps: f32, bias_correction: bool },
    AdamW { betas: [f32; 2], eps: f32, weight_decay: f32, bias_correction: bool },
    Sgd { momentum: f32, weight_decay: f32, dampening: f32, nesterov: bool },
    Adafactor(Adafactor),
    Muon { momentum: f32, weight_decay: f32, nesterov: bool, ns_steps: u32 },
}

/// Shazeer and Stern, arXiv 1804.04235.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adafactor {
    pub eps: [f32; 2],
    pub clip_threshold: f32,
    pub decay_rate: f32,
    pub beta_1: Option<f32>,
    pub weight_decay: f32,
    pub scale_parameter: bool,
    pub relative_step: bool,
    pub warmup_init: bool,
}

impl Optimizer {
    /// As mlx-lm's `optimizer` calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Optimizer::Adam { .. } => "adam",
            Optimizer::AdamW { .. } => "adamw",
            Optimizer::Sgd { .. } => "sgd",
            Optimizer::Adafactor(_) => "adafactor",
            Optimizer::Muon { .. } => "muon",
        }
    }
}

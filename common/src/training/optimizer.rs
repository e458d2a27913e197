//! Optimizers by their hyper-parameters, with mlx.optimizers' names and defaults, and what they remember. The maths is in `worker/lm`.

use serde::{Deserialize, Serialize};

/// In f64, as Python has them: `1 - beta` rounded once to f32 is another number than in f32 arithmetic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    Adam { betas: [f64; 2], eps: f64, bias_correction: bool },
    AdamW { betas: [f64; 2], eps: f64, weight_decay: f64, bias_correction: bool },
    Sgd { momentum: f64, weight_decay: f64, dampening: f64, nesterov: bool },
    Adafactor(Adafactor),
    Muon { momentum: f64, weight_decay: f64, nesterov: bool, ns_steps: u32 },
}

/// Shazeer and Stern, arXiv 1804.04235.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Adafactor {
    pub eps: [f64; 2],
    pub clip_threshold: f64,
    pub decay_rate: f64,
    pub beta_1: Option<f64>,
    pub weight_decay: f64,
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

    /// What is remembered of a parameter of this shape from update to update, in the parameter's type: names as in mlx.optimizers, and shapes.
    pub fn state(&self, shape: &[u64]) -> Vec<(&'static str, Vec<u64>)> {
        match self {
            Optimizer::Adam { .. } | Optimizer::AdamW { .. } => vec![("m", shape.to_vec()), ("v", shape.to_vec())],
            // mlx keeps zeros also where there is no momentum, and never reads them.
            Optimizer::Sgd { momentum, .. } if *momentum <= 0.0 => Vec::new(),
            Optimizer::Sgd { .. } | Optimizer::Muon { .. } => vec![("v", shape.to_vec())],
            Optimizer::Adafactor(adafactor) => adafactor.state(shape),
        }
    }

    /// Whether each number is updated by itself, whatever stands beside it in its matrix.
    pub fn is_by_number(&self) -> bool {
        match self {
            Optimizer::Adam { .. } | Optimizer::AdamW { .. } | Optimizer::Sgd { .. } => true,
            Optimizer::Adafactor(_) | Optimizer::Muon { .. } => false,
        }
    }

    /// How many numbers are remembered of a parameter of this shape.
    pub fn state_numbers(&self, shape: &[u64]) -> u64 {
        let numbers = |shape: &[u64]| shape.iter().copied().fold(1, u64::saturating_mul);
        self.state(shape).iter().map(|(_, shape)| numbers(shape)).fold(0, u64::saturating_add)
    }
}

impl Adafactor {
    /// Squared gradients are kept as means over rows and over columns where there are such.
    fn state(&self, shape: &[u64]) -> Vec<(&'static str, Vec<u64>)> {
        let mut state = match shape {
            [stack @ .., rows, columns] => {
                let along = |dim: &u64| stack.iter().chain([dim]).copied().collect();
                vec![("exp_avg_sq_row", along(rows)), ("exp_avg_sq_col", along(columns))]
            }
            _ => vec![("exp_avg_sq", shape.to_vec())],
        };
        if self.beta_1.is_some() {
            state.push(("exp_avg", shape.to_vec()));
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adafactor(beta_1: Option<f64>) -> Optimizer {
        Optimizer::Adafactor(Adafactor {
            eps: [1e-30, 1e-3],
            clip_threshold: 1.0,
            decay_rate: -0.8,
            beta_1,
            weight_decay: 0.0,
            scale_parameter: true,
            relative_step: true,
            warmup_init: false,
        })
    }

    #[test]
    fn state_is_as_large_as_the_optimizer_needs() {
        let shape = [3, 8, 5];
        let sgd = |momentum| Optimizer::Sgd { momentum, weight_decay: 0.1, dampening: 0.0, nesterov: false };
        assert_eq!(Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false }.state_numbers(&shape), 240);
        assert_eq!(Optimizer::Muon { momentum: 0.95, weight_decay: 0.01, nesterov: true, ns_steps: 5 }.state_numbers(&shape), 120);
        assert_eq!((sgd(0.0).state_numbers(&shape), sgd(0.9).state_numbers(&shape)), (0, 120));
        assert_eq!(adafactor(None).state(&shape), [("exp_avg_sq_row", vec![3, 8]), ("exp_avg_sq_col", vec![3, 5])]);
        assert_eq!(adafactor(Some(0.9)).state_numbers(&shape), 24 + 15 + 120);
        assert_eq!((adafactor(None).state_numbers(&[7]), adafactor(None).state_numbers(&[])), (7, 1));
    }
}

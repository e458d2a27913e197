//! What of a model is trained.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// As mlx-lm's `fine_tune_type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FineTune {
    /// Low-rank factors beside frozen matrices (Hu et al., arXiv 2106.09685).
    Lora(LoraParameters),
    /// The same with a trained magnitude for each output (Liu et al., arXiv 2402.09353).
    Dora(LoraParameters),
    /// All parameters of the last layers.
    Full,
}

/// As mlx-lm's `lora_parameters`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraParameters {
    pub rank: u32,
    pub scale: f32,
    /// The part of the inputs that is left out at each step, 0 to below 1.
    pub dropout: f32,
    /// Paths of modules inside a layer (`self_attn.q_proj`) or from the root; None: every linear, expert stack and embedding of the layers.
    pub keys: Option<BTreeSet<String>>,
}

impl FineTune {
    /// None when whole parameters are trained.
    pub fn lora(&self) -> Option<&LoraParameters> {
        match self {
            FineTune::Lora(parameters) | FineTune::Dora(parameters) => Some(parameters),
            FineTune::Full => None,
        }
    }

    /// As `adapter_config.json` calls it.
    pub fn name(&self) -> &'static str {
        match self {
            FineTune::Lora(_) => "lora",
            FineTune::Dora(_) => "dora",
            FineTune::Full => "full",
        }
    }
}

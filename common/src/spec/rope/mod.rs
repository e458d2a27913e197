//! Rotary position embedding (Su et al. 2021) and the ways to stretch it, as data.

mod config;
#[cfg(test)]
mod tests;

pub use config::{rotary_dims, yarn_attention_factor};

/// Rotates the first `dims` of each head by the token's position.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    pub dims: u32,
    /// Pairs are neighbours (`x0 x1`) rather than halves (`x0 x(d/2)`).
    pub interleaved: bool,
    /// Base of the wavelengths.
    pub theta: f32,
    pub kind: RopeKind,
}

/// How positions beyond the trained context are reached. The formulas are those of mlx-lm's `rope_utils.py`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    Default,
    /// Positions divided by `factor` (Chen et al. 2023).
    Linear {
        factor: f64,
    },
    /// Long wavelengths divided, short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: u32,
    },
    /// YaRN (Peng et al. 2023). The ramp's ends are rounded outwards to whole dimensions, whatever a config's `truncate` says: mlx-lm
    /// does not read that key.
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        mscale: f64,
        mscale_all_dim: f64,
        original_context: u32,
    },
    /// NTK-aware scaling that grows with the position: beyond `max_position_embeddings` the base becomes
    /// `theta * (factor * n / max_position_embeddings - (factor - 1))^(dims / (dims - 2))` for the `n`-th token.
    DynamicNtk {
        factor: f64,
        max_position_embeddings: u32,
    },
    /// NTK-aware scaling by a constant: the base is `theta * alpha^(dims / (dims - 2))`.
    NtkAlpha {
        alpha: f64,
    },
    /// LongRoPE (Ding et al. 2024), also called "su": each wavelength has its own factor. As in mlx-lm the factors for long texts hold at
    /// every length, so that cached keys need not be rotated anew when a text becomes long.
    LongRope {
        /// One for each of the `dims / 2` pairs.
        factors: Vec<f32>,
        max_position_embeddings: u32,
        original_context: u32,
    },
    /// The exponents are those of all `dims`, but only the pairs of the first `rotated_dims` exponents turn; wavelengths times `factor`.
    Proportional {
        rotated_dims: u32,
        factor: f64,
    },
}

impl RopeKind {
    /// What the rotated part of queries and keys is multiplied by, so that attention keeps its temperature over a longer context.
    pub fn magnitude(&self) -> f64 {
        match self {
            RopeKind::Yarn { factor, mscale, mscale_all_dim, .. } => yarn_mscale(*factor, *mscale) / yarn_mscale(*factor, *mscale_all_dim),
            RopeKind::LongRope { max_position_embeddings, original_context, .. } => {
                let original = f64::from(*original_context);
                let factor = f64::from(*max_position_embeddings) / original;
                if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() }
            }
            _ => 1.0,
        }
    }
}

/// YaRN's `0.1 m ln(s) + 1`.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

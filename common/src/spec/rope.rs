//! Rotary position embedding (Su et al. 2021) and the ways to stretch it, as data.

use crate::config::{Config, ConfigError};

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

#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    Default,
    /// Positions divided by `factor` (Chen et al. 2023).
    Linear {
        factor: f32,
    },
    /// Long wavelengths divided, short ones kept, a ramp between (Llama 3.1).
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: u32,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        factor: f32,
        beta_fast: f32,
        beta_slow: f32,
        mscale: f32,
        mscale_all_dim: f32,
        original_context: u32,
    },
}

impl RopeSpec {
    /// Reads `rope_theta` and `rope_scaling`, or the `rope_parameters` that transformers 5 nests both under.
    pub fn from_config(config: &Config, model_type: &str, dims: u32, default_theta: Option<f32>) -> Result<RopeSpec, ConfigError> {
        let parameters = config.object("rope_parameters", "rope_parameters.")?;
        let theta = match (config.maybe_f32("rope_theta", 1.0, 1e12)?, &parameters) {
            (Some(theta), _) => Some(theta),
            (None, Some(parameters)) => parameters.maybe_f32("rope_theta", 1.0, 1e12)?,
            (None, None) => None,
        };
        let theta = theta.or(default_theta).ok_or_else(|| ConfigError::Missing { key: "rope_theta".into() })?;
        let scaling = match config.object("rope_scaling", "rope_scaling.")? {
            Some(scaling) => Some(scaling),
            None => parameters,
        };
        let kind = scaling.map_or(Ok(RopeKind::Default), |scaling| RopeKind::from_config(&scaling, model_type))?;
        if dims == 0 || dims % 2 == 1 {
            return Err(ConfigError::Contradiction { message: format!("RoPE needs an even head size, not {dims}") });
        }
        let interleaved = config.bool_or("rope_traditional", false)?;
        Ok(RopeSpec { dims, interleaved, theta, kind })
    }
}

impl RopeKind {
    fn from_config(scaling: &Config, model_type: &str) -> Result<RopeKind, ConfigError> {
        let kind = scaling.text("type")?.or(scaling.text("rope_type")?).unwrap_or("default");
        let factor = || scaling.f32("factor", 1e-3, 1e6);
        let original = |default| Ok(scaling.maybe_u32("original_max_position_embeddings", 1, u32::MAX)?.unwrap_or(default));
        let or = |key, default| Ok::<f32, ConfigError>(scaling.maybe_f32(key, 0.0, 1e6)?.unwrap_or(default));
        Ok(match kind {
            "default" | "mrope" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: factor()? },
            "llama3" => RopeKind::Llama3 {
                factor: factor()?,
                low_freq_factor: or("low_freq_factor", 1.0)?,
                high_freq_factor: or("high_freq_factor", 4.0)?,
                original_context: original(8192)?,
            },
            "yarn" => RopeKind::Yarn {
                factor: factor()?,
                beta_fast: or("beta_fast", 32.0)?,
                beta_slow: or("beta_slow", 1.0)?,
                mscale: or("mscale", 1.0)?,
                mscale_all_dim: or("mscale_all_dim", 0.0)?,
                original_context: original(4096)?,
            },
            other => {
                return Err(ConfigError::Unsupported { model_type: model_type.into(), feature: format!("RoPE scaling of type `{other}`") });
            }
        })
    }
}

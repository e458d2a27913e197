//! Reads RoPE from `config.json`: `rope_theta` with `rope_scaling`, or the `rope_parameters` that nest both.

use super::{RopeKind, RopeSpec, yarn_mscale};
use crate::config::{Config, ConfigError};

const THETA: (f32, f32) = (1.0, 1e12);

impl RopeSpec {
    /// RoPE without scaling.
    pub fn plain(dims: u32, theta: f32, interleaved: bool) -> Result<RopeSpec, ConfigError> {
        RopeSpec { dims, interleaved, theta, kind: RopeKind::Default }.checked()
    }

    /// The kind that `scaling` names, with the meaning of mlx-lm's `initialize_rope`.
    ///
    /// `max_position_embeddings` is needed by the kinds `dynamic` and `longrope`; `longrope` pairs halves whatever `interleaved` says.
    pub fn initialize(
        dims: u32,
        theta: f32,
        interleaved: bool,
        scaling: Option<&Config>,
        max_position_embeddings: Option<u32>,
        model_type: &str,
    ) -> Result<RopeSpec, ConfigError> {
        let Some(scaling) = scaling else { return RopeSpec::plain(dims, theta, interleaved) };
        let max_position_embeddings =
            || max_position_embeddings.ok_or_else(|| ConfigError::Missing { key: "max_position_embeddings".into() });
        let kind = match kind_name(scaling)? {
            "default" => RopeKind::Default,
            "mrope" => mrope(scaling)?,
            "linear" => RopeKind::Linear { factor: factor(scaling)? },
            "dynamic" => RopeKind::DynamicNtk { factor: factor(scaling)?, max_position_embeddings: positive(max_position_embeddings()?)? },
            "llama3" => llama3(scaling)?,
            "yarn" | "deepseek_yarn" | "telechat3-yarn" => yarn(scaling)?,
            "longrope" | "su" => {
                let original = scaling.u32("original_max_position_embeddings", 1, u32::MAX)?;
                return RopeSpec::long_rope(dims, theta, scaling, max_position_embeddings()?, original, model_type);
            }
            "proportional" => RopeKind::Proportional {
                rotated_dims: (f64::from(dims) * scaling.maybe_f64("partial_rotary_factor", 0.0, 1.0)?.unwrap_or(1.0)) as u32,
                factor: scaling.maybe_f64("factor", 1e-3, 1e6)?.unwrap_or(1.0),
            },
            other => {
                return Err(ConfigError::Unsupported { model_type: model_type.into(), feature: format!("RoPE scaling of type `{other}`") });
            }
        };
        if matches!(kind, RopeKind::Yarn { .. }) {
            check_attention_factor(scaling, &kind, model_type)?;
        }
        RopeSpec { dims, interleaved, theta, kind }.checked()
    }

    /// LongRoPE ("su") by `scaling`'s `long_factor` (a list, or one number for all pairs, 1 when absent), whatever type it names.
    pub fn long_rope(
        dims: u32,
        theta: f32,
        scaling: &Config,
        max_position_embeddings: u32,
        original_context: u32,
        model_type: &str,
    ) -> Result<RopeSpec, ConfigError> {
        let factors = match scaling.get("long_factor") {
            Some(value) if value.is_array() => scaling.f32s("long_factor", 1e-6, 1e6)?.unwrap_or_default(),
            _ => vec![scaling.maybe_f32("long_factor", 1e-6, 1e6)?.unwrap_or(1.0); (dims / 2) as usize],
        };
        let kind = RopeKind::LongRope { factors, max_position_embeddings: positive(max_position_embeddings)?, original_context };
        let spec = RopeSpec { dims, interleaved: false, theta, kind }.checked()?;
        check_attention_factor(scaling, &spec.kind, model_type)?;
        Ok(spec)
    }

    /// RoPE whose base is scaled by `scaling`'s `alpha`, which must be there when `scaling` is.
    pub fn ntk_alpha(dims: u32, theta: f32, interleaved: bool, scaling: Option<&Config>) -> Result<RopeSpec, ConfigError> {
        let alpha = scaling.map_or(Ok(1.0), |scaling| scaling.f64("alpha", 1e-3, 1e6))?;
        RopeSpec { dims, interleaved, theta, kind: RopeKind::NtkAlpha { alpha } }.checked()
    }

    /// `rope_theta` with `rope_scaling` (or `rope_parameters`); pairs as `rope_traditional` says, halves when it is absent.
    pub fn from_config(config: &Config, model_type: &str, dims: u32, default_theta: Option<f32>) -> Result<RopeSpec, ConfigError> {
        RopeSpec::read(config, model_type, dims, default_theta, config.bool_or("rope_traditional", false)?)
    }

    /// The same for an architecture that fixes which pairs it rotates.
    pub fn read(
        config: &Config,
        model_type: &str,
        dims: u32,
        default_theta: Option<f32>,
        interleaved: bool,
    ) -> Result<RopeSpec, ConfigError> {
        let theta = theta(config, default_theta, model_type)?;
        let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?;
        RopeSpec::initialize(dims, theta, interleaved, scaling(config, model_type)?.as_ref(), max_position_embeddings, model_type)
    }

    /// `rope_theta` alone, for an architecture that has no scaling: a config that asks for one is refused.
    pub fn unscaled(
        config: &Config,
        model_type: &str,
        dims: u32,
        default_theta: Option<f32>,
        interleaved: bool,
    ) -> Result<RopeSpec, ConfigError> {
        if let Some(scaling) = scaling(config, model_type)? {
            let kind = kind_name(&scaling)?;
            if !matches!(kind, "default" | "mrope") {
                return Err(ConfigError::Unsupported { model_type: model_type.into(), feature: format!("RoPE scaling (`{kind}`)") });
            }
        }
        RopeSpec::plain(dims, theta(config, default_theta, model_type)?, interleaved)
    }

    /// `rope_parameters.<layer_type>`, which holds theta and scaling of the layers of that type. None without `rope_parameters`; a type
    /// that it does not list has `default_theta` and no scaling.
    pub fn for_layer_type(
        config: &Config,
        model_type: &str,
        dims: u32,
        layer_type: &str,
        default_theta: Option<f32>,
        interleaved: bool,
    ) -> Result<Option<RopeSpec>, ConfigError> {
        let Some(parameters) = config.object("rope_parameters", "rope_parameters.")? else { return Ok(None) };
        let parameters = match layer_type {
            "full_attention" => parameters.object("full_attention", "rope_parameters.full_attention.")?,
            "sliding_attention" => parameters.object("sliding_attention", "rope_parameters.sliding_attention.")?,
            other => {
                return Err(ConfigError::Unsupported {
                    model_type: model_type.into(),
                    feature: format!("RoPE of layers of type `{other}`"),
                });
            }
        };
        let theta = match &parameters {
            Some(parameters) => parameters.maybe_f32("rope_theta", THETA.0, THETA.1)?,
            None => None,
        };
        let key = || format!("rope_parameters.{layer_type}.rope_theta");
        let theta = theta.or(default_theta).ok_or_else(|| ConfigError::Missing { key: key() })?;
        let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?;
        let spec = RopeSpec::initialize(dims, theta, interleaved, parameters.as_ref(), max_position_embeddings, model_type)?;
        let partial = parameters.map_or(Ok(None), |parameters| parameters.maybe_f64("partial_rotary_factor", 0.0, 1.0))?;
        if partial.is_some_and(|partial| partial != 1.0) && !matches!(spec.kind, RopeKind::Proportional { .. }) {
            let feature = format!("`partial_rotary_factor` of `{layer_type}` without proportional RoPE");
            return Err(ConfigError::Unsupported { model_type: model_type.into(), feature });
        }
        Ok(Some(spec))
    }

    /// Refuses what the kind's formula is not defined for.
    fn checked(self) -> Result<RopeSpec, ConfigError> {
        let contradiction = |message: String| Err(ConfigError::Contradiction { message });
        let (dims, theta) = (self.dims, self.theta);
        if dims == 0 || dims % 2 == 1 {
            return contradiction(format!("RoPE needs an even number of dimensions, not {dims}"));
        }
        if !(THETA.0..=THETA.1).contains(&theta) {
            return contradiction(format!("RoPE's theta must be from {} to {}, not {theta}", THETA.0, THETA.1));
        }
        match &self.kind {
            RopeKind::Yarn { .. } if theta <= 1.0 => contradiction(format!("YaRN needs a theta above 1, not {theta}")),
            RopeKind::DynamicNtk { .. } | RopeKind::NtkAlpha { .. } if dims <= 2 => {
                contradiction(format!("NTK-scaled RoPE needs more than 2 dimensions, not {dims}"))
            }
            RopeKind::LongRope { factors, .. } if factors.len() != (dims / 2) as usize => {
                contradiction(format!("long_factor has {} numbers, but RoPE of {dims} dimensions needs {}", factors.len(), dims / 2))
            }
            RopeKind::LongRope { original_context, .. } if *original_context < 2 => {
                contradiction(format!("original_max_position_embeddings must be at least 2, not {original_context}"))
            }
            _ => Ok(self),
        }
    }
}

/// How many of `head_dim` dimensions turn when the part `factor` does, rounded down as mlx-lm does.
pub fn rotary_dims(head_dim: u32, factor: f64) -> Result<u32, ConfigError> {
    match (f64::from(head_dim) * factor) as u32 {
        dims if (0.0..=1.0).contains(&factor) && dims > 0 && dims % 2 == 0 => Ok(dims),
        dims => Err(ConfigError::Contradiction {
            message: format!(
                "partial_rotary_factor {factor} of a head of {head_dim} rotates {dims}: it must be an even number within the head"
            ),
        }),
    }
}

/// What the softmax scale of an architecture is multiplied by when it folds YaRN's `mscale_all_dim` into it: mlx-lm's
/// `apply_yarn_mscale`, the other half of [`RopeKind::magnitude`].
pub fn yarn_attention_factor(scaling: Option<&Config>) -> Result<f64, ConfigError> {
    let Some(scaling) = scaling else { return Ok(1.0) };
    let all_dims = scaling.maybe_f64("mscale_all_dim", 0.0, 1e6)?.unwrap_or(0.0);
    if all_dims == 0.0 || kind_name(scaling)? == "default" {
        return Ok(1.0);
    }
    let mscale = yarn_mscale(scaling.maybe_f64("factor", 1e-3, 1e6)?.unwrap_or(1.0), all_dims);
    Ok(mscale * mscale)
}

/// `rope_theta`, whether it stands at the top or in `rope_parameters`.
fn theta(config: &Config, default: Option<f32>, model_type: &str) -> Result<f32, ConfigError> {
    let top = config.maybe_f32("rope_theta", THETA.0, THETA.1)?;
    let nested = match parameters(config, model_type)? {
        Some(parameters) => parameters.maybe_f32("rope_theta", THETA.0, THETA.1)?,
        None => None,
    };
    match (top, nested) {
        (Some(top), Some(nested)) if top != nested => {
            Err(ConfigError::Contradiction { message: format!("rope_theta is {top}, but rope_parameters.rope_theta is {nested}") })
        }
        _ => top.or(nested).or(default).ok_or_else(|| ConfigError::Missing { key: "rope_theta".into() }),
    }
}

/// `rope_scaling`, or `rope_parameters` where it is absent.
fn scaling<'a>(config: &Config<'a>, model_type: &str) -> Result<Option<Config<'a>>, ConfigError> {
    match config.object("rope_scaling", "rope_scaling.")? {
        Some(scaling) => Ok(Some(scaling)),
        None => parameters(config, model_type),
    }
}

/// `rope_parameters` of a config whose layers all share them.
fn parameters<'a>(config: &Config<'a>, model_type: &str) -> Result<Option<Config<'a>>, ConfigError> {
    let parameters = config.object("rope_parameters", "rope_parameters.")?;
    match parameters.iter().flat_map(Config::entries).find(|(_, value)| value.is_object()) {
        Some((key, _)) => {
            let feature = format!("RoPE that differs by layer (rope_parameters.{key})");
            Err(ConfigError::Unsupported { model_type: model_type.into(), feature })
        }
        None => Ok(parameters),
    }
}

fn kind_name<'a>(scaling: &Config<'a>) -> Result<&'a str, ConfigError> {
    let named = |key| Ok::<_, ConfigError>(scaling.text(key)?.filter(|name| !name.is_empty()));
    Ok(named("type")?.or(named("rope_type")?).unwrap_or("default"))
}

fn factor(scaling: &Config) -> Result<f64, ConfigError> {
    scaling.f64("factor", 1e-3, 1e6)
}

/// Positions in time, height and width: all three are the same for text.
fn mrope(scaling: &Config) -> Result<RopeKind, ConfigError> {
    match scaling.u32s("mrope_section")?.unwrap_or_default().len() {
        3 => Ok(RopeKind::Default),
        n => Err(ConfigError::Contradiction { message: format!("mrope_section must have 3 numbers, not {n}") }),
    }
}

fn llama3(scaling: &Config) -> Result<RopeKind, ConfigError> {
    let or = |key, default| Ok::<f64, ConfigError>(scaling.maybe_f64(key, 1e-3, 1e6)?.unwrap_or(default));
    Ok(RopeKind::Llama3 {
        factor: factor(scaling)?,
        low_freq_factor: or("low_freq_factor", 1.0)?,
        high_freq_factor: or("high_freq_factor", 4.0)?,
        original_context: original_context(scaling, 8192)?,
    })
}

fn yarn(scaling: &Config) -> Result<RopeKind, ConfigError> {
    let or = |key, min, default| Ok::<f64, ConfigError>(scaling.maybe_f64(key, min, 1e6)?.unwrap_or(default));
    Ok(RopeKind::Yarn {
        factor: factor(scaling)?,
        beta_fast: or("beta_fast", 1e-3, 32.0)?,
        beta_slow: or("beta_slow", 1e-3, 1.0)?,
        mscale: or("mscale", 0.0, 1.0)?,
        mscale_all_dim: or("mscale_all_dim", 0.0, 0.0)?,
        original_context: original_context(scaling, 4096)?,
    })
}

fn original_context(scaling: &Config, default: u32) -> Result<u32, ConfigError> {
    Ok(scaling.maybe_u32("original_max_position_embeddings", 1, u32::MAX)?.unwrap_or(default))
}

fn positive(max_position_embeddings: u32) -> Result<u32, ConfigError> {
    match max_position_embeddings {
        0 => Err(ConfigError::Contradiction { message: "max_position_embeddings must not be 0".into() }),
        more => Ok(more),
    }
}

/// mlx-lm derives the magnitude from the other keys; a config that sets it must set the same.
fn check_attention_factor(scaling: &Config, kind: &RopeKind, model_type: &str) -> Result<(), ConfigError> {
    let derived = kind.magnitude();
    match scaling.maybe_f64("attention_factor", 0.0, 1e6)? {
        Some(given) if (given - derived).abs() > 1e-4 * derived => Err(ConfigError::Unsupported {
            model_type: model_type.into(),
            feature: format!("a RoPE attention_factor of {given} (its other values give {derived})"),
        }),
        _ => Ok(()),
    }
}

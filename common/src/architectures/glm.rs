//! GLM 4 of the first release, GLM-Edge, and GLM 4 of 2025: interleaved RoPE, often over half a head, and a fused MLP; the latter also norms
//! outputs.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, partial_rotary_factor},
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec, rotary_dims},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "glm", group: Group::Base, special: "interleaved RoPE, fused MLP", read: read_first },
    Architecture {
        model_type: "glm4",
        group: Group::Base,
        special: "interleaved RoPE over half a head, norms of inputs and outputs",
        read,
    },
];

/// Where the config does not say how much of a head turns, half of it does: GLM-4-9B was made so, and GLM-Edge, which turns all, says it.
/// (mlx-lm turns all of it whatever the config says.)
fn read_first(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let dims = rotary_dims(decoder.head_dim, partial_rotary_factor(&source.config)?.unwrap_or(0.5))?;
    let rope = RopeSpec::unscaled(&source.config, source.model_type, dims, Some(10_000.0), true)?;
    dense(&decoder, &rope, true)
}

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let factor = partial_rotary_factor(&source.config)?;
    let factor = factor.ok_or_else(|| ConfigError::Missing { key: "partial_rotary_factor".into() })?;
    let dims = rotary_dims(decoder.head_dim, factor)?;
    let interleaved = source.config.bool_or("rope_traditional", true)?;
    let rope = RopeSpec::unscaled(&source.config, source.model_type, dims, None, interleaved)?;
    let mut spec = dense(&decoder, &rope, false)?;
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let norm = |name: &str| Some(decoder.norm(decoder.path(&format!("model.layers.{i}.{name}")), decoder.hidden_size));
        layer.after_mixer = norm("post_self_attn_layernorm");
        layer.after_feed_forward = norm("post_mlp_layernorm");
    }
    Ok(spec)
}

fn dense(decoder: &Decoder, rope: &RopeSpec, tied_by_default: bool) -> Result<ModelSpec, ConfigError> {
    decoder.source.only_silu()?;
    let bias = AttentionBias { qkv: decoder.config.bool_or("attention_bias", false)?, output: false };
    let intermediate_size = decoder.intermediate_size()?;
    decoder.dense(tied_by_default, |_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
        attention.rope = Some(rope.clone());
        Ok((attention, decoder.fused_mlp(&format!("{path}.mlp"), intermediate_size, false)))
    })
}

//! Mellum 2: Qwen 3 with experts in every layer, sliding windows, and RoPE that differs between layers with and without one.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, windows},
    mixtures::published,
    qwen3_moe::routed,
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{Mixer, ModelSpec, RopeKind, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "mellum", group: Group::Experts, special: "sliding windows, RoPE by type of layer", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["attention_bias"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let missing = |key: &str| ConfigError::Missing { key: key.into() };
    let windows = windows(&decoder.config, decoder.n_layers)?.ok_or_else(|| missing("layer_types"))?;
    let n_experts = decoder.config.u32("num_experts", 1, 1 << 16)?;
    let layers = decoder.layers(|i, path| {
        let window = windows[i as usize];
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.rope = Some(rope(&decoder, window.is_some())?.ok_or_else(|| missing("rope_parameters"))?);
        attention.window = window;
        let routed = routed(&decoder, &format!("{path}.mlp"), n_experts)?;
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), routed))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn rope(decoder: &Decoder, has_window: bool) -> Result<Option<RopeSpec>, ConfigError> {
    let layer_type = if has_window { "sliding_attention" } else { "full_attention" };
    let source = decoder.source;
    match RopeSpec::for_layer_type(&decoder.config, source.model_type, decoder.head_dim, layer_type, None, false)? {
        Some(RopeSpec { kind: RopeKind::Linear { .. }, .. }) => Err(source.unsupported("linear RoPE scaling")),
        rope => Ok(rope),
    }
}

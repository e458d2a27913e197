//! K-EXAONE: sliding windows with RoPE, full attention without, experts picked by corrected sigmoids, a shared expert.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts, windows},
    mixtures::{RouterDefaults, corrected_router, mixture, published as published_experts},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "exaone_moe",
    group: Group::Experts,
    special: "sliding windows, no RoPE on full attention, corrected sigmoid router",
    read,
}];

/// Beside the sum that weights are divided by.
const EPS: f32 = 1e-20;

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only("scoring_func", &["sigmoid"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let missing = |key: &str| ConfigError::Missing { key: key.into() };
    let windows = windows(&config, decoder.n_layers)?.ok_or_else(|| missing("layer_types"))?;
    let has_windows = windows.iter().any(Option::is_some);
    let is_routed = config.bools("is_moe_layer")?.ok_or_else(|| missing("is_moe_layer"))?;
    if is_routed.len() != decoder.n_layers as usize {
        let message = format!("is_moe_layer has {} entries for num_hidden_layers {}", is_routed.len(), decoder.n_layers);
        return Err(ConfigError::Contradiction { message });
    }
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.window = windows[i as usize];
        if attention.window.is_some() || !has_windows {
            attention.rope = Some(decoder.rope(Some(1_000_000.0))?);
        }
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match is_routed[i as usize] {
            true => routed(&decoder, &path_of_mlp)?,
            false => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false)),
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn routed(decoder: &Decoder, path: &str) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let n_experts = config.u32("num_experts", 1, 1 << 16)?;
    let n_shared = config.maybe_u32("num_shared_experts", 0, 1 << 10)?.filter(|n| *n > 0);
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    let gate = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let bias = format!("{path}.gate.e_score_correction_bias");
    let defaults = RouterDefaults { norm_topk_prob: Some(true), routed_scaling_factor: Some(2.5) };
    let router = corrected_router(decoder, gate, bias, EPS, &defaults)?;
    let experts = experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size);
    let shared = n_shared.map(|n| decoder.mlp(&format!("{path}.shared_experts"), n * intermediate_size, false));
    Ok(mixture(router, experts, shared))
}

fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_prefix("mtp.");
    tensors.rename_suffix(".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias")?;
    published_experts(spec, tensors)
}

//! GLM-4.5 to 4.7 and Solar Open: RoPE on a part of each head, experts picked by corrected sigmoids, a shared expert, the first layers dense.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::{RouterDefaults, corrected_router, mixture, published_with_prediction},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{FeedForward, HeadNorms, LinearSpec, Mixer, ModelSpec, RopeSpec, rotary_dims},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "glm4_moe",
        group: Group::Experts,
        special: "corrected sigmoid router with groups, shared expert, partial RoPE",
        read,
    },
    Architecture { model_type: "solar_open", group: Group::Experts, special: "as glm4_moe", read },
];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["tie_word_embeddings"])?;
    source.only("scoring_func", &["sigmoid"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let bias = AttentionBias { qkv: config.bool_or("attention_bias", false)?, output: false };
    let has_head_norms = config.bool_or("use_qk_norm", false)?;
    let rope_dims = rotary_dims(decoder.head_dim, config.maybe_f64("partial_rotary_factor", 0.0, 1.0)?.unwrap_or(1.0))?;
    let rope = RopeSpec::unscaled(&config, source.model_type, rope_dims, None, false)?;
    let n_dense = config.u32("first_k_dense_replace", 0, 4096)?;
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, bias);
        attention.head_norms = if has_head_norms { decoder.head_norms(&attention_path) } else { HeadNorms::None };
        attention.rope = Some(rope.clone());
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match i < n_dense {
            true => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false)),
            false => routed(&decoder, &path_of_mlp)?,
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published_with_prediction), ..decoder.model(layers, false)? })
}

fn routed(decoder: &Decoder, path: &str) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let n_experts = config.u32("n_routed_experts", 1, 1 << 16)?;
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    let gate = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let bias = format!("{path}.gate.e_score_correction_bias");
    let router = corrected_router(decoder, gate, bias, 0.0, &RouterDefaults::default())?;
    let n_shared = config.maybe_u32("n_shared_experts", 0, 1 << 10)?.filter(|n| *n > 0);
    let shared = n_shared.map(|n| decoder.mlp(&format!("{path}.shared_experts"), n * intermediate_size, false));
    let experts = experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size);
    Ok(mixture(router, experts, shared))
}

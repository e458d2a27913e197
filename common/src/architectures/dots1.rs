//! dots.llm1: a norm over each head of queries and keys, experts picked by corrected sigmoids, shared experts, the first layers dense.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::{PROJECTIONS, RouterDefaults, corrected_router, mixture},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "dots1", group: Group::Experts, special: "corrected sigmoid router with groups, shared experts", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["attention_bias", "use_sliding_window"])?;
    source.only("scoring_func", &["sigmoid", "noaux_tc"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    if config.maybe_u32("moe_layer_freq", 1, 4096)? > Some(1) {
        return Err(source.unsupported("`moe_layer_freq` above 1"));
    }
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let n_dense = config.u32("first_k_dense_replace", 0, 4096)?;
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.rope = Some(decoder.rope(None)?);
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match i < n_dense {
            true => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, mlp_bias)),
            false => routed(&decoder, &path_of_mlp, mlp_bias)?,
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn routed(decoder: &Decoder, path: &str, mlp_bias: bool) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let n_experts = config.u32("n_routed_experts", 1, 1 << 16)?;
    let n_shared = config.u32("n_shared_experts", 1, 1 << 10)?;
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    let gate = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let bias = format!("{path}.gate.e_score_correction_bias");
    let router = corrected_router(decoder, gate, bias, 0.0, &RouterDefaults::default())?;
    let experts = experts(&format!("{path}.experts"), n_experts, decoder.hidden_size, intermediate_size);
    let shared = decoder.mlp(&format!("{path}.shared_experts"), n_shared * intermediate_size, mlp_bias);
    Ok(mixture(router, experts, Some(shared)))
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.stack_experts("mlp.experts", "mlp.experts", &PROJECTIONS)
}

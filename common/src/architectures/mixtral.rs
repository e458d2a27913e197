//! Mixtral: Mistral with routed experts; the best experts first, softmax over them.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::{NUMBERED_PROJECTIONS, mixture},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{LinearSpec, Mixer, ModelSpec, Ranking, RopeSpec, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "mixtral", group: Group::Experts, special: "softmax over the picked experts", read }];

/// A `sliding_window` is not looked at: some published configs have Mistral's, which Mixtral was never trained with.
pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let n_experts = config.maybe_u32("num_local_experts", 1, 1 << 16)?.unwrap_or(8);
    let top_k = config.maybe_u32("num_experts_per_tok", 1, n_experts)?.unwrap_or(2);
    let interleaved = config.bool_or("rope_traditional", false)?;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, Some(1_000_000.0), interleaved)?;
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        attention.rope = Some(rope.clone());
        let router = LinearSpec::new(format!("{path}.block_sparse_moe.gate"), decoder.hidden_size, n_experts, false);
        let router = RouterSpec { ranking: Ranking::BestFirst, ..RouterSpec::softmax_of_picked(router, top_k) };
        let path_of_experts = format!("{path}.block_sparse_moe.switch_mlp");
        let experts = experts(&path_of_experts, n_experts, decoder.hidden_size, decoder.intermediate_size()?);
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), mixture(router, experts, None)))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.stack_experts("block_sparse_moe.experts", "block_sparse_moe.switch_mlp", &NUMBERED_PROJECTIONS)
}

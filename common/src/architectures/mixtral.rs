//! Mixtral: Mistral with routed experts; the best experts first, softmax over them.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec, MoeSpec, Ranking, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "mixtral", group: Group::Experts, special: "softmax over the picked experts", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let n_experts = decoder.config.maybe_u32("num_local_experts", 1, 1 << 16)?.unwrap_or(8);
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        attention.rope = Some(decoder.rope(Some(1_000_000.0))?);
        let moe = moe(&decoder, &format!("{path}.block_sparse_moe"), n_experts)?;
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Experts(Box::new(moe))))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let projections = [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")];
    tensors.stack_experts("block_sparse_moe.experts", "block_sparse_moe.switch_mlp", &projections)
}

fn moe(decoder: &Decoder, path: &str, n_experts: u32) -> Result<MoeSpec, ConfigError> {
    let router = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let top_k = decoder.config.maybe_u32("num_experts_per_tok", 1, n_experts)?.unwrap_or(2);
    Ok(MoeSpec {
        router: RouterSpec { ranking: Ranking::BestFirst, ..RouterSpec::softmax_of_picked(router, top_k) },
        experts: experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, decoder.intermediate_size()?),
        shared: None,
        latent: None,
    })
}

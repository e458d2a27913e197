//! Qwen 3 with routed experts: softmax over all experts, the best ones, renormalised when the config says so; some layers stay dense.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec, MoeSpec, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "qwen3_moe", group: Group::Experts, special: "a norm over each head of queries and keys", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let n_experts = config.u32("num_experts", 0, 1 << 16)?;
    let dense_layers = config.u32s("mlp_only_layers")?.unwrap_or_default();
    let sparse_step = config.maybe_u32("decoder_sparse_step", 1, 4096)?.unwrap_or(1);
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.rope = Some(decoder.rope(None)?);
        let path_of_mlp = format!("{path}.mlp");
        let routed = !dense_layers.contains(&i) && n_experts > 0 && (i + 1) % sparse_step == 0;
        let feed_forward = match routed {
            true => FeedForward::Experts(Box::new(moe(&decoder, &path_of_mlp, n_experts)?)),
            false => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false)),
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let projections = ["gate_proj", "up_proj", "down_proj"].map(|name| (name, name));
    tensors.stack_experts("mlp.experts", "mlp.switch_mlp", &projections)
}

fn moe(decoder: &Decoder, path: &str, n_experts: u32) -> Result<MoeSpec, ConfigError> {
    let config = decoder.config;
    let router = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    Ok(MoeSpec {
        router: RouterSpec::softmax(router, config.u32("num_experts_per_tok", 1, n_experts)?, config.bool_or("norm_topk_prob", false)?),
        experts: experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size),
        shared: None,
        latent: None,
    })
}

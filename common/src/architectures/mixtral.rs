//! Mixtral: Mistral with routed experts; the best experts first, softmax over them.

use super::blocks::{AttentionBias, Decoder, experts};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LayerSpec, Mixer, ModelSpec, MoeSpec, RouterScoring},
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, "mixtral")?;
    let bias = AttentionBias { qkv: false, output: false };
    let n_experts = config.maybe_u32("num_local_experts", 1, 1 << 16)?.unwrap_or(8);
    let layers = (0..decoder.n_layers).map(|i| {
        let path = format!("model.layers.{i}");
        let (before_mixer, before_feed_forward) = decoder.pre_norms(&path);
        Ok(LayerSpec {
            before_mixer,
            mixer: Mixer::Attention(decoder.attention(&path, bias, Some(1_000_000.0))?),
            after_mixer: None,
            before_feed_forward,
            feed_forward: FeedForward::Experts(moe(&decoder, &path, n_experts)?),
            after_feed_forward: None,
        })
    });
    let model = decoder.model(layers.collect::<Result<_, _>>()?, false)?;
    Ok(ModelSpec { published: Published::new(published), ..model })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let projections = [("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")];
    tensors.stack_experts("block_sparse_moe.experts", "block_sparse_moe.switch_mlp", &projections)
}

fn moe(decoder: &Decoder, layer: &str, n_experts: u32) -> Result<MoeSpec, ConfigError> {
    let block = format!("{layer}.block_sparse_moe");
    let [gate, up, down] = experts(&format!("{block}.switch_mlp"), n_experts, decoder.hidden_size, decoder.intermediate_size()?);
    Ok(MoeSpec {
        router: decoder.linear(format!("{block}.gate"), decoder.hidden_size, n_experts, false),
        scoring: RouterScoring::TopKThenSoftmax,
        top_k: decoder.config.maybe_u32("num_experts_per_tok", 1, n_experts)?.unwrap_or(2),
        gate,
        up,
        down,
    })
}

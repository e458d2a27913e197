//! Mixtral: Mistral with routed experts; the best experts first, softmax over them.

use super::blocks::{AttentionBias, Decoder, ExpertNames, experts};
use crate::{
    config::{Config, ConfigError},
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
    decoder.model(layers.collect::<Result<_, _>>()?, false)
}

fn moe(decoder: &Decoder, layer: &str, n_experts: u32) -> Result<MoeSpec, ConfigError> {
    let block = format!("{layer}.block_sparse_moe");
    let (stacked, published) = (format!("{block}.switch_mlp"), format!("{block}.experts.{{}}"));
    let names = ExpertNames { stacked: &stacked, published: &published, projections: ["w1", "w3", "w2"] };
    let [gate, up, down] = experts(&names, n_experts, decoder.hidden_size, decoder.intermediate_size()?);
    Ok(MoeSpec {
        router: decoder.linear(format!("{block}.gate"), decoder.hidden_size, n_experts, false),
        scoring: RouterScoring::TopKThenSoftmax,
        top_k: decoder.config.maybe_u32("num_experts_per_tok", 1, n_experts)?.unwrap_or(2),
        gate,
        up,
        down,
    })
}

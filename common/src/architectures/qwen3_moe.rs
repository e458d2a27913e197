//! Qwen 3 with routed experts: softmax over all experts, the best ones, renormalised when the config says so; some layers stay dense.

use super::blocks::{AttentionBias, Decoder, experts};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LayerSpec, Mixer, ModelSpec, MoeSpec, RouterScoring},
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, "qwen3_moe")?;
    let bias = AttentionBias { qkv: false, output: false };
    let n_experts = config.u32("num_experts", 0, 1 << 16)?;
    let dense_layers = config.u32s("mlp_only_layers")?.unwrap_or_default();
    let sparse_step = config.maybe_u32("decoder_sparse_step", 1, 4096)?.unwrap_or(1);
    let layers = (0..decoder.n_layers).map(|i| {
        let path = format!("model.layers.{i}");
        let (before_mixer, before_feed_forward) = decoder.pre_norms(&path);
        let routed = !dense_layers.contains(&i) && n_experts > 0 && (i + 1) % sparse_step == 0;
        let feed_forward = match routed {
            true => FeedForward::Experts(moe(&decoder, &path, n_experts)?),
            false => FeedForward::Mlp(decoder.mlp(&path, decoder.intermediate_size()?, false)),
        };
        Ok(LayerSpec {
            before_mixer,
            mixer: Mixer::Attention(decoder.attention_with_head_norms(&path, bias, None)?),
            after_mixer: None,
            before_feed_forward,
            feed_forward,
            after_feed_forward: None,
        })
    });
    let model = decoder.model(layers.collect::<Result<_, _>>()?, false)?;
    Ok(ModelSpec { published: Published::new(published), ..model })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    let projections = ["gate_proj", "up_proj", "down_proj"].map(|name| (name, name));
    tensors.stack_experts("mlp.experts", "mlp.switch_mlp", &projections)
}

fn moe(decoder: &Decoder, layer: &str, n_experts: u32) -> Result<MoeSpec, ConfigError> {
    let config = decoder.config;
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    let [gate, up, down] = experts(&format!("{layer}.mlp.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size);
    Ok(MoeSpec {
        router: decoder.linear(format!("{layer}.mlp.gate"), decoder.hidden_size, n_experts, false),
        scoring: RouterScoring::SoftmaxThenTopK { renormalise: config.bool_or("norm_topk_prob", false)? },
        top_k: config.u32("num_experts_per_tok", 1, n_experts)?,
        gate,
        up,
        down,
    })
}

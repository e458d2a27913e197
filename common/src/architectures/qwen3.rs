//! Qwen 3, dense: Llama with a norm over each head of queries and keys.

use super::blocks::{AttentionBias, Decoder};
use crate::{
    config::{Config, ConfigError},
    spec::{FeedForward, LayerSpec, Mixer, ModelSpec},
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, "qwen3")?;
    let bias = AttentionBias { qkv: false, output: false };
    let intermediate_size = decoder.intermediate_size()?;
    let layers = (0..decoder.n_layers).map(|i| {
        let path = format!("model.layers.{i}");
        let (before_mixer, before_feed_forward) = decoder.pre_norms(&path);
        Ok(LayerSpec {
            before_mixer,
            mixer: Mixer::Attention(decoder.attention_with_head_norms(&path, bias, None)?),
            after_mixer: None,
            before_feed_forward,
            feed_forward: FeedForward::Mlp(decoder.mlp(&path, intermediate_size, false)),
            after_feed_forward: None,
        })
    });
    decoder.model(layers.collect::<Result<_, _>>()?, false)
}

//! Llama 1 to 3 and what copied it: pre-norm, grouped queries, gated MLP; optional biases and sliding windows.

use super::blocks::{AttentionBias, Decoder};
use crate::{
    config::{Config, ConfigError},
    spec::{FeedForward, LayerSpec, Mixer, ModelSpec},
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    decoder(config, "llama")
}

/// Also read by architectures that are Llama under another name.
pub(super) fn decoder(config: &Config, model_type: &'static str) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(config, model_type)?;
    let attention_bias = config.bool_or("attention_bias", false)?;
    let bias = AttentionBias { qkv: attention_bias, output: attention_bias };
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let intermediate_size = decoder.intermediate_size()?;
    let windows = windows(config, decoder.n_layers)?;
    let layers = windows.into_iter().enumerate().map(|(i, window)| {
        let path = format!("model.layers.{i}");
        let (before_mixer, before_feed_forward) = decoder.pre_norms(&path);
        let mut attention = decoder.attention(&path, bias, Some(10_000.0))?;
        attention.window = window;
        Ok(LayerSpec {
            before_mixer,
            mixer: Mixer::Attention(attention),
            after_mixer: None,
            before_feed_forward,
            feed_forward: FeedForward::Mlp(decoder.mlp(&path, intermediate_size, mlp_bias)),
            after_feed_forward: None,
        })
    });
    decoder.model(layers.collect::<Result<_, _>>()?, true)
}

/// The sliding window of each layer, from `layer_types`; a `sliding_window` without them is not used, as in mlx-lm.
fn windows(config: &Config, n_layers: u32) -> Result<Vec<Option<u32>>, ConfigError> {
    let Some(types) = config.texts("layer_types")? else {
        return Ok(vec![None; n_layers as usize]);
    };
    if types.len() != n_layers as usize {
        return Err(ConfigError::Contradiction {
            message: format!("layer_types has {} entries for num_hidden_layers {n_layers}", types.len()),
        });
    }
    let invalid = |found: &str| ConfigError::Invalid {
        key: "layer_types".into(),
        wanted: "full_attention or sliding_attention".into(),
        found: found.into(),
    };
    types
        .into_iter()
        .map(|kind| match kind {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(Some(config.u32("sliding_window", 1, u32::MAX)?)),
            other => Err(invalid(other)),
        })
        .collect()
}

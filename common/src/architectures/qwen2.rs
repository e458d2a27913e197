//! Qwen 2 and 2.5: Llama with biases on queries, keys and values.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "qwen2", group: Group::Base, special: "biases on queries, keys and values", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias { qkv: true, output: false });
        attention.rope = Some(decoder.rope(Some(1_000_000.0))?);
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, false);
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, true)
}

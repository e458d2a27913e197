//! Qwen 3, dense: Llama with a norm over each head of queries and keys.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "qwen3", group: Group::Base, special: "a norm over each head of queries and keys", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.rope = Some(decoder.rope(None)?);
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, false);
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, false)
}

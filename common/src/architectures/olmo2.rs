//! OLMo 2: norms of what attention and MLP give and none before them; queries and keys are normed over all heads together.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "olmo2", group: Group::Base, special: "norms of outputs, queries and keys normed as a whole", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = decoder.rope(Some(10_000.0))?;
    let layers = decoder.layers(|_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, bias);
        attention.head_norms = decoder.whole_norms(&attention_path);
        attention.rope = Some(rope.clone());
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, mlp_bias);
        Ok(decoder.output_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, true)
}

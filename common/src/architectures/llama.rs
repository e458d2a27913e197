//! Llama 1 to 3 and what copied it: pre-norm, grouped queries, gated MLP; optional biases and sliding windows.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, windows},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "llama", group: Group::Base, special: "optional biases and sliding windows", read },
    Architecture { model_type: "mistral", group: Group::Base, special: "as llama", read },
    Architecture { model_type: "iquestcoder", group: Group::Base, special: "as llama", read },
    Architecture { model_type: "xverse", group: Group::Base, special: "as llama", read },
];

/// Also read by architectures that are Llama under another name.
pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let intermediate_size = decoder.intermediate_size()?;
    let windows = windows(&config, decoder.n_layers)?;
    let layers = decoder.layers(|i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
        attention.rope = Some(decoder.rope(Some(10_000.0))?);
        attention.window = windows.as_ref().and_then(|windows| windows[i as usize]);
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, mlp_bias);
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, true)
}

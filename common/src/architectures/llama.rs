//! Llama 1 to 3 and what copied it: pre-norm, grouped queries, gated MLP; optional biases and sliding windows.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, windows},
};
use crate::{config::ConfigError, spec::ModelSpec};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "llama", group: Group::Base, special: "optional biases and sliding windows", read },
    Architecture { model_type: "mistral", group: Group::Base, special: "as llama", read },
    Architecture { model_type: "iquestcoder", group: Group::Base, special: "as llama", read },
    Architecture { model_type: "xverse", group: Group::Base, special: "as llama", read },
];

/// Also read by architectures that are Llama under another name.
pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    read_with_positions(source, |_| true)
}

/// Only layers for which `has_rope` of their number is true have RoPE.
pub(super) fn read_with_positions(source: Source, has_rope: impl Fn(u32) -> bool) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let intermediate_size = decoder.intermediate_size()?;
    let windows = windows(&config, decoder.n_layers)?;
    let rope = decoder.rope(Some(10_000.0))?;
    decoder.dense(true, |i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
        attention.rope = has_rope(i).then(|| rope.clone());
        attention.window = windows.as_ref().and_then(|windows| windows[i as usize]);
        Ok((attention, decoder.mlp(&format!("{path}.mlp"), intermediate_size, mlp_bias)))
    })
}

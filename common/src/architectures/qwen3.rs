//! Qwen 3, dense: Llama with a norm over each head of queries and keys.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "qwen3", group: Group::Base, special: "a norm over each head of queries and keys", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    source.refuse_flags(&["use_sliding_window", "attention_bias"])?;
    let decoder = Decoder::read(source)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = RopeSpec::read(&decoder.config, source.model_type, decoder.head_dim, None, false)?;
    decoder.dense(false, |_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.rope = Some(rope.clone());
        Ok((attention, decoder.mlp(&format!("{path}.mlp"), intermediate_size, false)))
    })
}

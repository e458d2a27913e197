//! Qwen 2 and 2.5: Llama with biases on queries, keys and values.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{config::ConfigError, spec::ModelSpec};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "qwen2", group: Group::Base, special: "biases on queries, keys and values", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["use_sliding_window"])?;
    let decoder = Decoder::read(source)?;
    decoder.uniform(AttentionBias { qkv: true, output: false }, false, &decoder.rope(Some(1_000_000.0))?, true)
}

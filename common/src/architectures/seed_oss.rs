//! Seed-OSS: Llama with a bias on queries, keys and values, and one of its own choice on the output.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{config::ConfigError, spec::ModelSpec};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "seed_oss", group: Group::Base, special: "optional biases", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let flag = |key: &str| decoder.config.bool_or(key, false);
    let bias = AttentionBias { qkv: flag("attention_bias")?, output: flag("attention_out_bias")? };
    decoder.uniform(bias, flag("mlp_bias")?, &decoder.rope(Some(10_000.0))?, true)
}

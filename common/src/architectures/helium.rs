//! Helium: Llama with interleaved RoPE.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "helium", group: Group::Base, special: "interleaved RoPE", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, None, true)?;
    let bias = AttentionBias { qkv: config.bool_or("attention_bias", false)?, output: false };
    decoder.uniform(bias, config.bool_or("mlp_bias", false)?, &rope, false)
}

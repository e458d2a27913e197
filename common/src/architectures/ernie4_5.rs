//! ERNIE 4.5, dense: Llama with interleaved RoPE and optional biases.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "ernie4_5", group: Group::Base, special: "interleaved RoPE, optional biases", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let rope = RopeSpec::unscaled(&decoder.config, source.model_type, decoder.head_dim, None, true)?;
    let bias = decoder.config.bool_or("use_bias", false)?;
    decoder.uniform(AttentionBias::all(bias), bias, &rope, false)
}

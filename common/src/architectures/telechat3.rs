//! TeleChat 3: Llama with YaRN.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "telechat3", group: Group::Base, special: "as llama, YaRN", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let rope = RopeSpec::read(&config, source.model_type, decoder.head_dim, None, false)?;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    decoder.uniform(bias, config.bool_or("mlp_bias", false)?, &rope, false)
}

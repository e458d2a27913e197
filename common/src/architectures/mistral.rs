//! Mistral 7B and its dense successors: Llama under another name.

use super::llama;
use crate::{
    config::{Config, ConfigError},
    spec::ModelSpec,
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    llama::decoder(config, "mistral")
}

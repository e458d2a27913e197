//! SmolLM 3: Llama in which every fourth layer, or those that the config lists, has no positions.

use super::{
    Architecture, Group,
    blocks::{Source, roped_layers},
    llama,
};
use crate::{config::ConfigError, spec::ModelSpec};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "smollm3", group: Group::Base, special: "some layers without RoPE", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    let interval = config.maybe_u32("no_rope_layer_interval", 1, 4096)?.unwrap_or(4);
    let listed = roped_layers(&config)?;
    llama::read_with_positions(source, |i| listed.as_ref().map_or((i + 1) % interval != 0, |listed| listed[i as usize]))
}

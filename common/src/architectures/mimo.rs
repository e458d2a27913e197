//! MiMo: Qwen 2 whose checkpoints also hold layers that predict further tokens.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{config::ConfigError, published::Published, spec::ModelSpec};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "mimo", group: Group::Base, special: "biases on queries, keys and values", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["use_sliding_window"])?;
    let decoder = Decoder::read(source)?;
    let spec = decoder.uniform(AttentionBias { qkv: true, output: false }, false, &decoder.rope(Some(10_000.0))?, false)?;
    let published = Published::new(|_, tensors| {
        tensors.drop_prefix("model.mtp_layers.");
        Ok(())
    });
    Ok(ModelSpec { published, ..spec })
}

//! Models that also see, of which the language model is served: its parameters stand under `language_model.`.

use super::blocks::Source;
use crate::{
    config::ConfigError,
    published::{PublishedError, Tensors},
    spec::ModelSpec,
};

/// Components of names that are of no use for text.
const TOWERS: [&str; 5] = ["visual", "vision_tower", "multi_modal_projector", "mm_projector", "vision_model"];

/// The language model of a wrapper, read by `read` from `text_config` or, where there is none, from the top.
pub(super) fn language_model(
    source: Source,
    read: impl FnOnce(Source) -> Result<ModelSpec, ConfigError>,
) -> Result<ModelSpec, ConfigError> {
    let spec = read(source.text_or_root("language_model.")?)?;
    Ok(ModelSpec { published: spec.published.clone().after(published), ..spec })
}

/// Checkpoints have the language model's names under `language_model.`, or bare, or since transformers 4.52 those of its body under
/// `model.language_model.`.
fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_where(|name| name.split('.').any(|component| TOWERS.contains(&component)));
    tensors.rename_prefix("model.language_model.", "language_model.model.")?;
    tensors.rename_each(|name| (!name.starts_with("language_model.")).then(|| format!("language_model.{name}")))
}

//! MiniCPM 1 and 2: Llama with a factor on the embedding, one that shrinks with the depth on the residual, and logits of a narrower model.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{HeadSpec, LogitsSpec, ModelSpec, Residual},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "minicpm", group: Group::Base, special: "factors on embedding, residual and logits", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let mut spec = decoder.uniform(AttentionBias::NONE, false, &decoder.rope(Some(1_000_000.0))?, false)?;
    let multiplier = (config.f64("scale_depth", -1e6, 1e6)? / f64::from(decoder.n_layers).sqrt()) as f32;
    spec.layers.iter_mut().for_each(|layer| layer.residual = Residual::Serial { multiplier });
    spec.embedding_scale = config.f32("scale_emb", -1e6, 1e6)?;
    let hidden_divisor = (f64::from(decoder.hidden_size) / f64::from(config.u32("dim_model_base", 1, 1 << 20)?)) as f32;
    spec.logits = LogitsSpec { hidden_divisor, ..LogitsSpec::PLAIN };
    // Checkpoints of which the config says nothing have a head of their own or not.
    if let HeadSpec::Linear(head) = spec.head {
        spec.head = HeadSpec::LinearOrTied(head);
    }
    Ok(spec)
}

//! Granite 3: Llama with factors on embedding, scores, outputs of attention and MLP, and logits.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{LogitsSpec, ModelSpec, Residual, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "granite", group: Group::Base, special: "factors on embedding, scores, residual and logits", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let factor = |key: &str| config.f32(key, -1e6, 1e6);
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let (scale, multiplier) = (factor("attention_multiplier")?, factor("residual_multiplier")?);
    let intermediate_size = decoder.intermediate_size()?;
    let rope = RopeSpec::read(&config, source.model_type, decoder.head_dim, None, false)?;
    let mut spec = decoder.dense(true, |_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
        attention.scale = scale;
        attention.rope = Some(rope.clone());
        Ok((attention, decoder.mlp(&format!("{path}.mlp"), intermediate_size, mlp_bias)))
    })?;
    spec.layers.iter_mut().for_each(|layer| layer.residual = Residual::Serial { multiplier });
    spec.embedding_scale = factor("embedding_multiplier")?;
    spec.logits = LogitsSpec { divisor: config.f32("logits_scaling", 1e-6, 1e6)?, ..LogitsSpec::PLAIN };
    Ok(spec)
}

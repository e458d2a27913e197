//! Ministral 3: Llama with YaRN, queries that grow with the logarithm of the position, and optional sliding windows.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, windows},
};
use crate::{
    config::ConfigError,
    spec::{ModelSpec, RopeSpec, TemperatureSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "ministral3",
    group: Group::Base,
    special: "YaRN, queries scaled by position, optional sliding windows",
    read,
}];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    source.refuse_flags(&["attention_bias"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let parameters = config.object("rope_parameters", "rope_parameters.")?;
    let parameters = parameters.ok_or_else(|| ConfigError::Missing { key: "rope_parameters".into() })?;
    let theta = parameters.f32("rope_theta", 1.0, 1e12)?;
    let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?;
    let rope = RopeSpec::initialize(decoder.head_dim, theta, false, Some(&parameters), max_position_embeddings, source.model_type)?;
    let temperature = TemperatureSpec {
        beta: parameters.f32("llama_4_scaling_beta", -1e6, 1e6)?,
        original_context: parameters.u32("original_max_position_embeddings", 1, u32::MAX)?,
        position_offset: 0,
    };
    let windows = windows(&config, decoder.n_layers)?;
    let intermediate_size = decoder.intermediate_size()?;
    decoder.dense(true, |i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        attention.rope = Some(rope.clone());
        attention.temperature = Some(temperature.clone());
        attention.window = windows.as_ref().and_then(|windows| windows[i as usize]);
        Ok((attention, decoder.mlp(&format!("{path}.mlp"), intermediate_size, false)))
    })
}

//! Youtu-LLM: a dense decoder with latent attention whose keys and values are cached in full.

use super::{
    Architecture, Group,
    blocks::Source,
    latent::{self, LatentAttention},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, Mixer, ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "youtu_llm", group: Group::Latent, special: "dense, keys and values in full", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-6)?;
    let config = decoder.config;
    let interleaved = config.bool_or("rope_traditional", config.bool_or("rope_interleave", true)?)?;
    let rope = RopeSpec::read(&config, source.model_type, latent::rope_dim(&config)?, Some(1_600_000.0), interleaved)?;
    let value_dim = config.u32("v_head_dim", 1, 1 << 14)?;
    let mut attention = LatentAttention::with_rope(&decoder, Some(1536), value_dim, rope, 1.0)?;
    attention.norm_eps = decoder.norm_eps;
    let (intermediate_size, mlp_bias) = (decoder.intermediate_size()?, config.bool_or("mlp_bias", false)?);
    let layers = decoder.layers(|_, path| {
        let mixer = Mixer::Latent(Box::new(attention.expanded(&format!("{path}.self_attn"))));
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, mlp_bias);
        Ok(decoder.pre_norm_layer(path, mixer, FeedForward::Mlp(mlp)))
    })?;
    decoder.model(layers, true)
}

//! MiniCPM3: a dense decoder with latent attention in full, LongRoPE, and factors on embedding, residuals and logits.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    latent::{self, LatentAttention},
};
use crate::{
    config::ConfigError,
    spec::{FeedForward, HeadSpec, LayerSpec, LogitsSpec, Mixer, ModelSpec, Residual, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "minicpm3", group: Group::Latent, special: "dense, keys and values in full, LongRoPE", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-6)?;
    let config = decoder.config;
    let value_dim = decoder.hidden_size / decoder.n_heads;
    let mut attention = LatentAttention::with_rope(&decoder, None, value_dim, rope(&decoder)?, 1.0)?;
    // These norms are made without the config's eps.
    attention.norm_eps = 1e-5;
    let depth = config.f64("scale_depth", -1e6, 1e6)? / f64::from(decoder.n_layers).sqrt();
    let residual = Residual::Serial { multiplier: depth as f32 };
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|_, path| {
        let mixer = Mixer::Latent(Box::new(attention.expanded(&format!("{path}.self_attn"))));
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, false);
        Ok(LayerSpec { residual: residual.clone(), ..decoder.pre_norm_layer(path, mixer, FeedForward::Mlp(mlp)) })
    })?;
    let model = decoder.model(layers, false)?;
    let base = config.f64("dim_model_base", 1.0, 1e6)?;
    let hidden_divisor = if model.head == HeadSpec::Tied { 1.0 } else { f64::from(decoder.hidden_size) / base };
    Ok(ModelSpec {
        embedding_scale: config.f32("scale_emb", -1e6, 1e6)?,
        logits: LogitsSpec { hidden_divisor: hidden_divisor as f32, ..LogitsSpec::PLAIN },
        ..model
    })
}

/// LongRoPE, whatever type the config names.
fn rope(decoder: &Decoder) -> Result<RopeSpec, ConfigError> {
    let config = decoder.config;
    let dims = latent::rope_dim(&config)?;
    let theta = config.maybe_f32("rope_theta", 1.0, 1e12)?.unwrap_or(1_000_000.0);
    let Some(scaling) = latent::rope_scaling(&config)? else {
        return Err(ConfigError::Missing { key: "rope_scaling".into() });
    };
    let original = scaling.maybe_u32("original_max_position_embeddings", 1, u32::MAX)?.unwrap_or(4096);
    let max_position_embeddings = config.u32("max_position_embeddings", 1, u32::MAX)?;
    RopeSpec::long_rope(dims, theta, &scaling, max_position_embeddings, original, decoder.source.model_type)
}

//! GLM-4.7-Flash: DeepSeek-V3's layers with norms of the model's own eps.

use super::{
    Architecture, Group,
    blocks::Source,
    dense_then_routed::DenseThenRouted,
    latent::{self, LatentAttention},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{Mixer, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "glm4_moe_lite", group: Group::Latent, special: "as deepseek_v3", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-5)?;
    if let Some(factor) = decoder.config.maybe_f32("partial_rotary_factor", 0.0, 1.0)?.filter(|factor| *factor != 1.0) {
        return Err(source.unsupported(format!("`partial_rotary_factor` {factor}")));
    }
    let mut attention = LatentAttention::read(&decoder, Some(768), Some(1_000_000.0))?;
    attention.norm_eps = decoder.norm_eps;
    let feed_forwards = DenseThenRouted::read(&decoder, 1)?;
    let layers = decoder.layers(|i, path| {
        let mixer = Mixer::Latent(Box::new(attention.absorbed(&format!("{path}.self_attn"), false)));
        let feed_forward = feed_forwards.corrected(i, &format!("{path}.mlp"), 1e-20)?;
        Ok(decoder.pre_norm_layer(path, mixer, feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(latent::published), ..decoder.model(layers, false)? })
}

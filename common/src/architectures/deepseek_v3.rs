//! DeepSeek-V3 (DeepSeek-AI 2024) and what was built like it: the latent vector in the cache, experts picked by corrected sigmoids.

use super::{
    Architecture, Group,
    blocks::Source,
    dense_then_routed::DenseThenRouted,
    latent::{self, LatentAttention},
    vision,
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{Mixer, ModelSpec},
};

const fn text(model_type: &'static str, special: &'static str) -> Architecture {
    Architecture { model_type, group: Group::Latent, special, read }
}

const fn wrapper(model_type: &'static str) -> Architecture {
    Architecture {
        model_type,
        group: Group::Latent,
        special: "the language model of deepseek_v3 alone, images are not read",
        read: read_wrapped,
    }
}

pub(super) const ARCHITECTURES: &[Architecture] = &[
    text("deepseek_v3", "a latent cache, corrected sigmoid router with groups"),
    text("kimi_k2", "as deepseek_v3"),
    text("joyai_llm_flash", "as deepseek_v3"),
    wrapper("kimi_k25"),
    wrapper("kimi_vl"),
];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-6)?;
    let attention = LatentAttention::read(&decoder, Some(1536), Some(10_000.0))?;
    let feed_forwards = DenseThenRouted::read(&decoder, 0)?;
    let layers = decoder.layers(|i, path| {
        let mixer = Mixer::Latent(Box::new(attention.absorbed(&format!("{path}.self_attn"), false)));
        let feed_forward = feed_forwards.corrected(i, &format!("{path}.mlp"), 0.0)?;
        Ok(decoder.pre_norm_layer(path, mixer, feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(latent::published), ..decoder.model(layers, false)? })
}

/// With a vision tower beside it.
fn read_wrapped(source: Source) -> Result<ModelSpec, ConfigError> {
    vision::language_model(source, read)
}

//! DeepSeek-V3.2 (DeepSeek-AI 2025) and GLM-5: DeepSeek-V3 whose tokens attend to those that an indexer picks.

use super::{
    Architecture, Group,
    blocks::{Decoder, Source},
    dense_then_routed::DenseThenRouted,
    latent::{self, LatentAttention},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{IndexerSpec, LatentAttentionSpec, LinearSpec, Mixer, ModelSpec, NormKind, NormSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        model_type: "deepseek_v32",
        group: Group::Latent,
        special: "as deepseek_v3; each token attends to 2048 that an indexer picks",
        read,
    },
    Architecture {
        model_type: "glm_moe_dsa",
        group: Group::Latent,
        special: "as deepseek_v32, another RoPE in the indexer",
        read: read_glm,
    },
];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    read_with(source, false)
}

fn read_glm(source: Source) -> Result<ModelSpec, ConfigError> {
    read_with(source, true)
}

/// `interleaved` is the indexer's RoPE where the config does not say.
fn read_with(source: Source, interleaved: bool) -> Result<ModelSpec, ConfigError> {
    let decoder = latent::decoder(source, 1e-6)?;
    let interleaved = decoder.config.bool_or("indexer_rope_interleave", interleaved)?;
    let attention = LatentAttention::read(&decoder, Some(1536), Some(10_000.0))?;
    let feed_forwards = DenseThenRouted::read(&decoder, 0)?;
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut latent = attention.absorbed(&attention_path, false);
        latent.indexer = Some(indexer(&decoder, &latent, &attention_path, interleaved)?);
        let feed_forward = feed_forwards.corrected(i, &format!("{path}.mlp"), 0.0)?;
        Ok(decoder.pre_norm_layer(path, Mixer::Latent(Box::new(latent)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(latent::published), ..decoder.model(layers, false)? })
}

fn indexer(decoder: &Decoder, latent: &LatentAttentionSpec, path: &str, interleaved: bool) -> Result<IndexerSpec, ConfigError> {
    let config = decoder.config;
    let n_heads = config.maybe_u32("index_n_heads", 1, 1 << 14)?.unwrap_or(64);
    let head_dim = config.maybe_u32("index_head_dim", 1, 1 << 14)?.unwrap_or(128);
    if head_dim < latent.rope_dim {
        return Err(ConfigError::Contradiction {
            message: format!("index_head_dim {head_dim} is smaller than qk_rope_head_dim {}", latent.rope_dim),
        });
    }
    let Some(rank) = latent.query_rank() else {
        return Err(ConfigError::Missing { key: "q_lora_rank".into() });
    };
    let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.indexer.{name}"), input, output, false);
    Ok(IndexerSpec {
        n_heads,
        head_dim,
        top_k: config.maybe_u32("index_topk", 1, u32::MAX)?.unwrap_or(2048),
        query: linear("wq_b", rank, n_heads * head_dim),
        key: linear("wk", decoder.hidden_size, head_dim),
        key_norm: NormSpec { path: format!("{path}.indexer.k_norm"), dims: head_dim, eps: 1e-5, kind: NormKind::Layer { bias: true } },
        weights: linear("weights_proj", decoder.hidden_size, n_heads),
        rope: RopeSpec { interleaved, ..latent.rope.clone() },
    })
}

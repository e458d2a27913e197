//! Command R: attention and MLP beside each other on one layer norm, interleaved RoPE, scaled logits of a tied head.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{
        AttentionSpec, FeedForward, HeadNorms, LayerSpec, LogitsSpec, Mixer, MlpSpec, ModelSpec, NormKind, NormSpec, Residual, RopeSpec,
        TensorSpec,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "cohere", group: Group::Other, special: "attention and MLP in parallel, layer norms", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = decoder(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let normed = config.bool_or("use_qk_norm", false)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, Some(8_000_000.0), true)?;
    let layers = decoder.layers(|_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, bias);
        if normed {
            attention.head_norms = head_norms(&decoder, &attention_path);
        }
        attention.rope = Some(rope.clone());
        let mlp = decoder.mlp(&format!("{path}.mlp"), intermediate_size, false);
        Ok(parallel_layer(&decoder, path, attention, mlp))
    })?;
    model(&decoder, layers)
}

/// Layer norms, with a bias when the config says so.
pub(super) fn decoder(source: Source<'_>) -> Result<Decoder<'_>, ConfigError> {
    let norm_eps = source.config.maybe_f32("layer_norm_eps", 0.0, 1.0)?.unwrap_or(1e-5);
    let norm_kind = NormKind::Layer { bias: source.config.bool_or("layer_norm_bias", false)? };
    Ok(Decoder { norm_kind, ..Decoder::read_with_eps(source, norm_eps)? })
}

pub(super) fn parallel_layer(decoder: &Decoder, path: &str, attention: AttentionSpec, mlp: MlpSpec) -> LayerSpec {
    LayerSpec {
        before_mixer: Some(decoder.norm(format!("{path}.input_layernorm"), decoder.hidden_size)),
        mixer: Mixer::Attention(Box::new(attention)),
        after_mixer: None,
        before_feed_forward: None,
        feed_forward: FeedForward::Mlp(mlp),
        after_feed_forward: None,
        residual: Residual::Parallel,
        layer_input: None,
        output_scale: None,
    }
}

/// These layers with a tied head, and logits times `logit_scale`.
pub(super) fn model(decoder: &Decoder, layers: Vec<LayerSpec>) -> Result<ModelSpec, ConfigError> {
    let scale = decoder.config.maybe_f32("logit_scale", -1e6, 1e6)?.unwrap_or(0.0625);
    Ok(ModelSpec { logits: LogitsSpec { scale, ..LogitsSpec::PLAIN }, ..decoder.model(layers, true)? })
}

/// Each head of queries and keys has weights of its own.
fn head_norms(decoder: &Decoder, path: &str) -> HeadNorms {
    let weights = |name: &str, n_heads| TensorSpec::new(format!("{path}.{name}.weight"), &[n_heads, decoder.head_dim]);
    HeadNorms::PerHeadWeights {
        norm: NormSpec::layer_unweighted(decoder.head_dim, decoder.norm_eps),
        query: weights("q_norm", decoder.n_heads),
        key: weights("k_norm", decoder.n_kv_heads),
    }
}

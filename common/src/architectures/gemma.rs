//! Gemma 1 and 2: norms that multiply by one plus their weight, scaled embeddings, GELU gates and a tied head; in Gemma 2 norms around each
//! sub-layer, soft caps and a window on every other layer. And what the later Gemmas share with them.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::{Config, ConfigError},
    published::Tensors,
    spec::{Activation, FeedForward, LayerSpec, LogitsSpec, Mixer, MlpSpec, ModelSpec, NormKind, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "gemma", group: Group::Gemma, special: "exact GELU", read },
    Architecture { model_type: "gemma2", group: Group::Gemma, special: "soft caps on scores and logits", read: read_gemma2 },
];

pub(super) const LOCAL: &str = "sliding_attention";
pub(super) const GLOBAL: &str = "full_attention";

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = decoder(source)?;
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        attention.rope = Some(rope(&decoder)?);
        let mlp = MlpSpec { activation: Activation::Gelu, ..decoder.mlp(&format!("{path}.mlp"), decoder.intermediate_size()?, false) };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    model(&decoder, layers)
}

fn read_gemma2(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = decoder(source)?;
    let config = decoder.config;
    let window = config.maybe_u32("sliding_window", 1, u32::MAX)?;
    let layer_types = layer_types(&decoder, &[LOCAL, GLOBAL])?;
    let scalar = config.maybe_f64("query_pre_attn_scalar", 1e-3, 1e6)?.unwrap_or(144.0);
    let layers = decoder.layers(|i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        attention.rope = Some(rope(&decoder)?);
        attention.scale = scalar.powf(-0.5) as f32;
        attention.softcap = soft_cap(&config, "attn_logit_softcapping", Some(50.0))?;
        attention.window = window.filter(|_| layer_types[i as usize] == LOCAL);
        let mlp = gelu_mlp(&decoder, &format!("{path}.mlp"), decoder.intermediate_size()?);
        Ok(sandwich_layer(&decoder, path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
    })?;
    let softcap = soft_cap(&config, "final_logit_softcapping", Some(30.0))?;
    Ok(ModelSpec { logits: LogitsSpec { softcap, ..LogitsSpec::PLAIN }, ..model(&decoder, layers)? })
}

fn decoder(source: Source) -> Result<Decoder, ConfigError> {
    check(&source)?;
    Ok(Decoder { norm_kind: NormKind::Rms { offset: 1.0 }, ..Decoder::read(source)? })
}

fn rope(decoder: &Decoder) -> Result<RopeSpec, ConfigError> {
    let interleaved = decoder.config.bool_or("rope_traditional", false)?;
    RopeSpec::unscaled(&decoder.config, decoder.source.model_type, decoder.head_dim, Some(10_000.0), interleaved)
}

fn model(decoder: &Decoder, layers: Vec<LayerSpec>) -> Result<ModelSpec, ConfigError> {
    Ok(ModelSpec { embedding_scale: embedding_scale(decoder.hidden_size), ..decoder.model(layers, true)? })
}

/// Refuses what no Gemma has here. Every GELU is taken for the one that the architecture has, as mlx-lm does.
pub(super) fn check(source: &Source) -> Result<(), ConfigError> {
    let config = source.config;
    for key in ["hidden_activation", "hidden_act"] {
        if let Some(activation) = config.text(key)?.filter(|activation| !activation.starts_with("gelu")) {
            return Err(source.unsupported(format!("the activation `{activation}`")));
        }
    }
    if config.bool_or("attention_bias", false)? {
        return Err(source.unsupported("a bias in attention"));
    }
    match config.get("use_bidirectional_attention") {
        // Only tokens of an image see each other; text stays causal.
        Some(value) if *value != false && *value != "vision" => Err(source.unsupported("attention in both directions")),
        _ => Ok(()),
    }
}

pub(super) fn embedding_scale(hidden_size: u32) -> f32 {
    f64::from(hidden_size).sqrt() as f32
}

/// The bound under `key`: none when the config says null, `default` when it says nothing.
pub(super) fn soft_cap(config: &Config, key: &str, default: Option<f32>) -> Result<Option<f32>, ConfigError> {
    let is_null = config.entries().any(|(name, value)| name == key && value.is_null());
    Ok(config.maybe_f32(key, 1e-3, 1e6)?.or(default.filter(|_| !is_null)))
}

/// A gated MLP with GELU by its tanh approximation.
pub(super) fn gelu_mlp(decoder: &Decoder, path: &str, intermediate_size: u32) -> MlpSpec {
    MlpSpec { activation: Activation::GeluTanh, ..decoder.mlp(path, intermediate_size, false) }
}

/// A layer with norms before and after each sub-layer.
pub(super) fn sandwich_layer(decoder: &Decoder, path: &str, mixer: Mixer, feed_forward: FeedForward) -> LayerSpec {
    let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.hidden_size);
    LayerSpec {
        after_mixer: Some(norm("post_attention_layernorm")),
        after_feed_forward: Some(norm("post_feedforward_layernorm")),
        ..LayerSpec::pre_norm(norm("input_layernorm"), mixer, norm("pre_feedforward_layernorm"), feed_forward)
    }
}

/// For each layer the one whose keys and values it reads: those from `first_shared` on read the last one before it of their own type.
pub(super) fn source_layers(layer_types: &[&str], first_shared: u32) -> Result<Vec<Option<u32>>, ConfigError> {
    let own = &layer_types[..(first_shared as usize).min(layer_types.len())];
    let source = |(i, layer_type): (usize, &&str)| match own.iter().rposition(|of| of == layer_type) {
        _ if i < own.len() => Ok(None),
        Some(source) => Ok(Some(source as u32)),
        None => Err(ConfigError::Contradiction {
            message: format!("layer {i} reads keys and values of a layer of type `{layer_type}`, but none of the first {} is", own.len()),
        }),
    };
    layer_types.iter().enumerate().map(source).collect()
}

/// `layer_types`, or the pattern over and over where the config has no such list.
pub(super) fn layer_types<'a>(decoder: &Decoder<'a>, pattern: &[&'a str]) -> Result<Vec<&'a str>, ConfigError> {
    let n_layers = decoder.n_layers as usize;
    let Some(types) = decoder.config.texts("layer_types")? else {
        return Ok(pattern.iter().copied().cycle().take(n_layers).collect());
    };
    if types.len() != n_layers {
        let message = format!("layer_types has {} entries for num_hidden_layers {n_layers}", types.len());
        return Err(ConfigError::Contradiction { message });
    }
    match types.iter().find(|layer_type| ![LOCAL, GLOBAL].contains(layer_type)) {
        Some(other) => Err(decoder.source.unsupported(format!("a layer of type `{other}`"))),
        None => Ok(types),
    }
}

/// Published checkpoints have keys and values also for layers that read those of another.
pub(super) fn drop_unused_projections(spec: &ModelSpec, tensors: &mut Tensors) {
    let is_unused = |name: &str| {
        let layer = crate::published::layer_of(name).and_then(|layer| spec.layers.get(layer as usize));
        layer.is_some_and(|layer| layer.mixer.source_layer().is_some())
            && [".self_attn.k_proj.", ".self_attn.v_proj.", ".self_attn.k_norm."].iter().any(|part| name.contains(part))
    };
    tensors.drop_where(is_unused);
}

//! Gemma 3: layers with a window between layers without, each kind with RoPE of its own, and norms over each head of queries and keys.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Defaults, Source},
    gemma::{GLOBAL, LOCAL, check, embedding_scale, gelu_mlp, layer_types, sandwich_layer, soft_cap},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, HeadSpec, LayerSpec, LinearSpec, Mixer, ModelSpec, NormKind, Residual, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "gemma3", group: Group::Gemma, special: "the text side of gemma3_text with images", read: read_wrapper },
    Architecture { model_type: "gemma3_text", group: Group::Gemma, special: "five layers with a window to one without", read },
];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    read_text(source, Defaults { n_heads: Some(4), n_kv_heads: Some(1), vocab_size: Some(262_144), ..Defaults::default() })
}

fn read_wrapper(source: Source) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults { n_heads: Some(8), n_kv_heads: Some(4), vocab_size: Some(262_208), ..Defaults::default() };
    let spec = read_text(source.text("language_model.")?, defaults)?;
    Ok(ModelSpec { published: Published::new(published), ..spec })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    ["vision_tower.", "multi_modal_projector."].into_iter().for_each(|prefix| tensors.drop_prefix(prefix));
    Ok(())
}

fn read_text(source: Source, defaults: Defaults) -> Result<ModelSpec, ConfigError> {
    check(&source)?;
    let norm_eps = source.config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6);
    let (hidden_size, n_layers, head_dim) = (Some(1152), Some(26), Some(256));
    let defaults = Defaults { hidden_size, n_layers, head_dim, norm_eps: Some(norm_eps), ..defaults };
    let decoder = Decoder::read_with_defaults(source, &defaults)?;
    // A wrapper's own counts.
    let vocab_size = source.root.maybe_u32("vocab_size", 1, 1 << 24)?.unwrap_or(decoder.vocab_size);
    let decoder = Decoder { vocab_size, norm_kind: NormKind::Rms { offset: 1.0 }, ..decoder };
    let config = decoder.config;
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if soft_cap(&config, key, None)?.is_some() {
            return Err(source.unsupported(format!("`{key}`")));
        }
    }
    let windows = windows(&decoder)?;
    let intermediate_size = config.maybe_u32("intermediate_size", 1, 1 << 22)?.unwrap_or(6912);
    let scalar = config.maybe_f64("query_pre_attn_scalar", 1e-3, 1e6)?.unwrap_or(256.0);
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.scale = scalar.powf(-0.5) as f32;
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.window = windows[i as usize];
        attention.rope = Some(rope(&decoder, attention.window.is_some())?);
        let mlp = gelu_mlp(&decoder, &format!("{path}.mlp"), intermediate_size);
        let layer = sandwich_layer(&decoder, path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp));
        Ok(LayerSpec { residual: Residual::SerialClipped, ..layer })
    })?;
    let head = LinearSpec::new(decoder.path("lm_head"), decoder.hidden_size, decoder.vocab_size, false);
    // mlx-lm rounds the factor to bfloat16 whatever the model's type is.
    let scale = to_bfloat16(embedding_scale(decoder.hidden_size));
    Ok(ModelSpec { head: HeadSpec::LinearOrTied(head), embedding_scale: scale, ..decoder.model(layers, true)? })
}

/// The window of each layer: every `sliding_window_pattern`-th layer has none.
fn windows(decoder: &Decoder) -> Result<Vec<Option<u32>>, ConfigError> {
    let config = decoder.config;
    let pattern = config.maybe_u32("sliding_window_pattern", 1, 4096)?.unwrap_or(6);
    let window = config.maybe_u32("sliding_window", 1, u32::MAX)?.unwrap_or(512);
    let period: Vec<_> = (1..=pattern).map(|i| if i == pattern { GLOBAL } else { LOCAL }).collect();
    let types = layer_types(decoder, &period)?;
    if types.iter().zip(period.iter().cycle()).any(|(stated, wanted)| stated != wanted) {
        let message = format!("layer_types says something else than sliding_window_pattern {pattern}");
        return Err(ConfigError::Contradiction { message });
    }
    Ok(types.into_iter().map(|layer_type| (layer_type == LOCAL).then_some(window)).collect())
}

/// Newer configs say both under `rope_parameters`, by the type of the layer.
fn rope(decoder: &Decoder, is_local: bool) -> Result<RopeSpec, ConfigError> {
    let (config, model_type, dims) = (decoder.config, decoder.source.model_type, decoder.head_dim);
    let (layer_type, key, default) = match is_local {
        true => (LOCAL, "rope_local_base_freq", 10_000.0),
        false => (GLOBAL, "rope_theta", 1_000_000.0),
    };
    let theta = config.maybe_f32(key, 1.0, 1e12)?.unwrap_or(default);
    if let Some(rope) = RopeSpec::for_layer_type(&config, model_type, dims, layer_type, Some(theta), false)? {
        return Ok(rope);
    }
    let scaling = config.object("rope_scaling", "rope_scaling.")?.filter(|_| !is_local);
    let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?.unwrap_or(32_768);
    RopeSpec::initialize(dims, theta, false, scaling.as_ref(), Some(max_position_embeddings), model_type)
}

/// The nearest number that bfloat16 holds; of two, the one with an even last bit.
fn to_bfloat16(value: f32) -> f32 {
    let bits = value.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::read_spec;
    use serde_json::{Value, json};

    fn with(changes: Value) -> Result<ModelSpec, ConfigError> {
        let mut config = json!({"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window_pattern": 3});
        changes.as_object().into_iter().flatten().for_each(|(key, value)| config[key] = value.clone());
        read_spec(&config)
    }

    #[test]
    fn the_factor_of_embeddings_is_a_bfloat16() {
        assert_eq!([1152, 2560, 5376].map(|size| to_bfloat16(embedding_scale(size))), [34.0, 50.5, 73.5]);
        assert_eq!(with(json!({})).expect("defaults").embedding_scale, 34.0);
    }

    #[test]
    fn windows_follow_the_pattern_and_layer_types_may_not_contradict() {
        let windows = |spec: ModelSpec| spec.layers.iter().map(|layer| layer.mixer.window()).collect::<Vec<_>>();
        let wanted = [Some(512), Some(512), None, Some(512)].to_vec();
        assert_eq!(windows(with(json!({})).expect("valid")), wanted);
        let stated = json!({"layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL]});
        assert_eq!(windows(with(stated).expect("the same")), wanted);
        let message = with(json!({"layer_types": [LOCAL, LOCAL, LOCAL, GLOBAL]})).expect_err("another").to_string();
        assert!(message.contains("layer_types"), "{message}");
    }

    #[test]
    fn fields_that_would_change_the_result_are_refused() {
        for changes in [
            json!({"final_logit_softcapping": 30.0}),
            json!({"use_bidirectional_attention": true}),
            json!({"hidden_activation": "silu"}),
            json!({"attention_bias": true}),
        ] {
            assert!(matches!(with(changes.clone()), Err(ConfigError::Unsupported { .. })), "{changes}");
        }
        let harmless = json!({"final_logit_softcapping": null, "use_bidirectional_attention": "vision", "attention_bias": false});
        assert!(with(harmless).is_ok());
    }
}

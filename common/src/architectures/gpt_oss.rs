//! gpt-oss: attention sinks, sliding windows on every second layer, biases everywhere, clipped SwiGLU (OpenAI 2025, arXiv 2508.10925).

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts_with_bias, window_of_type},
    mixtures::mixture,
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{Activation, ExpertMlpSpec, LinearSpec, Mixer, ModelSpec, RouterSpec, TensorSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "gpt_oss",
    group: Group::Experts,
    special: "attention sinks, sliding windows, clipped SwiGLU, mxfp4 as published",
    read,
}];

/// The activation's constants; mlx-lm reads none from the config.
const ALPHA: f32 = 1.702;
const LIMIT: f32 = 7.0;

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.refuse_flags(&["tie_word_embeddings"])?;
    if !config.bool_or("attention_bias", true)? {
        return Err(source.unsupported("attention without biases"));
    }
    if let Some(limit) = config.maybe_f32("swiglu_limit", 0.0, 1e6)?.filter(|limit| *limit != LIMIT) {
        return Err(source.unsupported(format!("a swiglu_limit of {limit}")));
    }
    let mut decoder = Decoder::read_with_eps(source, config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-5))?;
    decoder.head_dim = config.maybe_u32("head_dim", 1, 1 << 14)?.unwrap_or(64);
    let windows = windows(&decoder)?;
    let n_experts = config.maybe_u32("num_local_experts", 1, 1 << 16)?.unwrap_or(128);
    let top_k = config.maybe_u32("num_experts_per_tok", 1, n_experts)?.unwrap_or(4.min(n_experts));
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::all(true));
        attention.rope = Some(decoder.rope(Some(150_000.0))?);
        attention.window = windows[i as usize];
        attention.sinks = Some(TensorSpec::new(format!("{attention_path}.sinks"), &[decoder.n_heads]));
        let router = LinearSpec::new(format!("{path}.mlp.router"), decoder.hidden_size, n_experts, true);
        let experts = ExpertMlpSpec {
            activation: Activation::ClippedSwiGlu { alpha: ALPHA, limit: LIMIT },
            ..experts_with_bias(&format!("{path}.mlp.experts"), n_experts, decoder.hidden_size, intermediate_size, true)
        };
        let mixture = mixture(RouterSpec::softmax_of_picked(router, top_k), experts, None);
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), mixture))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

/// Without a list every second layer is one with a window, beginning with the first.
fn windows(decoder: &Decoder) -> Result<Vec<Option<u32>>, ConfigError> {
    let window = decoder.config.maybe_u32("sliding_window", 1, u32::MAX)?.unwrap_or(128);
    let Some(types) = decoder.config.texts("layer_types")? else {
        return Ok((0..decoder.n_layers).map(|i| (i % 2 == 0).then_some(window)).collect());
    };
    if types.len() != decoder.n_layers as usize {
        let message = format!("layer_types has {} entries for num_hidden_layers {}", types.len(), decoder.n_layers);
        return Err(ConfigError::Contradiction { message });
    }
    types.into_iter().map(|kind| window_of_type(kind, || Ok(window))).collect()
}

/// Gates and values of the experts are interleaved. In bf16 their matrices are `[expert, input, output]`, and names end without `weight`.
fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    for name in ["gate_up_proj", "down_proj"] {
        let transposed = format!(".mlp.experts.{name}");
        tensors.change(|found| found.ends_with(&transposed), |matrices| matrices.swap_last_axes())?;
        tensors.rename_suffix(&transposed, &format!("{transposed}.weight"))?;
        tensors.rename_suffix(&format!("{transposed}_bias"), &format!("{transposed}.bias"))?;
    }
    tensors.split_interleaved("mlp.experts.gate_up_proj", ["mlp.experts.gate_proj", "mlp.experts.up_proj"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::{read_spec, tiny};
    use serde_json::json;

    #[test]
    fn windows_alternate_unless_told_otherwise() {
        let mut config = tiny("gpt_oss");
        let windows = |config: &serde_json::Value| {
            read_spec(config).expect("valid").layers.iter().map(|layer| layer.mixer.window()).collect::<Vec<_>>()
        };
        assert_eq!(windows(&config), [Some(16), None, Some(16)]);
        config["layer_types"] = json!(["full_attention", "sliding_attention", "sliding_attention"]);
        config["sliding_window"] = json!(null);
        assert_eq!(windows(&config), [None, Some(128), Some(128)]);
    }

    #[test]
    fn other_formulas_are_refused() {
        for (key, value) in [("swiglu_limit", json!(5.0)), ("attention_bias", json!(false)), ("tie_word_embeddings", json!(true))] {
            let mut config = tiny("gpt_oss");
            config[key] = value;
            assert!(matches!(read_spec(&config), Err(ConfigError::Unsupported { .. })), "{key}");
        }
    }
}

//! Gemma 3n: several residual streams, inputs for each layer, keys and values that later layers share, MLPs of which few neurons are active.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
    gemma::{
        GLOBAL, LOCAL, check, drop_unused_projections, embedding_scale, gelu_mlp, layer_types, sandwich_layer, soft_cap, source_layers,
    },
    gemma4::{layer_input, layer_inputs},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{
        Activation, AlternatingUpdatesSpec, AttentionSpec, EmbeddingSpec, FeedForward, LayerSpec, LinearSpec, LogitsSpec, Mixer, MlpSpec,
        ModelSpec, NormSpec, Projections, Residual, RopeSpec, StreamsSpec, TensorSpec,
    },
};
use std::f64::consts::SQRT_2;

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "gemma3n", group: Group::Gemma, special: "several residual streams, inputs for each layer", read }];

/// Number of residual streams and which one the layers work on.
#[derive(Clone, Copy)]
struct Streams {
    n: u32,
    active: u32,
}

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let source = source.text("model.language_model.")?;
    check(&source)?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let n = config.u32("altup_num_inputs", 1, 64)?;
    let streams = Streams { n, active: config.u32("altup_active_idx", 0, n - 1)? };
    let types = layer_types(&decoder, &[LOCAL, LOCAL, LOCAL, LOCAL, GLOBAL])?;
    let n_shared = config.u32("num_kv_shared_layers", 0, decoder.n_layers)?;
    let sources = source_layers(&types, decoder.n_layers - n_shared)?;
    let (sizes, sparsities) = (intermediate_sizes(&decoder)?, sparsities(&decoder)?);
    let input_dims = config.u32("hidden_size_per_layer_input", 1, 1 << 20)?;
    let layers = decoder.layers_under("layers", |i, path| {
        let of_layer = i as usize;
        let mixer = attention(&decoder, &format!("{path}.self_attn"), types[of_layer], sources[of_layer])?;
        let mlp = mlp(&decoder, &format!("{path}.mlp"), sizes[of_layer], sparsities[of_layer]);
        Ok(LayerSpec {
            residual: Residual::AlternatingUpdates(Box::new(alternating_updates(&decoder, path, streams)?)),
            layer_input: Some(layer_input(&decoder, path, input_dims)),
            ..sandwich_layer(&decoder, path, Mixer::Attention(Box::new(mixer)), FeedForward::Mlp(mlp))
        })
    })?;
    let vocab_size = config.u32("vocab_size_per_layer_input", 1, 1 << 24)?;
    let square = |name: &str, i| LinearSpec::new(decoder.path(&format!("{name}.{i}")), decoder.hidden_size, decoder.hidden_size, false);
    let squares = |name: &str| (0..n - 1).map(|i| square(name, i)).collect();
    Ok(ModelSpec {
        embedding: EmbeddingSpec { path: decoder.path("embed_tokens"), vocab_size: decoder.vocab_size, dims: decoder.hidden_size },
        embedding_scale: embedding_scale(decoder.hidden_size),
        layer_inputs: Some(layer_inputs(&decoder, "", input_dims, vocab_size)),
        streams: Some(StreamsSpec { n, split: squares("altup_projections"), join: squares("altup_unembed_projections") }),
        final_norm: decoder.norm(decoder.path("norm"), decoder.hidden_size),
        logits: LogitsSpec { softcap: soft_cap(&config, "final_logit_softcapping", None)?, ..LogitsSpec::PLAIN },
        published: Published::new(published),
        ..decoder.model(layers, true)?
    })
}

fn attention(decoder: &Decoder, path: &str, layer_type: &str, source: Option<u32>) -> Result<AttentionSpec, ConfigError> {
    let mut attention = decoder.attention(path, AttentionBias::NONE);
    attention.projections = match (attention.projections, source) {
        (Projections::Separate { query, .. }, Some(source_layer)) => Projections::Shared { query, source_layer },
        (projections, _) => projections,
    };
    attention.scale = 1.0;
    attention.head_norms = decoder.head_norms(path);
    attention.value_norm = Some(NormSpec::rms_unweighted(decoder.head_dim, decoder.norm_eps));
    let window = decoder.config.u32("sliding_window", 1, u32::MAX)?;
    attention.window = (layer_type == LOCAL).then_some(window);
    attention.rope = Some(rope(decoder, layer_type)?);
    Ok(attention)
}

/// Newer configs say both bases under `rope_parameters`, by the type of the layer.
fn rope(decoder: &Decoder, layer_type: &str) -> Result<RopeSpec, ConfigError> {
    let (config, source, dims) = (decoder.config, decoder.source, decoder.head_dim);
    let key = if layer_type == LOCAL { "rope_local_base_freq" } else { "rope_theta" };
    let theta = config.maybe_f32(key, 1.0, 1e12)?;
    if let Some(rope) = RopeSpec::for_layer_type(&config, source.model_type, dims, layer_type, theta, false)? {
        return Ok(rope);
    }
    let kind = config.object("rope_scaling", "rope_scaling.")?.map(|scaling| scaling.text("rope_type")).transpose()?.flatten();
    match kind {
        None | Some("default") => RopeSpec::plain(dims, theta.ok_or(ConfigError::Missing { key: key.into() })?, false),
        Some(kind) => Err(source.unsupported(format!("RoPE scaling (`{kind}`)"))),
    }
}

fn mlp(decoder: &Decoder, path: &str, intermediate_size: u32, sparsity: f64) -> MlpSpec {
    let mlp = gelu_mlp(decoder, path, intermediate_size);
    match sparsity > 0.0 {
        true => MlpSpec { activation: Activation::SparseGeluTanh { std_multiplier: normal_quantile(sparsity) }, ..mlp },
        false => mlp,
    }
}

fn alternating_updates(decoder: &Decoder, path: &str, streams: Streams) -> Result<AlternatingUpdatesSpec, ConfigError> {
    let (config, hidden_size, n) = (decoder.config, decoder.hidden_size, streams.n);
    let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.{name}"), input, output, false);
    let norm = |name: &str| decoder.norm(format!("{path}.{name}"), hidden_size);
    let rank = config.u32("laurel_rank", 1, 1 << 20)?;
    let is_scaled = config.bool_or("altup_correct_scale", true)?;
    Ok(AlternatingUpdatesSpec {
        n_streams: n,
        active: streams.active,
        coefficient_clip: config.maybe_f32("altup_coef_clip", 0.0, 1e6)?,
        router_norm: norm("altup.router_norm"),
        modality_router: linear("altup.modality_router", hidden_size, n),
        prediction: linear("altup.prediction_coefs", n, n * n),
        correction: linear("altup.correction_coefs", n, n),
        correct_output_scale: is_scaled.then(|| TensorSpec::new(format!("{path}.altup.correct_output_scale"), &[hidden_size])),
        laurel_left: linear("laurel.linear_left", hidden_size, rank),
        laurel_right: linear("laurel.linear_right", rank, hidden_size),
        laurel_norm: norm("laurel.post_laurel_norm"),
    })
}

/// One size for all layers, or one for each.
fn intermediate_sizes(decoder: &Decoder) -> Result<Vec<u32>, ConfigError> {
    match decoder.config.get("intermediate_size").is_some_and(|value| value.is_array()) {
        true => for_each_layer(decoder, "intermediate_size", decoder.config.u32s("intermediate_size")?.unwrap_or_default()),
        false => Ok(vec![decoder.intermediate_size()?; decoder.n_layers as usize]),
    }
}

/// Which part of each layer's neurons stays at zero.
fn sparsities(decoder: &Decoder) -> Result<Vec<f64>, ConfigError> {
    match decoder.config.f64s("activation_sparsity_pattern", 0.0, 0.999_999)? {
        Some(pattern) => for_each_layer(decoder, "activation_sparsity_pattern", pattern),
        None => Ok(vec![0.0; decoder.n_layers as usize]),
    }
}

fn for_each_layer<T>(decoder: &Decoder, key: &str, values: Vec<T>) -> Result<Vec<T>, ConfigError> {
    match values.len() == decoder.n_layers as usize {
        true => Ok(values),
        false => Err(ConfigError::Contradiction {
            message: format!("{key} has {} entries for num_hidden_layers {}", values.len(), decoder.n_layers),
        }),
    }
}

/// What a normal variable stays below with this probability: `sqrt(2) · erf⁻¹(2p - 1)`, by the polynomials of Giles (2010, "Approximating
/// the erfinv function") for single precision.
fn normal_quantile(probability: f64) -> f32 {
    const CENTRE: [f64; 9] = [
        2.81022636e-08,
        3.43273939e-07,
        -3.5233877e-06,
        -4.39150654e-06,
        0.00021858087,
        -0.00125372503,
        -0.00417768164,
        0.246640727,
        1.50140941,
    ];
    const TAIL: [f64; 9] = [
        -0.000200214257,
        0.000100950558,
        0.00134934322,
        -0.00367342844,
        0.00573950773,
        -0.0076224613,
        0.00943887047,
        1.00167406,
        2.83297682,
    ];
    let x = 2.0 * probability - 1.0;
    let w = -(1.0 - x * x).ln();
    let (t, coefficients) = if w < 5.0 { (w - 2.5, CENTRE) } else { (w.sqrt() - 3.0, TAIL) };
    (SQRT_2 * x * coefficients.into_iter().fold(0.0, |sum, coefficient| sum * t + coefficient)) as f32
}

fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    ["vision_tower.", "audio_tower.", "embed_audio.", "embed_vision."]
        .into_iter()
        .for_each(|part| tensors.drop_prefix(&format!("model.{part}")));
    drop_unused_projections(spec, tensors);
    let is_scaled =
        |layer: &LayerSpec| matches!(&layer.residual, Residual::AlternatingUpdates(updates) if updates.correct_output_scale.is_some());
    if !spec.layers.iter().any(is_scaled) {
        tensors.drop_suffix(".altup.correct_output_scale");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_the_normal_distribution() {
        for (probability, wanted) in [(0.95, 1.644_853_6), (0.5, 0.0), (0.9, 1.281_551_6), (0.01, -2.326_347_9), (0.9999, 3.719_016_5)] {
            let found = normal_quantile(probability);
            assert!((found - wanted).abs() < 1e-6, "{probability}: {found}");
        }
    }
}

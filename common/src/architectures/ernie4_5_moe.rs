//! ERNIE 4.5 with routed experts: RoPE on neighbouring pairs, weights renormalised, shared experts.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts_with_bias},
    mixtures::{mixture, published as published_experts},
};
use crate::{
    config::{Config, ConfigError},
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec, Ranking, RopeSpec, RouterPrecision, RouterScores, RouterSpec},
};
use serde_json::Value;

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "ernie4_5_moe",
    group: Group::Experts,
    special: "softmax or sigmoid router, without the bias that corrects it; shared experts",
    read,
}];

/// Beside the sum that weights are divided by. mlx-lm takes the larger of the two: in f32 that is the same for sums above 1e-5.
const EPS: f32 = 1e-12;

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let has_biases = config.bool_or("use_bias", false)?;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, None, true)?;
    let interval = config.maybe_u32("moe_layer_interval", 1, 4096)?.unwrap_or(1);
    let first = bound(&config, "moe_layer_start_index", |indices| indices.min())?.unwrap_or(0);
    let last = bound(&config, "moe_layer_end_index", |indices| indices.max())?.unwrap_or(decoder.n_layers - 1);
    let layers = decoder.layers(|i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::all(has_biases));
        attention.rope = Some(rope.clone());
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match (i + 1) % interval == 0 && (first..=last).contains(&i) {
            true => routed(&decoder, &path_of_mlp, has_biases)?,
            false => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, has_biases)),
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

/// A number, or the outermost of several.
fn bound(config: &Config, key: &str, outermost: impl Fn(std::vec::IntoIter<u32>) -> Option<u32>) -> Result<Option<u32>, ConfigError> {
    match config.get(key).is_some_and(Value::is_array) {
        true => Ok(config.u32s(key)?.and_then(|indices| outermost(indices.into_iter()))),
        false => config.maybe_u32(key, 0, 4096),
    }
}

fn routed(decoder: &Decoder, path: &str, has_biases: bool) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let n_experts = config.u32("moe_num_experts", 1, 1 << 16)?;
    let top_k = config.maybe_u32("moe_k", 1, n_experts)?.unwrap_or(1);
    let intermediate_size = match config.maybe_u32("moe_intermediate_size", 0, 1 << 22)?.filter(|size| *size > 0) {
        Some(size) => size,
        None => decoder.intermediate_size()?,
    };
    let scores = match config.text("moe_gate_act")?.unwrap_or("softmax") {
        "softmax" => RouterScores::Softmax,
        "sigmoid" => RouterScores::Sigmoid,
        other => return Err(decoder.source.unsupported(format!("`moe_gate_act` of `{other}`"))),
    };
    let gate = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let router = RouterSpec {
        ranking: Ranking::BestFirst,
        scores,
        precision: RouterPrecision::SCORES,
        renormalise: Some(EPS),
        ..RouterSpec::softmax(gate, top_k, true)
    };
    let n_shared = config.maybe_u32("moe_num_shared_experts", 0, 1 << 10)?.filter(|n| *n > 0);
    let shared = n_shared.map(|n| decoder.mlp(&format!("{path}.shared_experts"), n * intermediate_size, has_biases));
    let path_of_experts = format!("{path}.switch_mlp");
    Ok(mixture(router, experts_with_bias(&path_of_experts, n_experts, decoder.hidden_size, intermediate_size, has_biases), shared))
}

/// The bias that corrects the picking of experts is dropped, as mlx-lm drops it, and so is what predicts further tokens.
fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    for part in ["mtp_block.", "mtp_linear_proj.", "mtp_hidden_norm.", "mtp_emb_norm.", "e_score_correction_bias"] {
        tensors.drop_containing(part);
    }
    published_experts(spec, tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::{read_spec, tiny};
    use serde_json::json;

    #[test]
    fn layers_with_experts_are_an_interval() {
        let routed = |changes: Value| -> Vec<bool> {
            let mut config = tiny("ernie4_5_moe");
            config["num_hidden_layers"] = json!(6);
            config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
            read_spec(&config).expect("valid").layers.iter().map(|layer| layer.feed_forward.experts().is_some()).collect()
        };
        assert_eq!(routed(json!({})), [true; 6]);
        assert_eq!(routed(json!({"moe_layer_start_index": 1, "moe_layer_end_index": 3})), [false, true, true, true, false, false]);
        let lists = json!({"moe_layer_start_index": [2, 1], "moe_layer_end_index": [3, 4], "moe_layer_interval": 2});
        assert_eq!(routed(lists), [false, true, false, true, false, false]);
    }
}

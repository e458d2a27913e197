//! MiniMax M2: a norm over all heads of queries together and one over those of keys, RoPE on a part of each head, corrected sigmoids.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::{NUMBERED_PROJECTIONS, mixture},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, HeadNorms, LinearSpec, Mixer, ModelSpec, RopeSpec, RouterPrecision, RouterSpec, TensorSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "minimax", group: Group::Experts, special: "as minimax_m2; no lightning attention", read },
    Architecture {
        model_type: "minimax_m2",
        group: Group::Experts,
        special: "norms over all heads together, corrected sigmoid router, fp8 as published",
        read,
    },
];

/// Beside the sum that weights are divided by.
const EPS: f32 = 1e-20;

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    source.only("scoring_func", &["sigmoid"])?;
    source.only("qk_norm_type", &["per_layer"])?;
    source.only("hidden_act", &["silu"])?;
    if config.u32s("attn_type_list")?.is_some_and(|types| types.iter().any(|kind| *kind != 1)) {
        return Err(source.unsupported("lightning attention"));
    }
    if config.texts("layer_types")?.is_some_and(|types| types.iter().any(|kind| *kind != "full_attention")) {
        return Err(source.unsupported("layers of other types than full_attention"));
    }
    let has_norms = config.bool_or("use_qk_norm", true)?;
    let rope_dims = config.u32("rotary_dim", 2, decoder.head_dim)?;
    let rope = RopeSpec::unscaled(&config, source.model_type, rope_dims, None, false)?;
    let layers = decoder.layers(|_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        if has_norms {
            let norm = |name: &str, heads| decoder.norm(format!("{attention_path}.{name}"), heads * decoder.head_dim);
            attention.head_norms = HeadNorms::Whole { query: norm("q_norm", decoder.n_heads), key: norm("k_norm", decoder.n_kv_heads) };
        }
        attention.rope = Some(rope.clone());
        let routed = routed(&decoder, &format!("{path}.block_sparse_moe"))?;
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), routed))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn routed(decoder: &Decoder, path: &str) -> Result<FeedForward, ConfigError> {
    let n_experts = decoder.config.u32("num_local_experts", 1, 1 << 16)?;
    let top_k = decoder.config.u32("num_experts_per_tok", 1, n_experts)?;
    let gate = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let bias = TensorSpec::new(format!("{path}.e_score_correction_bias"), &[n_experts]);
    let router = RouterSpec {
        precision: RouterPrecision { logits: true, scores: true, weights: false },
        renormalise: Some(EPS),
        ..RouterSpec::sigmoid(gate, top_k, Some(bias))
    };
    let experts = experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, decoder.intermediate_size()?);
    Ok(mixture(router, experts, None))
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.stack_experts("block_sparse_moe.experts", "block_sparse_moe.switch_mlp", &NUMBERED_PROJECTIONS)
}

#[cfg(test)]
mod tests {
    use crate::architectures::{read_spec, tiny};
    use serde_json::json;

    #[test]
    fn lightning_attention_is_refused() {
        let mut config = tiny("minimax");
        config["attn_type_list"] = json!([1, 1, 1]);
        read_spec(&config).expect("softmax attention");
        config["attn_type_list"] = json!([0, 1, 1]);
        assert!(read_spec(&config).expect_err("refused").to_string().contains("lightning"));
    }
}

//! Ling and Ring (Bailing): fused projections, experts picked by softmax or corrected sigmoids, shared experts, the first layers dense.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts_with_bias},
    mixtures::{groups, mixture, published_with_prediction},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{
        AttentionSpec, FeedForward, HeadNorms, LinearSpec, Mixer, ModelSpec, Projections, Ranking, RopeSpec, RouterPrecision, RouterScores,
        RouterSpec, TensorSpec, rotary_dims,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "bailing_moe",
    group: Group::Experts,
    special: "softmax or corrected sigmoid router with groups, normalised head",
    read,
}];

/// Beside the sum that weights are divided by.
const EPS: f32 = 1e-20;
/// Beside the length of a column of the head.
const HEAD_EPS: f32 = 1e-7;

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.refuse_flags(&["norm_softmax", "use_sliding_window"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let has_biases = config.bool_or("use_bias", false)?;
    let rope = rope(&decoder)?;
    let n_dense = config.u32("first_k_dense_replace", 0, 4096)?;
    let layers = decoder.layers(|i, path| {
        let attention = AttentionSpec { rope: Some(rope.clone()), ..attention(&decoder, &format!("{path}.attention"), has_biases)? };
        let path_of_mlp = format!("{path}.mlp");
        let feed_forward = match i < n_dense {
            true => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, has_biases)),
            false => routed(&decoder, &path_of_mlp, has_biases)?,
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    let mut spec = decoder.model(layers, false)?;
    spec.embedding.path = decoder.path("model.word_embeddings");
    let has_normalised_head = config.bool_or("norm_head", false)?;
    if has_normalised_head && config.bool_or("tie_word_embeddings", false)? {
        return Err(source.unsupported("`norm_head` of a tied head"));
    }
    let rules = if has_normalised_head { published_with_normalised_head } else { published };
    Ok(ModelSpec { published: Published::new(rules), ..spec })
}

fn rope(decoder: &Decoder) -> Result<RopeSpec, ConfigError> {
    let config = decoder.config;
    let dims = match config.maybe_u32("rotary_dim", 2, decoder.head_dim)? {
        Some(dims) => dims,
        None => rotary_dims(decoder.head_dim, config.maybe_f64("partial_rotary_factor", 0.0, 1.0)?.unwrap_or(1.0))?,
    };
    RopeSpec::read(&config, decoder.source.model_type, dims, None, false)
}

fn attention(decoder: &Decoder, path: &str, has_biases: bool) -> Result<AttentionSpec, ConfigError> {
    let config = decoder.config;
    let (query_dims, all_heads) = (decoder.n_heads * decoder.head_dim, decoder.n_heads + 2 * decoder.n_kv_heads);
    let linear = |name: &str, input, output, bias| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
    let qkv_bias = config.bool_or("use_qkv_bias", false)?;
    let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.head_dim);
    Ok(AttentionSpec {
        projections: Projections::Fused(linear("query_key_value", decoder.hidden_size, all_heads * decoder.head_dim, qkv_bias)),
        output: linear("dense", query_dims, decoder.hidden_size, has_biases),
        head_norms: match config.bool_or("use_qk_norm", false)? {
            true => HeadNorms::PerHead { query: norm("query_layernorm"), key: norm("key_layernorm") },
            false => HeadNorms::None,
        },
        ..decoder.attention(path, AttentionBias::NONE)
    })
}

fn routed(decoder: &Decoder, path: &str, has_biases: bool) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let n_experts = config.u32("num_experts", 1, 1 << 16)?;
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    let shared_size = config.maybe_u32("moe_shared_expert_intermediate_size", 0, 1 << 22)?.filter(|size| *size > 0);
    let n_shared = match config.bool_or("moe_router_enable_shared_expert", true)? {
        true => config.u32("num_shared_experts", 0, 1 << 10)?,
        false => 0,
    };
    let shared_size = n_shared * shared_size.unwrap_or(intermediate_size);
    let shared = (n_shared > 0).then(|| decoder.mlp(&format!("{path}.shared_experts"), shared_size, has_biases));
    let path_of_experts = format!("{path}.switch_mlp");
    let experts = experts_with_bias(&path_of_experts, n_experts, decoder.hidden_size, intermediate_size, has_biases);
    Ok(mixture(router(decoder, path, n_experts)?, experts, shared))
}

fn router(decoder: &Decoder, path: &str, n_experts: u32) -> Result<RouterSpec, ConfigError> {
    let config = decoder.config;
    let scores = match config.text("score_function")?.unwrap_or("softmax") {
        "softmax" => RouterScores::Softmax,
        "sigmoid" => RouterScores::Sigmoid,
        other => return Err(decoder.source.unsupported(format!("`score_function` of `{other}`"))),
    };
    let scale = config.maybe_f32("routed_scaling_factor", -1e6, 1e6)?.unwrap_or(1.0);
    if scale != 1.0 && !config.bool_or("moe_router_enable_routed_scaling", true)? {
        return Err(decoder.source.unsupported("a routed_scaling_factor that is not enabled"));
    }
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let is_normalised = top_k > 1 && config.bool_or("norm_topk_prob", false)?;
    let has_bias = config.bool_or("moe_router_enable_expert_bias", false)?;
    let linear = LinearSpec::new(format!("{path}.gate.gate_proj"), decoder.hidden_size, n_experts, false);
    Ok(RouterSpec {
        ranking: Ranking::BestLast,
        scores,
        precision: RouterPrecision { logits: false, scores: true, weights: false },
        correction_bias: has_bias.then(|| TensorSpec::new(format!("{path}.gate.expert_bias"), &[n_experts])),
        groups: groups(&config, n_experts)?,
        renormalise: is_normalised.then_some(EPS),
        scale,
        ..RouterSpec::softmax(linear, top_k, false)
    })
}

fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.rename_suffix(".mlp.gate.weight", ".mlp.gate.gate_proj.weight")?;
    published_with_prediction(spec, tensors)
}

/// The head's columns are normalised at every load: doing it again changes next to nothing. A quantised head was normalised before.
fn published_with_normalised_head(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    published(spec, tensors)?;
    if tensors.model_has(|name| name == "lm_head.scales") {
        return Ok(());
    }
    tensors.change(|name| name == "lm_head.weight", |head| head.normalise_columns(HEAD_EPS))
}

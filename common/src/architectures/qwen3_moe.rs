//! Qwen 3 with routed experts: softmax over all experts, the best ones, renormalised when the config says so; some layers stay dense.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::{mixture, published},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "qwen3_moe", group: Group::Experts, special: "a norm over each head of queries and keys", read },
    Architecture { model_type: "qwen3_vl_moe", group: Group::Experts, special: "text of Qwen3-VL: as qwen3_moe", read: read_of_vision },
];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["use_sliding_window", "attention_bias"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let n_experts = config.u32("num_experts", 0, 1 << 16)?;
    let dense_layers = config.u32s("mlp_only_layers")?.unwrap_or_default();
    let sparse_step = config.maybe_u32("decoder_sparse_step", 1, 4096)?.unwrap_or(1);
    let layers = decoder.layers(|i, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, AttentionBias::NONE);
        attention.head_norms = decoder.head_norms(&attention_path);
        attention.rope = Some(decoder.rope(None)?);
        let path_of_mlp = format!("{path}.mlp");
        let is_routed = !dense_layers.contains(&i) && n_experts > 0 && (i + 1) % sparse_step == 0;
        let feed_forward = match is_routed {
            true => routed(&decoder, &path_of_mlp, n_experts)?,
            false => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false)),
        };
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

/// Also Mellum's.
pub(super) fn routed(decoder: &Decoder, path: &str, n_experts: u32) -> Result<FeedForward, ConfigError> {
    let config = decoder.config;
    let gate = LinearSpec::new(format!("{path}.gate"), decoder.hidden_size, n_experts, false);
    let intermediate_size = config.u32("moe_intermediate_size", 1, 1 << 22)?;
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let router = RouterSpec::softmax(gate, top_k, config.bool_or("norm_topk_prob", false)?);
    let experts = experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size);
    Ok(mixture(router, experts, None))
}

fn read_of_vision(source: Source) -> Result<ModelSpec, ConfigError> {
    let spec = read(source.text("language_model.")?)?;
    Ok(ModelSpec { published: Published::new(published_with_vision), ..spec })
}

/// Experts are stacked as `[expert, input, output]`, gate and `up` side by side, and names end without `weight`.
fn published_with_vision(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_prefix("visual.");
    tensors.drop_prefix("model.visual.");
    tensors.rename_prefix("model.language_model.", "language_model.model.")?;
    tensors.rename_prefix("lm_head.", "language_model.lm_head.")?;
    for (from, to) in [("experts.gate_up_proj", "switch_mlp.gate_up_proj"), ("experts.down_proj", "switch_mlp.down_proj")] {
        let from = format!(".mlp.{from}");
        tensors.change(|name| name.ends_with(&from), |matrices| matrices.swap_last_axes())?;
        tensors.rename_suffix(&from, &format!(".mlp.{to}.weight"))?;
    }
    tensors.split_halves("switch_mlp.gate_up_proj", ["switch_mlp.gate_proj", "switch_mlp.up_proj"])
}

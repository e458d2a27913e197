//! Granite with routed experts: Granite's multipliers, softmax over the picked experts.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::mixture,
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{LayerSpec, LinearSpec, LogitsSpec, Mixer, ModelSpec, Residual, RouterPrecision, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "granitemoe",
    group: Group::Experts,
    special: "multipliers on embedding, attention, residual and logits",
    read,
}];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let factor = |key: &str| config.f32(key, 1e-6, 1e6);
    let (attention_multiplier, multiplier) = (factor("attention_multiplier")?, factor("residual_multiplier")?);
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let n_experts = config.u32("num_local_experts", 1, 1 << 16)?;
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), bias);
        attention.scale = attention_multiplier;
        attention.rope = Some(decoder.rope(None)?);
        let path_of_moe = format!("{path}.block_sparse_moe");
        let linear = LinearSpec::new(format!("{path_of_moe}.router.layer"), decoder.hidden_size, n_experts, false);
        let router = RouterSpec { precision: RouterPrecision::SCORES, ..RouterSpec::softmax_of_picked(linear, top_k) };
        let experts = experts(&format!("{path_of_moe}.switch_mlp"), n_experts, decoder.hidden_size, intermediate_size);
        let layer = decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), mixture(router, experts, None));
        Ok(LayerSpec { residual: Residual::Serial { multiplier }, ..layer })
    })?;
    Ok(ModelSpec {
        embedding_scale: factor("embedding_multiplier")?,
        logits: LogitsSpec { divisor: factor("logits_scaling")?, ..LogitsSpec::PLAIN },
        published: Published::new(published),
        ..decoder.model(layers, true)?
    })
}

/// Experts are stacked, gate and `up` one after the other.
fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.replace_in_names(".block_sparse_moe.output_linear.", ".block_sparse_moe.switch_mlp.down_proj.")?;
    let moe = |name: &str| format!("block_sparse_moe.{name}");
    tensors.split_halves(&moe("input_linear"), [&moe("switch_mlp.gate_proj"), &moe("switch_mlp.up_proj")])
}

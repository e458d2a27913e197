//! Hunyuan, dense: Llama with norms of queries and keys after RoPE, whose base `alpha` scales.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{HeadNorms, ModelSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "hunyuan_v1_dense",
    group: Group::Base,
    special: "queries and keys normed after RoPE, NTK by alpha",
    read,
}];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let is_normed = config.bool_or("use_qk_norm", true)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = rope(&decoder)?;
    decoder.dense(false, |_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, bias);
        if is_normed {
            let norm = |name: &str| decoder.norm(format!("{attention_path}.{name}"), decoder.head_dim);
            attention.head_norms = HeadNorms::PerHeadAfterRope { query: norm("query_layernorm"), key: norm("key_layernorm") };
        }
        attention.rope = Some(rope.clone());
        Ok((attention, decoder.mlp(&format!("{path}.mlp"), intermediate_size, false)))
    })
}

fn rope(decoder: &Decoder) -> Result<RopeSpec, ConfigError> {
    let (theta, scaling) = decoder.rope_table(10_000.0)?;
    let kind = match &scaling {
        Some(scaling) => scaling.text("type")?.or(scaling.text("rope_type")?).unwrap_or("default"),
        None => "default",
    };
    match kind {
        "dynamic" => RopeSpec::ntk_alpha(decoder.head_dim, theta, false, scaling.as_ref()),
        "default" => RopeSpec::plain(decoder.head_dim, theta, false),
        other => Err(decoder.source.unsupported(format!("RoPE scaling of type `{other}`"))),
    }
}

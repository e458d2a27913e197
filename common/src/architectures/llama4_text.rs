//! Dense Llama 4 (MobileLLM-R1): interleaved RoPE on the layers that the config lists, weightless norms of queries and keys.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, head_under, roped_layers},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{HeadNorms, HeadSpec, ModelSpec, NormSpec, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "llama4_text",
    group: Group::Base,
    special: "weightless norms of queries and keys, some layers without RoPE",
    read,
}];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    source.refuse_flags(&["attention_bias"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let roped = roped_layers(&config)?.ok_or_else(|| ConfigError::Missing { key: "no_rope_layers".into() })?;
    // The temperature is for layers without RoPE.
    if config.get("attn_temperature_tuning").is_some_and(|value| value.as_bool() != Some(false)) && roped.contains(&false) {
        return Err(source.unsupported("`attn_temperature_tuning`"));
    }
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, None, true)?;
    let is_normed = config.bool_or("use_qk_norm", true)?;
    let intermediate_size = config.u32("intermediate_size_mlp", 1, 1 << 22)?;
    let spec = decoder.dense(false, |i, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        if is_normed {
            let norm = || NormSpec::rms_unweighted(decoder.head_dim, decoder.norm_eps);
            attention.head_norms = HeadNorms::PerHead { query: norm(), key: norm() };
        }
        attention.rope = roped[i as usize].then(|| rope.clone());
        Ok((attention, decoder.mlp(&format!("{path}.feed_forward"), intermediate_size, false)))
    })?;
    let head = head_under(decoder.path("output"), spec.head);
    Ok(ModelSpec { head, published: Published::new(published), ..spec })
}

/// transformers' name of the head, which mlx-lm does not know. A tied head is left out whatever it is called.
fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    if spec.head == HeadSpec::Tied { Ok(()) } else { tensors.rename_prefix("lm_head.", "output.") }
}

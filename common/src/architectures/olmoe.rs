//! OLMoE: norms over all heads of queries and of keys together, experts picked by softmax (Muennighoff et al. 2024, arXiv 2409.02060).

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts_with_bias},
    mixtures::{mixture, published},
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{HeadNorms, LinearSpec, Mixer, ModelSpec, Ranking, RouterSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "olmoe", group: Group::Experts, special: "norms over all heads together", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    if config.get("clip_qkv").is_some() {
        return Err(source.unsupported("`clip_qkv`"));
    }
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let is_renormalised = config.bool_or("norm_topk_prob", false)?;
    let n_experts = config.u32("num_experts", 1, 1 << 16)?;
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let intermediate_size = decoder.intermediate_size()?;
    let layers = decoder.layers(|_, path| {
        let attention_path = format!("{path}.self_attn");
        let mut attention = decoder.attention(&attention_path, bias);
        let norm = |name: &str, heads| decoder.norm(format!("{attention_path}.{name}"), heads * decoder.head_dim);
        attention.head_norms = HeadNorms::Whole { query: norm("q_norm", decoder.n_heads), key: norm("k_norm", decoder.n_kv_heads) };
        attention.rope = Some(decoder.rope(Some(10_000.0))?);
        let gate = LinearSpec::new(format!("{path}.mlp.gate"), decoder.hidden_size, n_experts, false);
        let router = RouterSpec { ranking: Ranking::BestFirst, ..RouterSpec::softmax(gate, top_k, is_renormalised) };
        let path_of_experts = format!("{path}.mlp.switch_mlp");
        let experts = experts_with_bias(&path_of_experts, n_experts, decoder.hidden_size, intermediate_size, mlp_bias);
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), mixture(router, experts, None)))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, true)? })
}

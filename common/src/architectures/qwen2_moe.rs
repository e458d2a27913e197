//! Qwen 1.5 and 2 with routed experts and a shared one, which a gate weighs.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
    mixtures::published,
};
use crate::{
    config::ConfigError,
    published::Published,
    spec::{FeedForward, LinearSpec, Mixer, ModelSpec, MoeSpec, Ranking, RopeSpec, RouterSpec, SharedExpertSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "qwen2_moe", group: Group::Experts, special: "a shared expert with a gate", read }];

pub(super) fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.refuse_flags(&["tie_word_embeddings", "norm_topk_prob", "use_sliding_window"])?;
    source.only("hidden_act", &["silu"])?;
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    if config.u32s("mlp_only_layers")?.is_some_and(|layers| !layers.is_empty())
        || config.maybe_u32("decoder_sparse_step", 1, 4096)? > Some(1)
    {
        return Err(source.unsupported("layers without experts"));
    }
    let interleaved = config.bool_or("rope_traditional", false)?;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, Some(1_000_000.0), interleaved)?;
    let layers = decoder.layers(|_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias { qkv: true, output: false });
        attention.rope = Some(rope.clone());
        let moe = moe(&decoder, &format!("{path}.mlp"))?;
        Ok(decoder.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Experts(Box::new(moe))))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

fn moe(decoder: &Decoder, path: &str) -> Result<MoeSpec, ConfigError> {
    let config = decoder.config;
    let n_experts = config.u32("num_experts", 1, 1 << 16)?;
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    let width = |key: &str| config.u32(key, 1, 1 << 22);
    let linear = |name: &str, outputs| LinearSpec::new(format!("{path}.{name}"), decoder.hidden_size, outputs, false);
    Ok(MoeSpec {
        router: RouterSpec { ranking: Ranking::BestFirst, ..RouterSpec::softmax(linear("gate", n_experts), top_k, false) },
        experts: experts(&format!("{path}.switch_mlp"), n_experts, decoder.hidden_size, width("moe_intermediate_size")?),
        shared: Some(SharedExpertSpec {
            mlp: decoder.mlp(&format!("{path}.shared_expert"), width("shared_expert_intermediate_size")?, false),
            gate: Some(linear("shared_expert_gate", 1)),
        }),
        latent: None,
    })
}

//! InternLM 2 under its own names, with queries, keys and values fused by group; InternLM 3 under Llama's.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, head_under},
};
use crate::{
    config::ConfigError,
    spec::{
        Activation, AttentionSpec, EmbeddingSpec, FeedForward, LayerSpec, LinearSpec, Mixer, MlpInputs, MlpSpec, ModelSpec, Projections,
        RopeKind, RopeSpec,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "internlm2", group: Group::Base, special: "queries, keys and values fused by group, dynamic RoPE", read },
    Architecture { model_type: "internlm3", group: Group::Base, special: "as llama, dynamic RoPE", read: read_third },
];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let bias = decoder.config.bool_or("bias", true)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = rope(&decoder)?;
    let layers = decoder.layers(|_, path| {
        let attention = attention(&decoder, &format!("{path}.attention"), bias, &rope);
        let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.feed_forward.{name}"), input, output, false);
        let mlp = MlpSpec {
            inputs: MlpInputs::Gated {
                gate: linear("w1", decoder.hidden_size, intermediate_size),
                up: linear("w3", decoder.hidden_size, intermediate_size),
            },
            activation: Activation::Silu,
            down: linear("w2", intermediate_size, decoder.hidden_size),
        };
        let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.hidden_size);
        let mixer = Mixer::Attention(Box::new(attention));
        Ok(LayerSpec::pre_norm(norm("attention_norm"), mixer, norm("ffn_norm"), FeedForward::Mlp(mlp)))
    })?;
    let spec = decoder.model(layers, false)?;
    let embedding = EmbeddingSpec { path: decoder.path("model.tok_embeddings"), ..spec.embedding };
    Ok(ModelSpec { embedding, head: head_under(decoder.path("output"), spec.head), ..spec })
}

fn attention(decoder: &Decoder, path: &str, bias: bool, rope: &RopeSpec) -> AttentionSpec {
    let attention = decoder.attention(path, AttentionBias::all(bias));
    let fused_dims = (decoder.n_heads + 2 * decoder.n_kv_heads) * decoder.head_dim;
    AttentionSpec {
        projections: Projections::FusedByGroup(LinearSpec::new(format!("{path}.wqkv"), decoder.hidden_size, fused_dims, bias)),
        output: LinearSpec { path: format!("{path}.wo"), ..attention.output },
        rope: Some(rope.clone()),
        ..attention
    }
}

fn read_third(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let flag = |key: &str| decoder.config.bool_or(key, false);
    // mlx-lm gives the output the bias of the queries; published checkpoints, which never have either, follow this.
    let bias = AttentionBias { qkv: flag("qkv_bias")?, output: flag("bias")? };
    decoder.uniform(bias, flag("bias")?, &rope(&decoder)?, false)
}

fn rope(decoder: &Decoder) -> Result<RopeSpec, ConfigError> {
    let rope = decoder.rope(Some(10_000.0))?;
    match rope.kind {
        RopeKind::Default | RopeKind::Linear { .. } | RopeKind::DynamicNtk { .. } => Ok(rope),
        _ => Err(decoder.source.unsupported("RoPE scaling other than linear and dynamic")),
    }
}

//! EXAONE 3: Llama under other names.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{Activation, AttentionSpec, EmbeddingSpec, FeedForward, LayerSpec, LinearSpec, Mixer, MlpInputs, MlpSpec, ModelSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "exaone", group: Group::Base, special: "as llama, other names", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only("activation_function", &["silu"])?;
    let decoder = Decoder::read_named(source, "num_layers", source.config.f32("layer_norm_epsilon", 0.0, 1.0)?)?;
    let config = decoder.config;
    let bias = AttentionBias::all(config.bool_or("attention_bias", false)?);
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = decoder.rope(None)?;
    let layers = decoder.layers_under("transformer.h", |_, path| {
        let attention_path = format!("{path}.attn.attention");
        let attention = decoder.attention(&attention_path, bias);
        let output = LinearSpec { path: format!("{attention_path}.out_proj"), ..attention.output };
        let attention = AttentionSpec { output, rope: Some(rope.clone()), ..attention };
        let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.mlp.{name}"), input, output, mlp_bias);
        let mlp = MlpSpec {
            inputs: MlpInputs::Gated {
                gate: linear("c_fc_0", decoder.hidden_size, intermediate_size),
                up: linear("c_fc_1", decoder.hidden_size, intermediate_size),
            },
            activation: Activation::Silu,
            down: linear("c_proj", intermediate_size, decoder.hidden_size),
        };
        let norm = |name: &str| decoder.norm(format!("{path}.{name}"), decoder.hidden_size);
        Ok(LayerSpec::pre_norm(norm("ln_1"), Mixer::Attention(Box::new(attention)), norm("ln_2"), FeedForward::Mlp(mlp)))
    })?;
    let spec = decoder.model(layers, true)?;
    Ok(ModelSpec {
        embedding: EmbeddingSpec { path: decoder.path("transformer.wte"), ..spec.embedding },
        final_norm: decoder.norm(decoder.path("transformer.ln_f"), decoder.hidden_size),
        ..spec
    })
}

//! StarCoder 2: layer norms, biases everywhere, and an MLP without a gate.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source},
};
use crate::{
    config::ConfigError,
    spec::{Activation, LinearSpec, MlpInputs, MlpSpec, ModelSpec, NormKind, RopeSpec},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "starcoder2", group: Group::Other, special: "layer norms, biases, an MLP with GELU and no gate", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let config = source.config;
    source.only("hidden_act", &["gelu", "gelu_pytorch_tanh", "gelu_new"])?;
    let norm_eps = config.maybe_f32("norm_epsilon", 0.0, 1.0)?.unwrap_or(1e-5);
    let decoder = Decoder { norm_kind: NormKind::Layer { bias: true }, ..Decoder::read_with_eps(source, norm_eps)? };
    let bias = config.bool_or("use_bias", true)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = RopeSpec::unscaled(&config, source.model_type, decoder.head_dim, Some(100_000.0), false)?;
    decoder.dense(true, |_, path| {
        let mut attention = decoder.attention(&format!("{path}.self_attn"), AttentionBias::all(bias));
        attention.rope = Some(rope.clone());
        let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.mlp.{name}"), input, output, bias);
        let mlp = MlpSpec {
            inputs: MlpInputs::Plain(linear("c_fc", decoder.hidden_size, intermediate_size)),
            // As mlx-lm has it; the tanh approximation that configs name is within 0.0005 of it.
            activation: Activation::Gelu,
            down: linear("c_proj", intermediate_size, decoder.hidden_size),
        };
        Ok((attention, mlp))
    })
}

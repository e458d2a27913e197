//! Phi 3 and 4: Llama with fused projections, RoPE over a part of the head, and LongRoPE.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, partial_rotary_factor},
};
use crate::{
    config::{Config, ConfigError},
    spec::{ModelSpec, RopeSpec, rotary_dims},
};

pub(super) const ARCHITECTURES: &[Architecture] =
    &[Architecture { model_type: "phi3", group: Group::Base, special: "fused projections, LongRoPE over a part of the head", read }];

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    source.only_silu()?;
    let decoder = Decoder::read(source)?;
    let intermediate_size = decoder.intermediate_size()?;
    let rope = rope(&decoder)?;
    decoder.dense(false, |_, path| {
        let mut attention = decoder.fused_attention(&format!("{path}.self_attn"), AttentionBias::NONE);
        attention.rope = Some(rope.clone());
        Ok((attention, decoder.fused_mlp(&format!("{path}.mlp"), intermediate_size, false)))
    })
}

fn rope(decoder: &Decoder) -> Result<RopeSpec, ConfigError> {
    let (config, model_type) = (decoder.config, decoder.source.model_type);
    let (theta, scaling) = decoder.rope_table(10_000.0)?;
    let interleaved = config.bool_or("rope_traditional", false)?;
    let dims = rotary_dims(decoder.head_dim, partial_rotary_factor(&config)?.unwrap_or(1.0))?;
    let Some(scaling) = scaling else { return RopeSpec::plain(dims, theta, interleaved) };
    match scaling.text("type")?.or(scaling.text("rope_type")?).unwrap_or("default") {
        "longrope" | "su" => {
            // The original length stands beside the scaling, not in it; transformers 5 has it inside.
            let original = |config: &Config| config.maybe_u32("original_max_position_embeddings", 1, u32::MAX);
            let original_context = original(&config)?.or(original(&scaling)?).unwrap_or(4096);
            let max_position_embeddings = config.maybe_u32("max_position_embeddings", 1, u32::MAX)?.unwrap_or(131_072);
            RopeSpec::long_rope(dims, theta, &scaling, max_position_embeddings, original_context, model_type)
        }
        "linear" | "default" => RopeSpec::initialize(dims, theta, interleaved, Some(&scaling), None, model_type),
        other => Err(decoder.source.unsupported(format!("RoPE scaling of type `{other}`"))),
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        architectures::{read_spec, tiny},
        config::ConfigError,
        spec::{Mixer, RopeKind, RopeSpec},
    };
    use serde_json::{Value, json};

    fn rope(entries: &[(&str, Value)]) -> Result<RopeSpec, ConfigError> {
        let mut config = tiny("phi3");
        config["rope_parameters"] = Value::Null;
        entries.iter().for_each(|(key, value)| config[*key] = value.clone());
        let spec = read_spec(&config)?;
        let Mixer::Attention(attention) = &spec.layers[0].mixer else { panic!("attention") };
        Ok(attention.rope.clone().expect("RoPE"))
    }

    #[test]
    fn the_original_length_stands_beside_the_scaling_or_in_it() {
        let scaling = json!({"type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 2.0, 4.0, 8.0]});
        let beside = rope(&[("rope_scaling", scaling.clone()), ("original_max_position_embeddings", json!(64))]).expect("valid");
        let RopeKind::LongRope { original_context: 64, max_position_embeddings: 4096, factors } = &beside.kind else {
            panic!("{beside:?}")
        };
        assert_eq!((beside.dims, factors.len()), (8, 4));

        let mut parameters = scaling;
        parameters["rope_theta"] = json!(10000.0);
        parameters["original_max_position_embeddings"] = json!(64);
        assert_eq!(rope(&[("rope_parameters", parameters)]), Ok(beside));
    }

    #[test]
    fn scaling_that_would_be_lost_is_refused() {
        assert_eq!(rope(&[]).expect("valid").kind, RopeKind::Default);
        let yarn = json!({"type": "yarn", "factor": 4.0});
        assert!(rope(&[("rope_scaling", yarn)]).expect_err("refused").to_string().contains("`yarn`"));
    }
}

//! From `config.json` to a [`ModelSpec`]: one file an architecture, each a pure function.

mod blocks;
mod llama;
mod mistral;
mod mixtral;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use crate::{
    config::{Config, ConfigError},
    spec::ModelSpec,
};
use serde_json::Value;

type Reader = fn(&Config) -> Result<ModelSpec, ConfigError>;

/// Every supported `model_type` with its reader.
const ARCHITECTURES: [(&str, Reader); 6] = [
    ("llama", llama::spec),
    ("mistral", mistral::spec),
    ("mixtral", mixtral::spec),
    ("qwen2", qwen2::spec),
    ("qwen3", qwen3::spec),
    ("qwen3_moe", qwen3_moe::spec),
];

/// Reads the `model_type` of a config and hands it to its architecture.
pub fn read_spec(config: &Value) -> Result<ModelSpec, ConfigError> {
    let config = Config::new(config)?;
    let model_type = config.text("model_type")?.ok_or_else(|| ConfigError::Missing { key: "model_type".into() })?;
    match ARCHITECTURES.iter().find(|(name, _)| *name == model_type) {
        Some((_, spec)) => spec(&config),
        None => Err(ConfigError::UnknownModelType {
            model_type: model_type.chars().take(80).collect(),
            supported: supported_model_types().join(", "),
        }),
    }
}

pub fn supported_model_types() -> Vec<&'static str> {
    ARCHITECTURES.iter().map(|(name, _)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{FeedForward, HeadSpec, Mixer, RopeKind};
    use serde_json::json;

    fn tiny(model_type: &str) -> Value {
        json!({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "moe_intermediate_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 512, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "max_position_embeddings": 4096, "num_experts": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": true})
    }

    #[test]
    fn every_architecture_reads_a_config() {
        for model_type in supported_model_types() {
            let spec = read_spec(&tiny(model_type)).expect(model_type);
            assert_eq!((spec.n_layers(), spec.hidden_size, spec.vocab_size), (3, 64, 512), "{model_type}");
            assert!(matches!(spec.head, HeadSpec::Linear(_)));
            let experts = spec.layers.iter().filter(|layer| matches!(layer.feed_forward, FeedForward::Experts(_))).count();
            assert_eq!(
                experts,
                match model_type {
                    "mixtral" => 3,
                    "qwen3_moe" => 2,
                    _ => 0,
                },
                "{model_type}"
            );
        }
    }

    #[test]
    fn a_missing_or_absurd_value_is_named() {
        for (key, value) in [
            ("hidden_size", json!(0)),
            ("num_hidden_layers", json!(1_000_000_000_000u64)),
            ("vocab_size", json!(-1)),
            ("rms_norm_eps", json!("small")),
            ("num_key_value_heads", json!(3)),
        ] {
            for model_type in supported_model_types() {
                let mut config = tiny(model_type);
                config[key] = value.clone();
                let message = read_spec(&config).expect_err(key).to_string();
                assert!(message.contains(key), "{model_type}: {message}");
            }
        }
        let mut config = tiny("llama");
        config.as_object_mut().expect("an object").remove("hidden_size");
        assert_eq!(read_spec(&config), Err(ConfigError::Missing { key: "hidden_size".into() }));
    }

    #[test]
    fn an_unknown_model_type_lists_the_known_ones() {
        let message = read_spec(&json!({"model_type": "gpt9"})).expect_err("unknown").to_string();
        assert!(message.contains("gpt9") && message.contains("qwen3_moe"), "{message}");
    }

    #[test]
    fn rope_kinds() {
        let kind = |scaling: Value| {
            let mut config = tiny("llama");
            config["rope_scaling"] = scaling;
            read_spec(&config).map(|spec| {
                let Mixer::Attention(attention) = spec.layers[0].mixer.clone();
                attention.rope.expect("rope").kind
            })
        };
        assert_eq!(kind(Value::Null), Ok(RopeKind::Default));
        assert_eq!(kind(json!({"type": "linear", "factor": 4})), Ok(RopeKind::Linear { factor: 4.0 }));
        assert!(matches!(kind(json!({"rope_type": "llama3", "factor": 8.0})), Ok(RopeKind::Llama3 { original_context: 8192, .. })));
        assert!(matches!(kind(json!({"rope_type": "yarn", "factor": 4.0})), Ok(RopeKind::Yarn { original_context: 4096, .. })));
        assert!(kind(json!({"rope_type": "yarn", "factor": 0})).is_err());
        assert!(kind(json!({"rope_type": "spiral"})).is_err());
    }
}

//! From `config.json` to a [`ModelSpec`]: one file an architecture, each a pure function.

mod blocks;
mod llama;
mod mixtral;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use crate::{
    config::{Config, ConfigError},
    spec::ModelSpec,
};
use blocks::Source;
use serde_json::Value;
use std::fmt;

/// A `model_type` of `config.json` that we can run.
pub struct Architecture {
    pub model_type: &'static str,
    pub group: Group,
    /// What sets it apart, in a few words.
    pub special: &'static str,
    read: fn(Source) -> Result<ModelSpec, ConfigError>,
}

/// Families of architectures that share most of their blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    Base,
    QwenHybrid,
    Latent,
    Experts,
    Gemma,
    StateSpace,
    Other,
}

/// Each file's architectures.
const FILES: &[&[Architecture]] =
    &[llama::ARCHITECTURES, mixtral::ARCHITECTURES, qwen2::ARCHITECTURES, qwen3::ARCHITECTURES, qwen3_moe::ARCHITECTURES];

/// Every supported architecture, by group and name.
pub fn architectures() -> Vec<&'static Architecture> {
    let mut all: Vec<_> = FILES.iter().copied().flatten().collect();
    all.sort_by_key(|architecture| (architecture.group, architecture.model_type));
    all
}

/// Reads the `model_type` of a config and hands it to its architecture.
pub fn read_spec(config: &Value) -> Result<ModelSpec, ConfigError> {
    let config = Config::new(config)?;
    let model_type = config.text("model_type")?.ok_or_else(|| ConfigError::Missing { key: "model_type".into() })?;
    match architectures().into_iter().find(|architecture| architecture.model_type == model_type) {
        Some(architecture) => (architecture.read)(Source::new(config, model_type)),
        None => Err(unknown(model_type)),
    }
}

pub fn supported_model_types() -> Vec<&'static str> {
    architectures().into_iter().map(|architecture| architecture.model_type).collect()
}

fn unknown(model_type: &str) -> ConfigError {
    let nearest = architectures().into_iter().map(|architecture| architecture.model_type).min_by_key(|known| distance(known, model_type));
    ConfigError::UnknownModelType {
        model_type: model_type.chars().take(80).collect(),
        nearest: nearest.unwrap_or_default(),
        supported: architectures().len(),
    }
}

/// Edit distance (Levenshtein 1966).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(80).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Group::Base => "dense decoders",
            Group::QwenHybrid => "Qwen with gated delta rule",
            Group::Latent => "latent attention",
            Group::Experts => "grouped queries with experts",
            Group::Gemma => "Gemma",
            Group::StateSpace => "state spaces and convolutions",
            Group::Other => "others",
        })
    }
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
    fn an_unknown_model_type_names_the_nearest() {
        let message = read_spec(&json!({"model_type": "qwen3-moe"})).expect_err("unknown").to_string();
        assert!(
            message.contains("`qwen3-moe`") && message.contains("`qwen3_moe`") && message.contains("adding-an-architecture"),
            "{message}"
        );
    }

    #[test]
    fn rope_kinds() {
        let kind = |scaling: Value| {
            let mut config = tiny("llama");
            config["rope_scaling"] = scaling;
            read_spec(&config).map(|spec| {
                let Mixer::Attention(attention) = &spec.layers[0].mixer else { panic!("attention") };
                attention.rope.clone().expect("rope").kind
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

//! Mistral Small 3.1 and later, Pixtral and LLaVA: the language model of each.

use super::{Architecture, Group, blocks::Source, llama, ministral3, mistral4, vision::language_model};
use crate::{config::ConfigError, spec::ModelSpec};
use serde_json::{Map, Value, json};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "llava", group: Group::Base, special: "text of LLaVA: as llama", read: read_llava },
    Architecture {
        model_type: "mistral3",
        group: Group::Base,
        special: "text of Mistral: as llama, ministral3 or mistral4",
        read: read_mistral,
    },
    Architecture { model_type: "pixtral", group: Group::Base, special: "text of Pixtral: as llama", read: read_mistral },
];

fn read_mistral(source: Source) -> Result<ModelSpec, ConfigError> {
    read(source, "mistral")
}

fn read_llava(source: Source) -> Result<ModelSpec, ConfigError> {
    read(source, "llama")
}

/// `kind` is the language model's model_type where its config does not say it.
fn read(source: Source, kind: &str) -> Result<ModelSpec, ConfigError> {
    language_model(source, |source| {
        let kind = source.config.text("model_type")?.unwrap_or(kind);
        let entries = source.config.filled(defaults(kind));
        let source = Source { config: source.config.with_entries(&entries), ..source };
        match kind {
            "llama" | "mistral" => llama::read(source),
            "ministral3" => ministral3::read(source),
            "mistral4" => mistral4::read(source),
            other => Err(source.unsupported(format!("a language model of type `{other}`"))),
        }
    })
}

/// What transformers leaves out of a `text_config`: the defaults of its type.
fn defaults(kind: &str) -> Map<String, Value> {
    let defaults = match kind {
        "llama" => json!({"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": false}),
        "mistral" => json!({"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
            "tie_word_embeddings": false}),
        _ => json!({"tie_word_embeddings": false}),
    };
    match defaults {
        Value::Object(defaults) => defaults,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use crate::architectures::read_spec;
    use serde_json::json;

    #[test]
    fn keys_left_out_are_those_of_the_type() {
        let text = json!({"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5});
        let spec = read_spec(&json!({"model_type": "llava", "text_config": text})).expect("valid");
        assert_eq!((spec.hidden_size, spec.n_layers(), spec.vocab_size, spec.kv_heads(0)), (4096, 32, 32064, Some(32)));
        let spec = read_spec(&json!({"model_type": "llava", "text_config": {"model_type": "mistral", "rope_theta": 1e6}})).expect("valid");
        assert_eq!((spec.n_layers(), spec.kv_heads(0)), (32, Some(8)));
        let text = json!({"model_type": "qwen2"});
        assert!(read_spec(&json!({"model_type": "llava", "text_config": text})).expect_err("another type").to_string().contains("qwen2"));
    }
}

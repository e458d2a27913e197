//! Small data sets and a model folder for tests.

use super::{DataSet, Example};
use serde_json::{Value, json};
use std::path::Path;

/// A set of examples with these (lengths, numbers of fields); the tokens of example i are i, i + 1 and so on.
pub(super) fn set(examples: &[(usize, usize)], max_seq_length: usize) -> DataSet {
    let example = |(index, (len, order)): (usize, &(usize, usize))| Example {
        tokens: (index as u32..).take((*len).min(max_seq_length)).collect(),
        offset: 0,
        order: *order,
    };
    let examples = examples.iter().enumerate().map(example).collect();
    DataSet { name: "test data".to_owned(), examples, max_seq_length, notes: Vec::new() }
}

/// A chat template with all that training asks of one.
pub(super) const TEMPLATE: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if tools %}[{{ tools | length }}]{% endif %}\
     {% if add_generation_prompt %}<|assistant|>{% endif %}{% if enable_thinking %}!{% endif %}";

/// The bytes as tokens, with `<|begin|>` before a text.
pub(in crate::training) fn model(folder: &Path, tokenizer_config: &Value) {
    let tokenizer = crate::chat::fixtures::byte_level();
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("tokenizer_config.json"), tokenizer_config.to_string()).unwrap();
}

pub(in crate::training) fn usual_config() -> Value {
    json!({"eos_token": "<|end|>", "bos_token": "<|begin|>", "chat_template": TEMPLATE})
}

//! A tiny Llama with random weights in the published layout, and ways to break it.

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

pub(crate) const VOCAB_SIZE: usize = 320;
const HIDDEN_SIZE: usize = 64;
const INTERMEDIATE_SIZE: usize = 96;
const KV_SIZE: usize = 32;
const CONTEXT_TOKENS: usize = 8192;
const TEMPLATE: &str =
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// The folder of a model; gone with this value.
pub(crate) struct TinyModel {
    folder: TempDir,
    name: String,
}

impl TinyModel {
    /// Nothing ends an answer but its `max_tokens`.
    pub(crate) fn new() -> Self {
        Self::with_layers(4)
    }

    pub(crate) fn with_layers(n_layers: usize) -> Self {
        Self::with_sizes(n_layers, INTERMEDIATE_SIZE)
    }

    /// Wide layers are larger, with headers as short as ever.
    pub(crate) fn with_sizes(n_layers: usize, intermediate_size: usize) -> Self {
        let model = Self { folder: tempfile::tempdir().unwrap(), name: "tiny".into() };
        std::fs::create_dir(model.path()).unwrap();
        model.write_json("config.json", &config(n_layers, intermediate_size));
        model.write_json("tokenizer.json", &tokenizer());
        model.write_json("tokenizer_config.json", &json!({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}));
        write_weights(&model.path().join("model.safetensors"), &tensors(n_layers, intermediate_size));
        model
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    pub(crate) fn text(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }

    /// Changes keys of `config.json`; null takes a key away.
    pub(crate) fn with_config(self, changes: &Value) -> Self {
        self.with_json("config.json", changes)
    }

    pub(crate) fn with_json(self, file: &str, changes: &Value) -> Self {
        let mut value: Value = serde_json::from_str(&std::fs::read_to_string(self.path().join(file)).unwrap()).unwrap();
        let object = value.as_object_mut().unwrap();
        for (key, change) in changes.as_object().unwrap() {
            object.remove(key);
            if !change.is_null() {
                object.insert(key.clone(), change.clone());
            }
        }
        self.write_json(file, &value);
        self
    }

    pub(crate) fn without(self, file: &str) -> Self {
        std::fs::remove_file(self.path().join(file)).unwrap();
        self
    }

    pub(crate) fn with_file(self, file: &str, bytes: &[u8]) -> Self {
        std::fs::write(self.path().join(file), bytes).unwrap();
        self
    }

    /// Rewrites the weights without, or with other, tensors.
    pub(crate) fn with_tensors(self, change: impl FnOnce(&mut BTreeMap<String, Vec<usize>>)) -> Self {
        let mut tensors = tensors(4, INTERMEDIATE_SIZE);
        change(&mut tensors);
        write_weights(&self.path().join("model.safetensors"), &tensors);
        self
    }

    /// Rewrites the header of the weight file, its data stay as they are.
    pub(crate) fn with_header(self, change: impl FnOnce(&mut Value)) -> Self {
        let bytes = self.weight_bytes();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        change(&mut header);
        let header = header.to_string().into_bytes();
        let mut changed = (header.len() as u64).to_le_bytes().to_vec();
        changed.extend(header);
        changed.extend(&bytes[8 + length..]);
        self.with_file("model.safetensors", &changed)
    }

    pub(crate) fn weight_bytes(&self) -> Vec<u8> {
        std::fs::read(self.path().join("model.safetensors")).unwrap()
    }

    fn write_json(&self, file: &str, value: &Value) {
        std::fs::write(self.path().join(file), value.to_string()).unwrap();
    }
}

fn config(n_layers: usize, intermediate_size: usize) -> Value {
    json!({"model_type": "llama", "hidden_size": HIDDEN_SIZE, "num_hidden_layers": n_layers, "intermediate_size": intermediate_size,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCAB_SIZE, "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT_TOKENS, "tie_word_embeddings": false})
}

/// Names and shapes.
fn tensors(n_layers: usize, intermediate_size: usize) -> BTreeMap<String, Vec<usize>> {
    let mut tensors = BTreeMap::from([
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB_SIZE, HIDDEN_SIZE]),
        ("model.norm.weight".to_owned(), vec![HIDDEN_SIZE]),
        ("lm_head.weight".to_owned(), vec![VOCAB_SIZE, HIDDEN_SIZE]),
    ]);
    let of_layer = [
        ("input_layernorm", vec![HIDDEN_SIZE]),
        ("post_attention_layernorm", vec![HIDDEN_SIZE]),
        ("self_attn.q_proj", vec![HIDDEN_SIZE, HIDDEN_SIZE]),
        ("self_attn.k_proj", vec![KV_SIZE, HIDDEN_SIZE]),
        ("self_attn.v_proj", vec![KV_SIZE, HIDDEN_SIZE]),
        ("self_attn.o_proj", vec![HIDDEN_SIZE, HIDDEN_SIZE]),
        ("mlp.gate_proj", vec![intermediate_size, HIDDEN_SIZE]),
        ("mlp.up_proj", vec![intermediate_size, HIDDEN_SIZE]),
        ("mlp.down_proj", vec![HIDDEN_SIZE, intermediate_size]),
    ];
    for layer in 0..n_layers {
        tensors.extend(of_layer.iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape.clone())));
    }
    tensors
}

fn write_weights(path: &Path, tensors: &BTreeMap<String, Vec<usize>>) {
    let mut random = 1u64;
    let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product::<usize>()).flat_map(|_| next_value(&mut random).to_le_bytes());
            (name, shape, values.collect())
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, (*shape).clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// From -0.25 to 0.25 (a linear congruential generator: Knuth's MMIX).
fn next_value(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    ((*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.5
}

/// Ids 0 to 255 are bytes, in the order in which GPT-2's alphabet stands in Unicode.
pub(crate) fn tokenizer() -> Value {
    let mut alphabet: Vec<char> = (0..=255u8).map(char::from).filter(|c| matches!(c, '!'..='~' | '¡'..='¬' | '®'..='ÿ')).collect();
    let missing = 256 - alphabet.len() as u32;
    alphabet.extend((0..missing).filter_map(|i| char::from_u32(256 + i)));
    let vocab: BTreeMap<String, usize> = alphabet.iter().enumerate().map(|(id, char)| (char.to_string(), id)).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": null, "decoder": byte_level, "model": {"type": "BPE", "dropout": null, "unk_token": null,
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}})
}

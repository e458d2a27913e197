//! Small tokenizers for tests, of the two kinds that language models have.

use serde_json::{Value, json};

use super::tokenizer::{ChatTokenizer, TokenizerError};

/// A byte-level BPE tokenizer in the manner of GPT-2: ids 0..256 are the bytes in the order of their characters.
pub(crate) fn byte_level() -> Value {
    let alphabet = (0x21..=0x7e).chain(0xa1..=0xac).chain(0xae..=0xff).chain(0x100..=0x143).filter_map(char::from_u32);
    let mut tokens: Vec<String> = alphabet.map(String::from).collect();
    assert_eq!(tokens.len(), 256);
    tokens.extend(["Ġh", "el", "lo", "ello", "Ġhello", "ðŁ", "ĺĢ"].map(str::to_owned));
    let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let added = |id: u32, content: &str, special: bool| json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    json!({
        "version": "1.0",
        "added_tokens": [added(263, "<|begin|>", true), added(264, "<|end|>", true), added(265, "<think>", false), added(266, "<｜x｜>", true)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [263], "tokens": ["<|begin|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "vocab": vocab, "merges": [["Ġ", "h"], ["e", "l"], ["l", "o"], ["el", "lo"], ["Ġh", "ello"], ["ð", "Ł"], ["ĺ", "Ģ"]],
        },
    })
}

/// A SentencePiece-style tokenizer with byte fallback, in the manner of Llama 2: ids 3..259 are the bytes.
pub(super) fn sentence_piece() -> Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "a", "b", "é", "▁a", "ab", "▁ab", "▁▁", "�"].map(str::to_owned));
    let vocab: serde_json::Map<String, Value> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let added = |id: u32, content: &str| json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    json!({
        "version": "1.0",
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"], ["▁", "▁"]],
        },
    })
}

/// Loads a tokenizer from a folder that holds it and the given configuration files.
pub(super) fn load(tokenizer: &Value, configs: &[(&str, Value)]) -> Result<ChatTokenizer, TokenizerError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, config) in configs {
        std::fs::write(folder.path().join(name), config.to_string()).unwrap();
    }
    ChatTokenizer::load(folder.path())
}

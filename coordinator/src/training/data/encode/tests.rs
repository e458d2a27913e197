//! Which tokens a text or a chat becomes, and where its prompt ends.

use super::*;
use crate::training::data::fixtures::{TEMPLATE, model, usual_config};
use serde_json::json;

const BEGIN: u32 = 263;
const END: u32 = 264;

fn encoder(config: &Value, map: Option<Value>) -> Encoder {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path(), config);
    if let Some(map) = map {
        std::fs::write(folder.path().join("special_tokens_map.json"), map.to_string()).unwrap();
    }
    Encoder::load(folder.path()).unwrap()
}

fn text(encoder: &Encoder, text: &str) -> Vec<u32> {
    encoder.encode(&Content::Text(text.to_owned()), false).unwrap().0
}

fn chat(encoder: &Encoder, roles: &[&str]) -> (Vec<u32>, u32) {
    let messages = roles.iter().map(|role| json!({"role": role, "content": "a"})).collect();
    encoder.encode(&Content::Chat { messages, tools: None }, true).unwrap()
}

#[test]
fn a_text_ends_once() {
    let usual = encoder(&usual_config(), None);
    let plain = text(&usual, "ab");
    assert_eq!((plain[0], plain.len(), plain[3]), (BEGIN, 4, END));
    assert_eq!(text(&usual, "ab<|end|>"), plain);
    // As Hugging Face's encode does it.
    assert_eq!(text(&usual, "<|begin|>")[..2], [BEGIN, BEGIN]);
    assert_eq!(text(&usual, ""), [BEGIN, END]);
}

#[test]
fn flags_of_the_config_change_nothing() {
    let mut config = usual_config();
    config["add_bos_token"] = false.into();
    config["add_eos_token"] = true.into();
    assert_eq!(text(&encoder(&config, None), "ab<|end|>"), text(&encoder(&usual_config(), None), "ab"));
}

#[test]
fn a_text_without_a_token_is_a_fault() {
    let folder = tempfile::tempdir().unwrap();
    let mut tokenizer = crate::chat::fixtures::byte_level();
    tokenizer["post_processor"] = Value::Null;
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let empty = Encoder::load(folder.path()).unwrap().encode(&Content::Text(String::new()), false);
    assert!(matches!(empty, Err(RowFault::NoTokens)), "{empty:?}");
}

#[test]
fn the_end_is_found_also_in_the_older_file() {
    let older = json!({"eos_token": {"content": "<|end|>"}});
    let config = json!({"bos_token": "<|begin|>"});
    assert_eq!(encoder(&config, Some(older.clone())).eos().unwrap(), END);
    let newer = json!({"bos_token": "<|begin|>", "added_tokens_decoder": {}});
    let error = encoder(&newer, Some(older)).eos().unwrap_err().to_string();
    assert!(error.contains("names no eos_token"), "{error}");
    assert!(encoder(&json!({"eos_token": "<|unknown|>"}), None).eos().is_err());
}

#[test]
fn the_prompt_ends_where_the_last_answer_begins() {
    let usual = encoder(&usual_config(), None);
    let whole = |text: &str| usual.tokenizer.encode(text, false).unwrap();
    let (tokens, offset) = chat(&usual, &["user", "assistant"]);
    assert_eq!(tokens, whole("<|user|>a<|end|><|assistant|>a<|end|>"));
    assert_eq!(offset as usize, whole("<|user|>a<|end|><|assistant|>").len());
    let (_, offset) = chat(&usual, &["assistant", "user"]);
    assert_eq!(offset as usize, whole("<|assistant|>a<|end|>").len());
    assert_eq!(chat(&usual, &["assistant"]).1, 0);
}

#[test]
fn templates_hear_of_thinking_and_tools() {
    let usual = encoder(&usual_config(), None);
    let messages = vec![json!({"role": "user", "content": "a"})];
    let tools = Some(vec![json!({}), json!({})]);
    let (tokens, _) = usual.encode(&Content::Chat { messages, tools }, false).unwrap();
    assert_eq!(usual.tokenizer.decode(&tokens, false).unwrap(), "<|user|>a<|end|>[2]");

    let folder = tempfile::tempdir().unwrap();
    let tokenizer = crate::chat::fixtures::byte_level().to_string().replace("<｜x｜>", "</think>");
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let thinking = Encoder::load(folder.path()).unwrap();
    let (tokens, _) = chat(&thinking, &["user", "assistant"]);
    assert!(thinking.tokenizer.decode(&tokens, false).unwrap().ends_with('!'));
}

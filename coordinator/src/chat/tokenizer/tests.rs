//! Loading good, missing and malformed tokenizers; ids, bytes and special tokens.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::chat::fixtures::{byte_level, load, sentence_piece};

fn configured() -> &'static ChatTokenizer {
    static LOADED: LazyLock<ChatTokenizer> = LazyLock::new(|| {
        let config = json!({"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "special": true}, "pad_token": null});
        load(&byte_level(), &[("tokenizer_config.json", config)]).unwrap()
    });
    &LOADED
}

#[test]
fn text_survives_encoding_and_decoding() {
    let tokenizer = configured();
    for text in ["", "hello", " hello wörld 😀\n\n\t x", "日本語 \u{0}\u{7f}"] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("x hello", false).unwrap().len(), 2);
}

#[test]
fn the_first_token_is_not_doubled() {
    let tokenizer = configured();
    let bos = tokenizer.bos_id().unwrap();
    let count = |text: &str, add: bool| tokenizer.encode(text, add).unwrap().iter().filter(|id| **id == bos).count();
    assert_eq!([count("a", false), count("a", true), count("<|begin|>a", true), count("<|begin|>a", false)], [0, 1, 1, 1]);
    assert_eq!(tokenizer.encode("", true).unwrap(), [bos]);
}

#[test]
fn special_tokens_come_from_texts_and_objects() {
    let tokenizer = configured();
    let special: Vec<_> = tokenizer.special_tokens().iter().collect();
    assert_eq!(special, [("bos_token", "<|begin|>"), ("eos_token", "<|end|>")]);
    assert_eq!((tokenizer.bos_id(), tokenizer.token_id("<|end|>")), (Some(263), Some(264)));
    assert_eq!(tokenizer.vocab_size(), 267);
    assert!(tokenizer.is_special(264) && !tokenizer.is_special(265) && !tokenizer.is_special(0));
    assert_eq!(tokenizer.decode(&[264, 265, 0], true).unwrap(), "<think>!");
}

#[test]
fn the_generation_config_says_what_ends_an_answer() {
    let eos = |configs: &[(&str, Value)]| load(&byte_level(), configs).map(|loaded| loaded.eos_ids().iter().copied().collect::<Vec<_>>());
    let generation = ("generation_config.json", json!({"eos_token_id": [264, 263]}));
    let config = ("config.json", json!({"eos_token_id": 5, "text_config": {"eos_token_id": 6}}));
    let nested = ("config.json", json!({"text_config": {"eos_token_id": 6}}));
    let tokenizer = ("tokenizer_config.json", json!({"eos_token": "<|end|>"}));
    assert_eq!(eos(&[generation, config.clone(), tokenizer.clone()]).unwrap(), [263, 264]);
    assert_eq!(eos(&[("generation_config.json", json!({})), config, tokenizer.clone()]).unwrap(), [5]);
    assert_eq!(eos(&[nested]).unwrap(), [6]);
    assert_eq!(eos(&[tokenizer]).unwrap(), [264]);
    assert_eq!(eos(&[]).unwrap(), Vec::<u32>::new());
    for bad in [json!(-1), json!("2"), json!([1, null]), json!(1.5)] {
        let error = eos(&[("config.json", json!({"eos_token_id": bad}))]).unwrap_err();
        assert!(error.to_string().contains("config.json") && error.to_string().contains("eos_token_id"), "{error}");
    }
}

#[test]
fn tokens_have_text_and_exact_bytes() {
    let tokenizer = configured();
    let shown = |token: &str| {
        let shown = tokenizer.token_text(tokenizer.token_id(token).unwrap()).unwrap();
        (shown.text, shown.bytes)
    };
    assert_eq!(shown("Ġhello"), (" hello".to_owned(), b" hello".to_vec()));
    assert_eq!(shown("Ċ"), ("\n".to_owned(), b"\n".to_vec()));
    assert_eq!(shown("ðŁ"), ("\u{fffd}".to_owned(), vec![0xf0, 0x9f]));
    assert_eq!(shown("<|end|>"), ("<|end|>".to_owned(), b"<|end|>".to_vec()));
    assert_eq!(shown("<｜x｜>").0, "<｜x｜>");
    assert_eq!(tokenizer.token_text(9999), None);
    let bytes: BTreeSet<Vec<u8>> = (0..256).map(|id| tokenizer.token_text(id).unwrap().bytes).collect();
    assert_eq!(bytes, (0..=255).map(|byte| vec![byte]).collect());

    let tokenizer = load(&sentence_piece(), &[]).unwrap();
    let bytes = |token: &str| tokenizer.token_text(tokenizer.token_id(token).unwrap()).unwrap().bytes;
    assert_eq!((bytes("▁ab"), bytes("<0xE9>"), bytes("é")), (b" ab".to_vec(), vec![0xe9], "é".as_bytes().to_vec()));
}

#[test]
fn a_missing_tokenizer_names_the_folder_and_the_next_step() {
    let folder = tempfile::tempdir().unwrap();
    let error = ChatTokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains(folder.path().to_str().unwrap()) && error.contains("download the model again"), "{error}");
}

#[test]
fn a_huge_file_is_refused_without_reading_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(folder.path().join("tokenizer.json")).unwrap();
    file.set_len(1 << 30).unwrap();
    let error = ChatTokenizer::load(folder.path()).unwrap_err();
    assert!(matches!(error, TokenizerError::TooLarge { bytes: 1_073_741_824, .. }), "{error}");
}

/// Each would end the process, or the request that first meets it, if it got through.
#[test]
fn malformed_parts_are_errors_and_not_panics() {
    let decoders = [
        json!("u"),
        json!({"type": "Strip", "content": "Ġ", "start": 0, "stop": 9}),
        json!({"type": "Nonsense"}),
        json!(5),
        json!({"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    ];
    let with = |part: &str, value: &Value| {
        let mut tokenizer = byte_level();
        tokenizer[part] = value.clone();
        load(&tokenizer, &[])
    };
    for decoder in decoders {
        let error = with("decoder", &decoder).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json is not usable"), "{decoder}: {error}");
    }
    assert!(with("pre_tokenizer", &json!({"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": false})).is_err());
    assert!(with("normalizer", &json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})).is_err());
    assert!(with("model", &json!({"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]})).is_err());
    assert!(with("model", &json!({"type": "BPE", "vocab": {"a": -1}, "merges": []})).is_err());
    assert!(with("model", &json!({})).is_err());
    assert!(with("post_processor", &json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}], "pair": [], "special_tokens": {}})).is_err());
    for text in ["", "{", "<html></html>", "null", "[]", "\u{feff}"] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
        assert!(matches!(ChatTokenizer::load(folder.path()), Err(TokenizerError::Invalid { .. })), "{text}");
    }
}

/// The tokenizers crate has panicked on this while parsing.
#[test]
fn a_decoder_that_is_a_bare_letter_is_an_error() {
    let text = byte_level().to_string().replacen("\"decoder\":{", "\"decoder\":u,\"x\":{", 1);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
    assert!(matches!(ChatTokenizer::load(folder.path()), Err(TokenizerError::Invalid { .. })));
}

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let mut tokenizer = byte_level();
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let tokenizer = load(&tokenizer, &[]).unwrap();
    assert_eq!(tokenizer.encode("abcdefgh", false).unwrap().len(), 8);
}

proptest! {
    #[test]
    fn nothing_panics_on_any_text(text in any::<String>(), add in any::<bool>()) {
        let tokenizer = configured();
        let ids = tokenizer.encode(&text, add).unwrap();
        let decoded = tokenizer.decode(&ids, true).unwrap();
        prop_assert_eq!(decoded, text);
    }
}

//! Streaming equals decoding at once, for both kinds of vocabulary and any ids.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::chat::fixtures::{byte_level, load, sentence_piece};

fn gpt() -> Arc<ChatTokenizer> {
    static LOADED: LazyLock<Arc<ChatTokenizer>> = LazyLock::new(|| Arc::new(load(&byte_level(), &[]).unwrap()));
    Arc::clone(&LOADED)
}

fn llama() -> Arc<ChatTokenizer> {
    static LOADED: LazyLock<Arc<ChatTokenizer>> = LazyLock::new(|| Arc::new(load(&sentence_piece(), &[]).unwrap()));
    Arc::clone(&LOADED)
}

fn stream(tokenizer: &Arc<ChatTokenizer>, ids: &[u32], skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip);
    let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
    pieces.push(detokenizer.finish());
    pieces
}

fn ids(tokenizer: &ChatTokenizer, tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| tokenizer.token_id(token).unwrap()).collect()
}

#[test]
fn text_comes_as_soon_as_it_is_certain() {
    let tokenizer = gpt();
    let ids = ids(&tokenizer, &["Ġhello", "ðŁ", "ĺĢ", "Ġ", "Ã", "©", "lo"]);
    assert_eq!(stream(&tokenizer, &ids, true), [" hello", "", "😀", " ", "", "é", "lo", ""]);
    let tokenizer = llama();
    let ids = self::ids(&tokenizer, &["▁ab", "▁", "▁a", "<0xC3>", "<0xA9>", "b", "▁▁", "a"]);
    assert_eq!(stream(&tokenizer, &ids, true), ["ab", " ", " a", "", "", "éb", "  ", "a", ""]);
}

#[test]
fn half_a_character_at_the_end_is_not_lost() {
    let tokenizer = gpt();
    assert_eq!(stream(&tokenizer, &ids(&tokenizer, &["ðŁ"]), true), ["", "\u{fffd}"]);
    assert_eq!(stream(&tokenizer, &ids(&tokenizer, &["ðŁ", "a"]), true), ["", "\u{fffd}a", ""]);
    let tokenizer = llama();
    assert_eq!(stream(&tokenizer, &ids(&tokenizer, &["a", "<0xC3>"]), true), ["a", "", "\u{fffd}"]);
}

#[test]
fn special_tokens_are_left_out_on_request() {
    let tokenizer = gpt();
    let ids = ids(&tokenizer, &["<|begin|>", "Ġhello", "<think>", "<|end|>"]);
    assert_eq!(stream(&tokenizer, &ids, true).concat(), " hello<think>");
    assert_eq!(stream(&tokenizer, &ids, false).concat(), "<|begin|> hello<think><|end|>");
}

#[test]
fn a_completion_keeps_the_space_before_its_first_word() {
    let tokenizer = llama();
    let (prompt, word) = (ids(&tokenizer, &["<s>", "▁a"]), ids(&tokenizer, &["▁ab", "b"]));
    let mut after = Detokenizer::after(Arc::clone(&tokenizer), &prompt, true);
    assert_eq!([after.push(word[0]), after.push(word[1]), after.finish()], [" ab", "b", ""]);
    assert_eq!(stream(&tokenizer, &word, true).concat(), "abb");
}

#[test]
fn unknown_ids_are_left_out() {
    for tokenizer in [gpt(), llama()] {
        let a = tokenizer.token_id("a").unwrap();
        assert_eq!(stream(&tokenizer, &[a, 4_000_000_000, a], true).concat(), "aa");
    }
}

#[test]
fn endless_garbage_does_not_get_slower() {
    let tokenizer = llama();
    for token in ["<0xFF>", "�", "▁"] {
        let ids = vec![tokenizer.token_id(token).unwrap(); 20_000];
        let started = std::time::Instant::now();
        assert_eq!(stream(&tokenizer, &ids, true).concat(), tokenizer.decode(&ids, true).unwrap());
        assert!(started.elapsed().as_secs() < 20, "{token}: {:?}", started.elapsed());
    }
}

proptest! {
    #[test]
    fn byte_level_pieces_equal_the_whole(ids in prop::collection::vec(0u32..270, 0..40), skip in any::<bool>()) {
        let tokenizer = gpt();
        prop_assert_eq!(stream(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).unwrap());
    }

    #[test]
    fn byte_level_pieces_equal_the_whole_for_text(text in any::<String>()) {
        let tokenizer = gpt();
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(stream(&tokenizer, &ids, true).concat(), text);
    }

    #[test]
    fn sentence_piece_pieces_equal_the_whole(
        ids in prop::collection::vec(prop_oneof![0u32..270, 256u32..270, Just(198u32), Just(172u32)], 0..40),
        skip in any::<bool>(),
    ) {
        let tokenizer = llama();
        prop_assert_eq!(stream(&tokenizer, &ids, skip).concat(), tokenizer.decode(&ids, skip).unwrap());
    }

    #[test]
    fn sentence_piece_pieces_equal_the_whole_for_text(text in "[ab é😀日▁]{0,30}") {
        let tokenizer = llama();
        let ids = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(stream(&tokenizer, &ids, true).concat(), tokenizer.decode(&ids, true).unwrap());
    }
}

//! Log-probabilities as OpenAI's two APIs write them.

use crate::chat::tokenizer::ChatTokenizer;
use mlx_cluster_common::request::TokenOut;
use serde_json::{Map, Value, json};

/// What OpenAI sends for a token that cannot come; JSON has no infinity.
const IMPOSSIBLE: f32 = -9999.0;

/// The lists of `/v1/completions`, as long as there are tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct LegacyLogprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
}

impl LegacyLogprobs {
    /// Adds a token whose text begins at `offset_chars` of the answer's text.
    pub(super) fn push(&mut self, tokenizer: &ChatTokenizer, token: &TokenOut, offset_chars: usize) {
        let text = token_name(tokenizer, token.id);
        let mut top = Map::new();
        for &(id, logprob) in &token.top {
            // Two ids may have the same text; the likelier one comes first and stays.
            top.entry(token_name(tokenizer, id)).or_insert_with(|| finite(logprob));
        }
        if let Some(logprob) = token.logprob {
            top.entry(text.clone()).or_insert_with(|| finite(logprob));
        }
        self.tokens.push(text.into());
        self.token_logprobs.push(token.logprob.map_or(Value::Null, finite));
        self.top_logprobs.push(if top.is_empty() { Value::Null } else { top.into() });
        self.text_offset.push(offset_chars.into());
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.tokens.append(&mut other.tokens);
        self.token_logprobs.append(&mut other.token_logprobs);
        self.top_logprobs.append(&mut other.top_logprobs);
        self.text_offset.append(&mut other.text_offset);
    }

    pub(super) fn into_json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

/// An entry of `logprobs.content` of `/v1/chat/completions`.
pub(super) fn chat_entry(tokenizer: &ChatTokenizer, token: &TokenOut) -> Value {
    let entry = |id: u32, logprob: f32| match tokenizer.token_text(id) {
        Some(text) => json!({"token": text.text, "logprob": finite(logprob), "bytes": text.bytes}),
        None => json!({"token": token_name(tokenizer, id), "logprob": finite(logprob), "bytes": null}),
    };
    let mut this = entry(token.id, token.logprob.unwrap_or(f32::NEG_INFINITY));
    this["top_logprobs"] = token.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
    this
}

fn finite(logprob: f32) -> Value {
    json!(if logprob.is_finite() { logprob } else { IMPOSSIBLE })
}

/// A token as a text of its own: parts of characters as `bytes:\xe2\x82`, ids that the tokenizer does not know as `token_id:7`.
fn token_name(tokenizer: &ChatTokenizer, id: u32) -> String {
    let Some(token) = tokenizer.token_text(id) else { return format!("token_id:{id}") };
    match String::from_utf8(token.bytes) {
        Ok(text) => text,
        Err(error) => error.as_bytes().iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}

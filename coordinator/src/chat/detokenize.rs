//! Token ids to text, one by one: text is handed out as soon as no later token can change it.
//!
//! Vocabularies in GPT-2's byte alphabet, most of today's, are plain bytes: what is complete UTF-8 goes out. Others are decoded in
//! a short window, because their decoders look at neighbours (SentencePiece drops the space before the first word only):
//! new text is `decode(window + new)` without `decode(window)`, the method of Hugging Face's text-generation-inference and vLLM.

use std::sync::Arc;

use super::tokenizer::ChatTokenizer;

/// Tokens that decode to nothing or to half a character keep the window open; after this many it is moved on regardless,
/// so that the cost of a token stays bounded.
const MAX_WINDOW: usize = 64;
/// Tokens of the prompt that give the first token its neighbours.
const PROMPT_TOKENS: usize = 6;

/// The text of one growing sequence.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<ChatTokenizer>,
    skip_special_tokens: bool,
    method: Method,
}

#[derive(Debug)]
enum Method {
    /// Bytes of a character that is not complete yet.
    Bytes { pending: Vec<u8> },
    /// `ids[..read]` is only there as neighbours, its text is out; `ids[read..]` is not.
    Window { ids: Vec<u32>, read: usize },
}

impl Detokenizer {
    /// For a text of its own, such as a chat answer: all pieces together equal [`ChatTokenizer::decode`] of all ids.
    pub fn new(tokenizer: Arc<ChatTokenizer>, skip_special_tokens: bool) -> Self {
        let method =
            if tokenizer.bytes_decode { Method::Bytes { pending: Vec::new() } } else { Method::Window { ids: Vec::new(), read: 0 } };
        Self { tokenizer, skip_special_tokens, method }
    }

    /// For a text that goes on where `prompt` ends, such as a plain completion: keeps the space before its first word.
    pub fn after(tokenizer: Arc<ChatTokenizer>, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let mut detokenizer = Self::new(tokenizer, skip_special_tokens);
        if let Method::Window { ids, read } = &mut detokenizer.method {
            let seen = prompt.iter().filter(|id| !detokenizer.tokenizer.is_special(**id));
            let seen: Vec<u32> = seen.copied().collect();
            ids.extend(seen.iter().skip(seen.len().saturating_sub(PROMPT_TOKENS)));
            *read = ids.len();
        }
        detokenizer
    }

    /// Takes the next id and returns the text that became certain, often empty.
    pub fn push(&mut self, id: u32) -> String {
        let skipped = self.skip_special_tokens && self.tokenizer.is_special(id);
        let Some(bytes) = self.tokenizer.token_bytes(id).filter(|_| !skipped) else {
            return String::new();
        };
        match &mut self.method {
            Method::Bytes { pending } => {
                pending.extend(bytes);
                take_complete(pending)
            }
            Method::Window { ids, read } => {
                ids.push(id);
                // Whether a run of byte tokens is text or garbage shows only at its end.
                if self.tokenizer.is_fallback_byte(id) {
                    return String::new();
                }
                window_text(&self.tokenizer, ids, read, false)
            }
        }
    }

    /// Returns what was held back; an incomplete character becomes U+FFFD. The next id starts a new text.
    pub fn finish(&mut self) -> String {
        match &mut self.method {
            Method::Bytes { pending } => String::from_utf8_lossy(&std::mem::take(pending)).into_owned(),
            Method::Window { ids, read } => {
                let text = window_text(&self.tokenizer, ids, read, true);
                ids.clear();
                *read = 0;
                text
            }
        }
    }
}

/// Takes all but an incomplete last character out of `pending`; bytes that are no UTF-8 at all become U+FFFD.
fn take_complete(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let rest = pending.len() - taken;
        let incomplete = invalid.len() == rest && may_continue(invalid);
        if !invalid.is_empty() && !incomplete {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    pending.drain(..taken);
    text
}

fn may_continue(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

fn window_text(tokenizer: &ChatTokenizer, ids: &mut Vec<u32>, read: &mut usize, all: bool) -> String {
    let (before, pending) = ids.split_at((*read).min(ids.len()));
    if pending.is_empty() {
        return String::new();
    }
    let text = match (tokenizer.decode(before, false), tokenizer.decode(ids, false)) {
        (Ok(before), Ok(whole)) => whole.get(before.len()..).unwrap_or_default().to_owned(),
        // The decoder fails on these ids: their own bytes are better than an end of the stream.
        _ => {
            let bytes: Vec<u8> = pending.iter().filter_map(|id| tokenizer.token_bytes(*id)).flatten().collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
    };
    let open = text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER);
    if !all && open && ids.len() < MAX_WINDOW {
        return String::new();
    }
    ids.drain(..*read);
    *read = ids.len();
    text
}

#[cfg(test)]
mod tests;

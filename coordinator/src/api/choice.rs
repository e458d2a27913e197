//! One answer as it grows: tokens in, pieces of text with their tokens out, cut at stop strings.

use crate::chat::{detokenize::Detokenizer, stop::StopMatcher};
use mlx_cluster_common::request::{FinishReason, TokenOut};
use std::collections::VecDeque;

/// A token and where its text begins in the answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Placed {
    pub(super) token: TokenOut,
    /// Characters of the text before this token's own.
    pub(super) offset_chars: usize,
    /// It ended the answer, and is no part of its text.
    pub(super) is_stop: bool,
    offset_bytes: usize,
}

/// What became certain: text, the tokens that this text begins with or that lie in it, and the end.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) tokens: Vec<Placed>,
    pub(super) finish: Option<FinishReason>,
}

impl Piece {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty() && self.finish.is_none()
    }
}

/// Turns the tokens of one answer into pieces. Text waits while a stop string may have begun, tokens wait for their text.
#[derive(Debug)]
pub(super) struct Choice {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    stop_tokens: Vec<u32>,
    waiting: VecDeque<Placed>,
    decoded_bytes: usize,
    decoded_chars: usize,
    emitted_bytes: usize,
}

impl Choice {
    pub(super) fn new(detokenizer: Detokenizer, stop: Vec<String>, stop_tokens: Vec<u32>) -> Self {
        let stop = StopMatcher::new(stop);
        Self { detokenizer, stop, stop_tokens, waiting: VecDeque::new(), decoded_bytes: 0, decoded_chars: 0, emitted_bytes: 0 }
    }

    /// Takes the next token. The piece has `finish` when a stop string is complete; nothing may follow then.
    pub(super) fn push(&mut self, token: TokenOut) -> Piece {
        let id = token.id;
        let is_stop = self.stop_tokens.contains(&id);
        self.waiting.push_back(Placed { token, offset_chars: self.decoded_chars, offset_bytes: self.decoded_bytes, is_stop });
        if is_stop {
            return Piece::default();
        }
        let text = self.detokenizer.push(id);
        self.take_text(&text)
    }

    /// Ends the answer: what waited comes out, unless it holds a stop string after all.
    pub(super) fn finish(&mut self, reason: FinishReason) -> Piece {
        let text = self.detokenizer.finish();
        let mut piece = self.take_text(&text);
        if piece.finish.is_none() {
            piece.text.push_str(&self.stop.finish());
            piece.tokens.extend(self.waiting.drain(..));
            piece.finish = Some(reason);
        }
        piece
    }

    fn take_text(&mut self, text: &str) -> Piece {
        self.decoded_bytes += text.len();
        self.decoded_chars += text.chars().count();
        let outcome = self.stop.push(text);
        self.emitted_bytes += outcome.emit.len();
        let mut tokens = Vec::new();
        while let Some(placed) = self.waiting.pop_front_if(|placed| placed.offset_bytes < self.emitted_bytes) {
            tokens.push(placed);
        }
        let finish = outcome.matched.map(|_| FinishReason::Stop);
        Piece { text: outcome.emit, tokens, finish }
    }
}

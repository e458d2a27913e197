//! The answer of `/v1/completions`: text with the prompt before it when asked for, whole or in pieces.

use super::{choice::Piece, error::ApiError, generation::Generation, logprobs::LegacyLogprobs, prompt::Prompt, run::Progress};
use crate::{
    chat::{detokenize::Detokenizer, tokenizer::ChatTokenizer},
    serving::ServedModel,
};
use mlx_cluster_common::request::{FinishReason, TokenOut};
use serde_json::{Value, json};
use std::sync::Arc;

/// A prompt as it stands before its answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Echo {
    text: String,
    text_chars: usize,
    /// Where the text of each of the prompt's tokens begins.
    offsets_chars: Vec<usize>,
}

impl Echo {
    /// The text as it was sent, or that of the ids with special tokens visible.
    pub(super) fn of(prompt: &Prompt, tokenizer: &Arc<ChatTokenizer>) -> Result<Self, ApiError> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), false);
        // What the tokenizer puts before a text is not part of it.
        let added = prompt.text.as_ref().is_some_and(|text| starts_with_added_bos(text, &prompt.ids, tokenizer));
        let mut chars = 0;
        let mut offsets_chars = Vec::with_capacity(prompt.ids.len());
        for (i, &id) in prompt.ids.iter().enumerate() {
            offsets_chars.push(chars);
            let piece = detokenizer.push(id);
            if !(added && i == 0) {
                chars += piece.chars().count();
            }
        }
        let text = match &prompt.text {
            Some(text) => text.clone(),
            None => tokenizer.decode(&prompt.ids, false)?,
        };
        Ok(Self { text_chars: text.chars().count(), text, offsets_chars })
    }
}

fn starts_with_added_bos(text: &str, ids: &[u32], tokenizer: &ChatTokenizer) -> bool {
    let written = tokenizer.special_tokens().get("bos_token").is_some_and(|bos| text.starts_with(bos));
    ids.first().copied() == tokenizer.bos_id() && tokenizer.bos_id().is_some() && !written
}

/// All answers of a request, as far as they are there.
pub(super) struct CompletionAnswer {
    tokenizer: Arc<ChatTokenizer>,
    logprobs: bool,
    return_token_ids: bool,
    choices: Vec<One>,
}

struct One {
    prompt: Arc<Prompt>,
    echo: Option<Arc<Echo>>,
    /// Log-probabilities of the prompt's tokens, as they arrive.
    prompt_tokens: Vec<TokenOut>,
    /// The prompt was handed out, or is not wanted.
    begun: bool,
    whole: Part,
}

/// A piece of an answer, or all of it.
#[derive(Default)]
struct Part {
    text: String,
    logprobs: LegacyLogprobs,
    token_ids: Vec<u32>,
    finish: Option<FinishReason>,
    first: bool,
}

impl CompletionAnswer {
    /// `echoes` has an entry an answer.
    pub(super) fn new(
        model: &ServedModel,
        prompts: &[Arc<Prompt>],
        generation: &Generation,
        logprobs: bool,
        echoes: Vec<Option<Arc<Echo>>>,
    ) -> Self {
        let each = prompts.iter().flat_map(|prompt| (0..generation.n).map(move |_| prompt));
        let one = |(prompt, echo): (&Arc<Prompt>, Option<Arc<Echo>>)| One {
            prompt: Arc::clone(prompt),
            echo,
            prompt_tokens: Vec::new(),
            begun: false,
            whole: Part::default(),
        };
        Self {
            tokenizer: Arc::clone(&model.tokenizer),
            logprobs,
            return_token_ids: generation.return_token_ids,
            choices: each.zip(echoes).map(one).collect(),
        }
    }

    /// Keeps what happened for the whole answer.
    pub(super) fn absorb(&mut self, index: usize, progress: Progress) {
        let Some(part) = self.part(index, progress) else { return };
        let Some(one) = self.choices.get_mut(index) else { return };
        one.whole.text.push_str(&part.text);
        one.whole.logprobs.append(part.logprobs);
        one.whole.token_ids.extend(part.token_ids);
        one.whole.finish = part.finish.or(one.whole.finish);
    }

    /// The whole answers, as they stand in `choices`.
    pub(super) fn whole(mut self) -> Vec<Value> {
        let parts: Vec<Part> = self.choices.iter_mut().map(|one| Part { first: true, ..std::mem::take(&mut one.whole) }).collect();
        parts.into_iter().enumerate().map(|(index, part)| self.json(index, part)).collect()
    }

    /// What a stream sends of an event, as an entry of `choices`.
    pub(super) fn chunk(&mut self, index: usize, progress: Progress) -> Option<Value> {
        let part = self.part(index, progress)?;
        Some(self.json(index, part))
    }

    fn json(&self, index: usize, part: Part) -> Value {
        let finish = part.finish.map(finish_name);
        let logprobs = if self.logprobs { part.logprobs.into_json() } else { Value::Null };
        let mut choice = json!({"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": finish});
        if self.return_token_ids {
            choice["token_ids"] = json!(part.token_ids);
            if let (true, Some(one)) = (part.first, self.choices.get(index)) {
                choice["prompt_token_ids"] = json!(one.prompt.ids);
            }
        }
        choice
    }

    fn part(&mut self, index: usize, progress: Progress) -> Option<Part> {
        let logprobs = self.logprobs;
        let one = self.choices.get_mut(index)?;
        match progress {
            Progress::Prompt { start, tokens } => {
                // The first token has none, and may be left out.
                let unknown = |&id: &u32| TokenOut { id, logprob: None, top: Vec::new() };
                let missing = one.prompt.ids.iter().take(start as usize).skip(one.prompt_tokens.len());
                one.prompt_tokens.extend(missing.map(unknown));
                one.prompt_tokens.truncate(start as usize);
                one.prompt_tokens.extend(tokens);
                None
            }
            Progress::Piece(piece) => {
                let mut part = Part { first: !one.begun, ..Part::default() };
                if !std::mem::replace(&mut one.begun, true) {
                    one.begin(&mut part, logprobs, &self.tokenizer);
                }
                one.add(&mut part, piece, logprobs, &self.tokenizer);
                Some(part)
            }
        }
    }
}

impl One {
    /// The prompt comes before the first piece of the answer; its log-probabilities have all arrived by then.
    fn begin(&mut self, part: &mut Part, logprobs: bool, tokenizer: &ChatTokenizer) {
        let Some(echo) = &self.echo else { return };
        part.text.push_str(&echo.text);
        if logprobs {
            let known = std::mem::take(&mut self.prompt_tokens);
            for (i, (&id, &offset)) in self.prompt.ids.iter().zip(&echo.offsets_chars).enumerate() {
                let unknown = TokenOut { id, logprob: None, top: Vec::new() };
                part.logprobs.push(tokenizer, known.get(i).unwrap_or(&unknown), offset);
            }
        }
    }

    fn add(&self, part: &mut Part, piece: Piece, logprobs: bool, tokenizer: &ChatTokenizer) {
        let base = self.echo.as_ref().map_or(0, |echo| echo.text_chars);
        for placed in piece.tokens {
            if logprobs {
                part.logprobs.push(tokenizer, &placed.token, base + placed.offset_chars);
            }
            part.token_ids.push(placed.token.id);
        }
        part.text.push_str(&piece.text);
        part.finish = piece.finish;
    }
}

pub(super) fn finish_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

//! From text to token ids, away from the threads that serve connections, with a deadline and a look at the context.

use super::error::ApiError;
use crate::{
    chat::{template::TemplateError, tokenizer::TokenizerError},
    serving::ServedModel,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Semaphore, task::spawn_blocking, time::timeout};

/// Texts that are rendered or tokenised at the same time.
const TEXTS_AT_ONCE: usize = 4;
const TEXT_TIMEOUT: Duration = Duration::from_secs(20);

/// No vocabulary in use has longer tokens (128 spaces, in those made for code); a text with more bytes than the context has
/// tokens of this length is not worth tokenising.
const TOKEN_BYTES_MAX: usize = 128;

/// A prompt that fits the context, at least one token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// The text that the ids were made of; None when the client sent ids.
    pub(super) text: Option<String>,
}

impl Prompt {
    /// Checks the length. With `wants_answer` there must be room for at least one more token.
    pub(super) fn new(ids: Vec<u32>, text: Option<String>, model: &ServedModel, wants_answer: bool) -> Result<Self, ApiError> {
        let context_tokens = model.context_tokens;
        if ids.is_empty() {
            return Err(ApiError::Invalid { param: "prompt".into(), message: "it is empty; send at least one token".into() });
        }
        let room = if wants_answer { ids.len() < context_tokens as usize } else { ids.len() <= context_tokens as usize };
        if !room {
            let hint = if ids.len() == context_tokens as usize { ": no room is left for an answer" } else { "; send a shorter one" };
            return Err(ApiError::PromptTooLong { prompt_tokens: ids.len(), context_tokens, hint });
        }
        Ok(Self { ids, text })
    }

    /// Tokens that an answer may have, given what was asked for.
    pub(super) fn max_tokens(&self, asked: Option<u32>, model: &ServedModel) -> u32 {
        let room = model.context_tokens.saturating_sub(self.ids.len() as u32);
        asked.map_or(room, |asked| asked.min(room))
    }
}

/// Refuses what cannot fit before any work is spent on it.
pub(super) fn check_bytes(prompt_bytes: usize, model: &ServedModel) -> Result<(), ApiError> {
    let context_tokens = model.context_tokens;
    if prompt_bytes > TOKEN_BYTES_MAX.saturating_mul(context_tokens as usize) {
        return Err(ApiError::PromptFarTooLong { prompt_bytes, context_tokens });
    }
    Ok(())
}

/// Runs work on texts, so many at once.
#[derive(Debug, Clone)]
pub(super) struct TextWork(Arc<Semaphore>);

impl Default for TextWork {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TEXTS_AT_ONCE)))
    }
}

impl TextWork {
    pub(super) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
        let permits = Arc::clone(&self.0);
        let done = async move {
            let permit = permits.acquire_owned().await;
            // A text that overruns its deadline keeps its permit until its thread ends, so that such threads cannot pile up.
            let task = spawn_blocking(move || {
                let _permit = permit;
                work()
            });
            task.await.unwrap_or_else(|error| Err(ApiError::TextBroke { message: error.to_string() }))
        };
        timeout(TEXT_TIMEOUT, done).await.unwrap_or(Err(ApiError::TextTooSlow { seconds: TEXT_TIMEOUT.as_secs() }))
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        ApiError::TextBroke { message: error.to_string() }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        ApiError::Invalid { param: "messages".into(), message: format!("the model's chat template refuses them: {error}") }
    }
}

//! Answers on their way out: whole as one JSON object, or in pieces as server-sent events.

use super::{
    Api,
    chat_answer::ChatAnswer,
    completion_answer::CompletionAnswer,
    error::ApiError,
    generation::{Generation, Streamed},
    prompt::Prompt,
    run::{Progress, Run},
};
use crate::serving::ServedModel;
use axum::{
    Json,
    http::HeaderValue,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, stream::unfold};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// A comment is sent after so long without an event, since clients give up on silence.
const PING_INTERVAL: Duration = Duration::from_secs(8);

/// A stream's status is decided after so long: what is refused by then gets a status of its own, later errors are sent in the stream.
const FIRST_EVENT_WAIT: Duration = Duration::from_millis(500);

/// What all parts of an answer say.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    prompt_tokens: usize,
    stream: Option<Streamed>,
}

impl Meta {
    pub(super) fn new(prefix: &str, object: &'static str, model: &ServedModel, prompts: &[Arc<Prompt>], generation: &Generation) -> Self {
        let id = format!("{prefix}{}", uuid::Uuid::new_v4().simple());
        let prompt_tokens = prompts.iter().map(|prompt| prompt.ids.len()).sum();
        tracing::debug!(id, user = generation.user, prompts = prompts.len(), prompt_tokens, n = generation.n, "request accepted");
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs());
        Self { id, object, created, model: model.id.clone(), prompt_tokens, stream: generation.stream }
    }

    fn object(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    fn usage(&self, generated_tokens: u64) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated_tokens,
            "total_tokens": self.prompt_tokens as u64 + generated_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        })
    }
}

pub(super) enum Answer {
    Chat(ChatAnswer),
    Completion(CompletionAnswer),
}

impl Answer {
    fn absorb(&mut self, index: usize, progress: Progress) {
        match self {
            Answer::Chat(answer) => answer.absorb(index, progress),
            Answer::Completion(answer) => answer.absorb(index, progress),
        }
    }

    fn chunk(&mut self, index: usize, progress: Progress) -> Option<Value> {
        match self {
            Answer::Chat(answer) => answer.chunk(index, progress),
            Answer::Completion(answer) => answer.chunk(index, progress),
        }
    }

    /// Whether an answer is complete although its model would go on.
    fn is_done(&self, index: usize) -> bool {
        match self {
            Answer::Chat(answer) => answer.is_done(index),
            Answer::Completion(_) => false,
        }
    }
}

/// Answers in the way that was asked for.
pub(super) async fn respond(api: &Api, run: Run, meta: Meta, answer: Answer) -> Result<Response, ApiError> {
    match meta.stream {
        None => whole(api, run, meta, answer).await.map(|body| Json(body).into_response()),
        Some(streamed) => stream(api, run, meta, answer, streamed).await,
    }
}

async fn whole(api: &Api, mut run: Run, meta: Meta, mut answer: Answer) -> Result<Value, ApiError> {
    loop {
        let next = tokio::select! {
            next = run.next() => next,
            () = api.cut.cancelled() => Some(Err(ApiError::Stopping)),
        };
        let Some(progress) = next else { break };
        let (index, progress) = progress?;
        answer.absorb(index, progress);
        if answer.is_done(index) {
            run.cancel(index);
        }
    }
    let usage = meta.usage(run.generated_tokens());
    let mut body = match answer {
        Answer::Chat(answer) => {
            let prompt_token_ids = answer.prompt_token_ids();
            let mut body = meta.object(meta.object, answer.whole());
            if let Some(ids) = prompt_token_ids {
                body["prompt_token_ids"] = ids;
            }
            body
        }
        Answer::Completion(answer) => meta.object(meta.object, answer.whole()),
    };
    body["usage"] = usage;
    Ok(body)
}

async fn stream(api: &Api, mut run: Run, meta: Meta, answer: Answer, streamed: Streamed) -> Result<Response, ApiError> {
    let first = timeout(FIRST_EVENT_WAIT, run.next()).await;
    let mut pieces = Pieces { run, answer, meta, streamed, queue: VecDeque::new(), ended: false, cut: api.cut.clone() };
    pieces.open();
    match first {
        Ok(Some(Err(error))) => return Err(error),
        Ok(next) => pieces.take(next),
        Err(_) => {}
    }
    Ok(sse(pieces.into_events()))
}

/// A stream of events, with pings in its silences.
pub(super) fn sse(events: impl Stream<Item = Result<Event, Infallible>> + Send + 'static) -> Response {
    let pings = KeepAlive::new().interval(PING_INTERVAL).text("ping");
    let mut response = Sse::new(events).keep_alive(pings).into_response();
    // Proxies in front of us shall not collect events either.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The events of one streamed answer.
struct Pieces {
    run: Run,
    answer: Answer,
    meta: Meta,
    streamed: Streamed,
    queue: VecDeque<String>,
    ended: bool,
    cut: CancellationToken,
}

impl Pieces {
    fn into_events(self) -> impl Stream<Item = Result<Event, Infallible>> + Send {
        unfold(self, |mut pieces| async move {
            loop {
                if let Some(data) = pieces.queue.pop_front() {
                    return Some((Ok(Event::default().data(data)), pieces));
                }
                if pieces.ended {
                    return None;
                }
                let next = tokio::select! {
                    next = pieces.run.next() => next,
                    () = pieces.cut.cancelled() => Some(Err(ApiError::Stopping)),
                };
                pieces.take(next);
            }
        })
    }

    /// What a chat begins with.
    fn open(&mut self) {
        let Answer::Chat(answer) = &self.answer else { return };
        let mut prompt_token_ids = answer.prompt_token_ids();
        for choice in answer.opening() {
            let mut chunk = self.chunk(vec![choice]);
            if let Some(ids) = prompt_token_ids.take() {
                chunk["prompt_token_ids"] = ids;
            }
            self.queue.push_back(chunk.to_string());
        }
    }

    fn take(&mut self, next: Option<Result<(usize, Progress), ApiError>>) {
        match next {
            Some(Ok((index, progress))) => {
                if let Some(choice) = self.answer.chunk(index, progress) {
                    self.queue.push_back(self.chunk(vec![choice]).to_string());
                }
                if self.answer.is_done(index) {
                    self.run.cancel(index);
                }
            }
            Some(Err(error)) => {
                self.queue.push_back(error.body().to_string());
                self.ended = true;
            }
            None => {
                if self.streamed.include_usage {
                    let mut chunk = self.chunk(Vec::new());
                    chunk["usage"] = self.meta.usage(self.run.generated_tokens());
                    self.queue.push_back(chunk.to_string());
                }
                self.queue.push_back("[DONE]".into());
                self.ended = true;
            }
        }
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let object = match self.answer {
            Answer::Chat(_) => "chat.completion.chunk",
            Answer::Completion(_) => self.meta.object,
        };
        let mut chunk = self.meta.object(object, choices);
        if self.streamed.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

//! A small client of a coordinator's HTTP API: status, and answers as they are streamed.

pub(crate) mod jobs;

use crate::failure::{Exit, Failure};
use anyhow::Context;
use futures_util::StreamExt;
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest silence inside an answer: a long prompt may take minutes before its first token.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(600);
/// A coordinator never sends a longer line.
const LINE_BYTES_MAX: usize = 4 << 20;

/// Speaks to one coordinator.
#[derive(Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
}

/// A piece of an answer.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece {
    Text(String),
    Thinking(String),
    Finished(String),
    Usage(Usage),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
}

/// What to ask: a conversation, or text to be continued as it is.
pub(crate) enum Question {
    Chat(Vec<Value>),
    Raw(String),
}

impl Client {
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(SILENCE_TIMEOUT).no_proxy().build()?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned() })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// `GET /v1/cluster`.
    pub(crate) async fn cluster(&self) -> anyhow::Result<Value> {
        let request = self.http.get(format!("{}/v1/cluster", self.url)).timeout(STATUS_TIMEOUT);
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(Failure::new(Exit::Network, format!("{} answers, but is no coordinator of mlx-cluster", self.url)).into());
        }
        response.error_for_status()?.json().await.with_context(|| format!("{} does not answer like a coordinator", self.url))
    }

    /// Posts a request whose answer comes whole.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let request = self.http.post(format!("{}/{path}", self.url)).json(body);
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if !response.status().is_success() {
            return Err(refusal(response).await.into());
        }
        response.json().await.with_context(|| format!("the answer from {} broke off", self.url))
    }

    /// Asks, and hands each piece of the answer to `each` as it comes.
    pub(crate) async fn ask(
        &self,
        question: Question,
        options: &Value,
        mut each: impl FnMut(Piece) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (path, mut body) = match question {
            Question::Chat(messages) => ("chat/completions", json!({"messages": messages})),
            Question::Raw(prompt) => ("completions", json!({"prompt": prompt})),
        };
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        for (key, value) in options.as_object().into_iter().flatten() {
            body[key] = value.clone();
        }
        let request = self.http.post(format!("{}/v1/{path}", self.url)).json(&body);
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if !response.status().is_success() {
            return Err(refusal(response).await.into());
        }
        self.read_events(response, &mut each).await
    }

    async fn read_events(&self, response: Response, each: &mut impl FnMut(Piece) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut chunks = response.bytes_stream();
        let mut lines = Lines::default();
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.with_context(|| format!("the answer from {} broke off", self.url))?;
            for line in lines.push(&chunk)? {
                let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
                if data == "[DONE]" {
                    return Ok(());
                }
                let event: Value = serde_json::from_str(data).context("the coordinator sent an event that is not JSON")?;
                if let Some(message) = event.pointer("/error/message").and_then(Value::as_str) {
                    return Err(Failure::new(Exit::Other, message).into());
                }
                pieces(&event).into_iter().try_for_each(&mut *each)?;
            }
        }
        Err(Failure::new(Exit::Network, format!("the answer from {} ended before it was complete", self.url)).into())
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Failure::new(Exit::Network, format!("no coordinator answers at {} ({cause})", self.url))
    }
}

/// The sentence of an error answer.
async fn refusal(response: Response) -> Failure {
    let status = response.status();
    let text = response.text().await.unwrap_or_default();
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    let message = match body.pointer("/error/message").and_then(Value::as_str) {
        Some(message) => message.to_owned(),
        None => format!("the coordinator answers {status}: {}", text.chars().take(200).collect::<String>()),
    };
    let exit = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Exit::Access,
        status if status.is_client_error() => Exit::Usage,
        _ => Exit::Other,
    };
    Failure::new(exit, message)
}

/// What one event of a stream carries, of either kind of completion.
fn pieces(event: &Value) -> Vec<Piece> {
    let mut found = Vec::new();
    let text = |path: &str| event.pointer(path).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    found.extend(text("/choices/0/delta/reasoning_content").map(Piece::Thinking));
    found.extend(text("/choices/0/delta/content").or_else(|| text("/choices/0/text")).map(Piece::Text));
    found.extend(text("/choices/0/finish_reason").map(Piece::Finished));
    if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
        let count = |key: &str| usage.get(key).and_then(Value::as_u64).unwrap_or(0);
        found.push(Piece::Usage(Usage { prompt_tokens: count("prompt_tokens"), completion_tokens: count("completion_tokens") }));
    }
    found
}

/// Cuts a byte stream into lines, wherever its chunks begin and end.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, chunk: &[u8]) -> anyhow::Result<Vec<String>> {
        self.rest.extend_from_slice(chunk);
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            anyhow::ensure!(self.rest.len() <= LINE_BYTES_MAX, "the coordinator sent a line of more than {LINE_BYTES_MAX} bytes");
            return Ok(Vec::new());
        };
        let rest = self.rest.split_off(end + 1);
        let complete = std::mem::replace(&mut self.rest, rest);
        Ok(String::from_utf8_lossy(&complete).lines().map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_wherever_the_chunks_end() {
        let text = "data: {\"a\":\"é\"}\n\ndata: [DONE]\n";
        for size in 1..text.len() {
            let mut lines = Lines::default();
            let got: Vec<String> = text.as_bytes().chunks(size).flat_map(|chunk| lines.push(chunk).expect("short")).collect();
            assert_eq!(got, ["data: {\"a\":\"é\"}", "", "data: [DONE]"], "chunks of {size}");
        }
    }

    #[test]
    fn events_of_both_kinds_are_read() {
        let chat = json!({"choices": [{"delta": {"content": "4", "reasoning_content": "2+2"}, "finish_reason": "stop"}], "usage": null});
        assert_eq!(pieces(&chat), [Piece::Thinking("2+2".into()), Piece::Text("4".into()), Piece::Finished("stop".into())]);
        let raw = json!({"choices": [{"text": "4", "finish_reason": null}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}});
        assert_eq!(pieces(&raw), [Piece::Text("4".into()), Piece::Usage(Usage { prompt_tokens: 3, completion_tokens: 1 })]);
    }
}

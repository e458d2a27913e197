//! A scripted cluster with a byte-level tokenizer, and a client for it.

use super::super::{Api, guard::Guard, router};
use crate::{
    adapters::ServeAdapterError,
    chat::{template::ChatTemplate, tokenizer::ChatTokenizer},
    core::adapters::AdapterFacts,
    loading::{LoadError, LoadRequest},
    serving::{
        AdapterState, AdapterStatus, Admitted, ClusterStatus, InstanceState, RequestEvent, RequestFailure, ServedModel, Serving,
        ServingCommand,
    },
    training::{
        fixtures::summing,
        jobs::{JobParts, Jobs, JobsTask},
    },
};
use axum::{Router, body::Body, http::Request, response::Response};
use mlx_cluster_common::{
    ids::AdapterId,
    request::{EngineLoad, FinishReason, TokenOut},
    sampling::SamplingParams,
    spec::Part,
};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex},
};
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;

pub(super) const EOS: u32 = 256;
pub(super) const BOS: u32 = 257;
pub(super) const VOCAB: u32 = 300;
pub(super) const CONTEXT: u32 = 200;

const TEMPLATE: &str = "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<tool_call><|end|>{% endif %}\
{% for m in messages %}{% if m.role == 'user' and 'forbidden' in m.content %}{{ raise_exception('not that word') }}{% endif %}\
<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}<|end|>{% endfor %}\
<|assistant|>{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}";

static TOKENIZER: LazyLock<Arc<ChatTokenizer>> = LazyLock::new(|| Arc::new(tokenizer()));

/// Ids 0-255 are bytes in the order of GPT-2's alphabet, then special tokens; from 262 on nothing, as in padded embeddings.
fn tokenizer() -> ChatTokenizer {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let shifted = (0..256).filter(|byte| !printable(*byte)).enumerate().map(|(i, _)| 0x100 + i as u32);
    let alphabet = (0..256).filter(|byte| printable(*byte)).chain(shifted).filter_map(char::from_u32);
    let vocab: serde_json::Map<String, Value> = alphabet.enumerate().map(|(id, char)| (char.to_string(), json!(id))).collect();
    let specials = ["<|eos|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"];
    let added = |(i, text): (usize, &&str)| {
        let id = 256 + i;
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    };
    let file = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": specials.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    });
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("tokenizer.json"), file.to_string()).expect("written");
    std::fs::write(folder.path().join("config.json"), json!({"eos_token_id": EOS}).to_string()).expect("written");
    let config = json!({"eos_token": "<|eos|>", "bos_token": "<|bos|>"});
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).expect("written");
    ChatTokenizer::load(folder.path()).expect("a good tokenizer")
}

pub(super) fn ids(text: &str) -> Vec<u32> {
    TOKENIZER.encode(text, false).expect("encoded")
}

/// What the cluster does with a request.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A token a byte.
    Say(&'static str),
    Token(u32),
    Finish(FinishReason),
    Fail(RequestFailure),
    /// Nothing more, until the request is cancelled.
    Hang,
}

/// What the cluster was asked, and which requests were cancelled, by their place in the order.
#[derive(Debug)]
pub(super) enum Seen {
    Request(Admitted),
    Cancelled(usize),
    Load(LoadRequest),
    Adapter(String, PathBuf),
}

pub(super) struct Fake {
    pub(super) serving: Serving,
    pub(super) status: watch::Sender<Arc<ClusterStatus>>,
    pub(super) model: watch::Sender<Option<Arc<ServedModel>>>,
    pub(super) jobs: Jobs,
    /// Of the jobs; they train nothing, and wait to be stopped at iteration 6.
    pub(super) home: TempDir,
    _jobs_task: JobsTask,
    seen: Mutex<mpsc::UnboundedReceiver<Seen>>,
}

impl Fake {
    /// Every request goes through `script`, given its place in the order.
    pub(super) fn new(script: impl Fn(usize) -> Vec<Step> + Send + 'static) -> Self {
        let (commands, mut receiver) = mpsc::channel(16);
        let (report, seen) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut count = 0;
            while let Some(command) = receiver.recv().await {
                let (request, events) = match command {
                    ServingCommand::Submit { request, events } => (request, events),
                    ServingCommand::Load { request, answer } => {
                        let _ = answer.send(match request.model.as_str() {
                            "org/new" => Ok("org/new".into()),
                            _ => Err(LoadError::ServedAlready { model: "org/tiny".into() }),
                        });
                        let _ = report.send(Seen::Load(request));
                        continue;
                    }
                    ServingCommand::Unload { answer } => {
                        let _ = answer.send(Err(LoadError::NothingServed));
                        continue;
                    }
                    ServingCommand::LoadAdapter { name, path, answer } => {
                        let _ = answer.send(match name.as_str() {
                            "poems" => Ok(poems().facts),
                            _ => Err(ServeAdapterError::TooMany),
                        });
                        let _ = report.send(Seen::Adapter(name, path));
                        continue;
                    }
                    ServingCommand::DropAdapter { name, answer } => {
                        let there = "there are `poems`".to_owned();
                        let _ =
                            answer.send(if name == "poems" { Ok(poems().facts) } else { Err(ServeAdapterError::NotThere { name, there }) });
                        continue;
                    }
                    _ => continue,
                };
                let (steps, prompt, params) = (script(count), request.prompt.clone(), request.params.clone());
                let _ = report.send(Seen::Request(request));
                let (report, number) = (report.clone(), count);
                tokio::spawn(async move {
                    if play(steps, &prompt, &params, &events).await.is_none() {
                        let _ = report.send(Seen::Cancelled(number));
                    }
                });
                count += 1;
            }
        });
        let (status, status_receiver) = watch::channel(Arc::new(ready()));
        let (model, model_receiver) = watch::channel(Some(Arc::new(served(Some(TEMPLATE)))));
        let serving = Serving { commands, status: status_receiver, model: model_receiver };
        let home = tempfile::tempdir().expect("a folder");
        let parts = JobParts { home: home.path().into(), runner: Box::new(summing(6)), commands: serving.commands.clone() };
        let (jobs, jobs_task) = Jobs::open(parts).expect("a folder of jobs");
        Self { serving, status, model, jobs, home, _jobs_task: jobs_task, seen: Mutex::new(seen) }
    }

    /// A cluster that says this to every request.
    pub(super) fn saying(text: &'static str, reason: FinishReason) -> Self {
        Self::new(move |_| match reason {
            FinishReason::Stop => vec![Step::Say(text), Step::Token(EOS), Step::Finish(reason)],
            FinishReason::Length => vec![Step::Say(text), Step::Finish(reason)],
        })
    }

    pub(super) fn router(&self) -> Router {
        router(Arc::new(Api::new(self.serving.clone(), self.jobs.clone(), Guard { loopback: true }).expect("an API")))
    }

    pub(super) async fn seen(&self) -> Seen {
        let mut seen = std::mem::replace(&mut *self.seen.lock().expect("unpoisoned"), mpsc::unbounded_channel().1);
        let next = seen.recv().await.expect("the cluster lives");
        *self.seen.lock().expect("unpoisoned") = seen;
        next
    }

    /// The next request that the cluster was given.
    pub(super) async fn asked(&self) -> Admitted {
        loop {
            if let Seen::Request(request) = self.seen().await {
                return request;
            }
        }
    }

    /// The place of the next request that was cancelled.
    pub(super) async fn cancelled(&self) -> usize {
        loop {
            if let Seen::Cancelled(number) = self.seen().await {
                return number;
            }
        }
    }

    pub(super) async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, text) = self.post_text(path, body).await;
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}")))
    }

    /// An answer that must succeed.
    pub(super) async fn ok(&self, path: &str, body: Value) -> Value {
        let (status, body) = self.post(path, body).await;
        assert_eq!(status, 200, "{body}");
        body
    }

    pub(super) async fn post_text(&self, path: &str, body: Value) -> (u16, String) {
        let request = request("POST", path).header("content-type", "application/json").body(Body::from(body.to_string()));
        text_of(send(self.router(), request.expect("a request")).await).await
    }

    pub(super) async fn get(&self, path: &str) -> (u16, String) {
        text_of(send(self.router(), request("GET", path).body(Body::empty()).expect("a request")).await).await
    }
}

/// None when the client went away.
async fn play(steps: Vec<Step>, prompt: &[u32], params: &SamplingParams, events: &mpsc::Sender<RequestEvent>) -> Option<()> {
    if let Some(top) = params.prompt_logprobs {
        let tokens = prompt.iter().enumerate().map(|(i, &id)| token(id, (i > 0).then_some(top)));
        events.send(RequestEvent::Prompt { start: 0, tokens: tokens.collect() }).await.ok()?;
    }
    for step in steps {
        match step {
            Step::Say(text) => {
                for id in ids(text) {
                    events.send(RequestEvent::Token(token(id, params.logprobs))).await.ok()?;
                }
            }
            Step::Token(id) => events.send(RequestEvent::Token(token(id, params.logprobs))).await.ok()?,
            Step::Finish(reason) => events.send(RequestEvent::Finished(reason)).await.ok()?,
            Step::Fail(failure) => events.send(RequestEvent::Failed(failure)).await.ok()?,
            Step::Hang => {
                events.closed().await;
                return None;
            }
        }
    }
    Some(())
}

/// Its log-probability is -0.5, and the ids after it are the alternatives.
fn token(id: u32, top: Option<u32>) -> TokenOut {
    let alternatives = (0..top.unwrap_or(0)).map(|i| (id + i, -0.5 - i as f32)).collect();
    TokenOut { id, logprob: top.map(|_| -0.5), top: alternatives }
}

pub(super) fn served(template: Option<&str>) -> ServedModel {
    ServedModel {
        adapter: None,
        id: "org/tiny".into(),
        vocab_size: VOCAB,
        context_tokens: CONTEXT,
        tokenizer: Arc::clone(&TOKENIZER),
        template: template.map(|source| ChatTemplate::new(source).expect("a good template")),
        created: 7,
    }
}

/// An adapter that is there.
pub(super) fn poems() -> AdapterStatus {
    let facts = AdapterFacts {
        name: "poems".into(),
        path: "/runs/poems/adapters.safetensors".into(),
        rank: 8,
        is_dora: false,
        modules: 14,
        bytes: [(Part::Layer(0), 1000), (Part::Layer(1), 24)].into(),
    };
    AdapterStatus { id: AdapterId(3), facts: Arc::new(facts), state: AdapterState::Ready }
}

pub(super) fn ready() -> ClusterStatus {
    ClusterStatus {
        adapters: Vec::new(),
        links: Vec::new(),
        cluster: "home".into(),
        instance: InstanceState::Ready,
        plan: None,
        jobs: Vec::new(),
        workers: Vec::new(),
        load: EngineLoad { running: 2, waiting: 1, cache_tokens_used: 25, cache_tokens_max: 100, ..Default::default() },
        join_addresses: vec!["10.0.0.1:7000".into()],
    }
}

pub(super) fn request(method: &str, path: &str) -> axum::http::request::Builder {
    Request::builder().method(method).uri(path).header("host", "localhost:8080")
}

pub(super) async fn send(router: Router, request: Request<Body>) -> Response {
    router.oneshot(request).await.expect("infallible")
}

pub(super) async fn text_of(response: Response) -> (u16, String) {
    let status = response.status().as_u16();
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a whole body");
    (status, String::from_utf8(bytes.into()).expect("text"))
}

/// Without what differs from run to run: ids and times.
pub(super) fn golden(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((at, mark)) = ["cmpl-", "call_", "\"created\":"].iter().filter_map(|mark| Some((rest.find(mark)?, *mark))).min() {
        let (before, after) = rest.split_at(at + mark.len());
        out.push_str(before);
        rest = after.trim_start_matches(|char: char| char.is_ascii_hexdigit());
        out.push('0');
    }
    out + rest
}

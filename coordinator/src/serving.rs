//! The seam between the HTTP API and the cluster: requests go in, tokens come out, the state can be watched.

use crate::chat::{template::ChatTemplate, tokenizer::ChatTokenizer};
use mlx_cluster_common::{
    engine::{EngineState, NodeFacts},
    links::LinkFacts,
    plan::Plan,
    request::{EngineLoad, FinishReason, TokenOut},
    sampling::SamplingParams,
};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};

/// Events that wait for a client that reads slowly; a request whose client falls further behind is cancelled.
pub const EVENTS_BUFFERED_MAX: usize = 1024;

/// What is being served, loaded once.
pub struct ServedModel {
    /// The name under which clients ask for it: the repository's id or the folder's name.
    pub id: String,
    pub vocab_size: u32,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: u32,
    pub tokenizer: Arc<ChatTokenizer>,
    /// None when the model has no chat template.
    pub template: Option<ChatTemplate>,
    /// Unix seconds.
    pub created: u64,
}

/// What the cluster is doing with the model.
#[derive(Debug, Clone, PartialEq)]
pub enum InstanceState {
    /// Started without a model.
    Idle,
    WaitingForWorkers {
        found: usize,
        wanted: usize,
    },
    Loading,
    Ready,
    /// An engine or a worker is gone; it comes back by itself.
    Recovering {
        cause: String,
    },
    /// Nothing will change without the user: it does not fit, a file is broken.
    Failed {
        message: String,
    },
    Draining,
}

impl InstanceState {
    pub fn name(&self) -> &'static str {
        match self {
            InstanceState::Idle => "idle",
            InstanceState::WaitingForWorkers { .. } => "waiting_for_workers",
            InstanceState::Loading => "loading",
            InstanceState::Ready => "ready",
            InstanceState::Recovering { .. } => "recovering",
            InstanceState::Failed { .. } => "failed",
            InstanceState::Draining => "draining",
        }
    }
}

/// Everything that `status`, `/health` and `/metrics` show.
#[derive(Debug, Clone)]
pub struct ClusterStatus {
    pub cluster: String,
    pub instance: InstanceState,
    pub plan: Option<Plan>,
    pub workers: Vec<WorkerStatus>,
    /// What was measured between the workers.
    pub links: Vec<LinkFacts>,
    pub load: EngineLoad,
    /// host:port that a `worker --join` can use.
    pub join_addresses: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct WorkerStatus {
    pub facts: NodeFacts,
    pub connected: bool,
    /// The engine of the current plan on this worker.
    pub engine: Option<EngineState>,
}

/// A request that passed all checks: its prompt fits, its parameters are in range.
#[derive(Debug)]
pub struct Admitted {
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
}

/// What happens to a request, in order; the last one is `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum RequestEvent {
    Prompt { start: u32, tokens: Vec<TokenOut> },
    Token(TokenOut),
    Finished(FinishReason),
    Failed(RequestFailure),
}

/// Why a request ended without an answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestFailure {
    #[error("the model is not ready: {state}")]
    NotReady { state: String },
    #[error("{waiting} requests wait already; try again later")]
    Overloaded { waiting: usize },
    #[error("{message}")]
    Refused { message: String },
    /// An engine or worker broke while it worked on the request.
    #[error("worker {worker} failed while it worked on this request: {message}; the model comes back by itself, send the request again")]
    Broken { worker: String, message: String },
}

pub enum ServingCommand {
    /// Start a request; its events go to `events`, and dropping the receiver cancels it.
    Submit { request: Admitted, events: mpsc::Sender<RequestEvent> },
    /// Stop taking requests, finish those that run, then stop all engines.
    Drain { done: oneshot::Sender<()> },
}

/// What the API holds of the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Serving {
    pub commands: mpsc::Sender<ServingCommand>,
    pub status: watch::Receiver<Arc<ClusterStatus>>,
    /// Set once the model's files are read; None before, and when there is no model.
    pub model: watch::Receiver<Option<Arc<ServedModel>>>,
}

impl Serving {
    /// Hands a request over. Its events arrive on the receiver; dropping that cancels the request in the engines.
    pub async fn submit(&self, request: Admitted) -> Result<mpsc::Receiver<RequestEvent>, RequestFailure> {
        let (events, receiver) = mpsc::channel(EVENTS_BUFFERED_MAX);
        let stopped = |_| RequestFailure::NotReady { state: "the coordinator is stopping".into() };
        self.commands.send(ServingCommand::Submit { request, events }).await.map_err(stopped)?;
        Ok(receiver)
    }
}

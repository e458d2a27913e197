//! The seam between the HTTP API and the cluster: requests go in, tokens come out, the state can be watched.

use crate::{
    adapters::{AdapterAnswer, ServeAdapterError},
    chat::{template::ChatTemplate, tokenizer::ChatTokenizer},
    core::{
        adapters::AdapterFacts,
        event::{ClusterFailure, EngineAt},
        settings::{InstanceSettings, TrainingFacts},
    },
    loading::{LoadAnswer, LoadError, LoadRequest},
};
use mlx_cluster_common::{
    engine::{EngineState, NodeFacts},
    ids::{AdapterId, Epoch, InstanceId},
    links::LinkFacts,
    plan::Plan,
    request::{EngineLoad, FinishReason, TokenOut},
    sampling::SamplingParams,
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot, watch};

/// Events that wait for a client that reads slowly; a request whose client falls further behind is cancelled.
pub const EVENTS_BUFFERED_MAX: usize = 1024;

/// What is being served, loaded once.
#[derive(Clone)]
pub struct ServedModel {
    /// The name under which clients ask for it: the repository's id or the folder's name.
    pub id: String,
    /// Beside which its requests run; None for the model itself.
    pub adapter: Option<AdapterId>,
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
    /// Its engines are being taken away.
    Unloading,
    /// The coordinator is stopping.
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
            InstanceState::Unloading => "unloading",
            InstanceState::Draining => "draining",
        }
    }
}

/// Everything that `status`, `/health` and `/metrics` show.
#[derive(Debug, Clone)]
pub struct ClusterStatus {
    pub cluster: String,
    /// Of the served model.
    pub instance: InstanceState,
    /// Of the served model.
    pub plan: Option<Plan>,
    /// Of the served model.
    pub adapters: Vec<AdapterStatus>,
    pub jobs: Vec<JobStatus>,
    pub workers: Vec<WorkerStatus>,
    /// What was measured between the workers.
    pub links: Vec<LinkFacts>,
    pub load: EngineLoad,
    /// host:port that a `worker --join` can use.
    pub join_addresses: Vec<String>,
}

/// An adapter of the served model.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterStatus {
    pub id: AdapterId,
    pub facts: Arc<AdapterFacts>,
    pub state: AdapterState,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdapterState {
    Loading,
    Ready,
    Failed {
        message: String,
    },
    /// Taken away from new requests, while some still have it.
    Leaving,
}

impl AdapterState {
    pub fn name(&self) -> &'static str {
        match self {
            AdapterState::Loading => "loading",
            AdapterState::Ready => "ready",
            AdapterState::Failed { .. } => "failed",
            AdapterState::Leaving => "leaving",
        }
    }
}

#[derive(Debug, Clone)]
pub struct WorkerStatus {
    pub facts: NodeFacts,
    pub connected: bool,
    /// Those of current plans.
    pub engines: Vec<EngineOn>,
}

impl WorkerStatus {
    /// The engine of the served model.
    pub fn served_engine(&self) -> Option<&EngineState> {
        self.engines.iter().find(|engine| engine.instance == InstanceId::SERVED).map(|engine| &engine.state)
    }
}

/// An engine on a worker, and what it is for.
#[derive(Debug, Clone)]
pub struct EngineOn {
    pub instance: InstanceId,
    pub state: EngineState,
}

/// The engines of a training job.
#[derive(Debug, Clone)]
pub struct JobStatus {
    pub instance: InstanceId,
    /// The model's name.
    pub model: String,
    pub state: InstanceState,
    pub plan: Option<Plan>,
}

/// A request that passed all checks: its prompt fits, its parameters are in range.
#[derive(Debug)]
pub struct Admitted {
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    /// None for the model itself.
    pub adapter: Option<AdapterId>,
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
    /// Read a model and serve it.
    Load { request: LoadRequest, answer: LoadAnswer },
    /// Take the served model's engines away; answered with its name once they are gone.
    Unload { answer: LoadAnswer },
    /// Put an adapter beside the served model.
    LoadAdapter { name: String, path: PathBuf, answer: AdapterAnswer },
    /// Let no new request have an adapter, and take it away once none has it.
    DropAdapter { name: String, answer: AdapterAnswer },
    /// Plan a job's engines and keep them alive. Dropping the receiver of `notes`, or not reading it, stops them.
    StartJob { instance: InstanceId, facts: Arc<TrainingFacts>, settings: InstanceSettings, notes: mpsc::Sender<RunnerNote> },
    /// A job's runner is in trouble with the engines of this epoch; `node` is who is blamed (by id or by name), if anybody.
    Broken { instance: InstanceId, epoch: Epoch, node: Option<String>, message: String },
    /// A job's runner has kept what it has: plan the engines of this epoch anew.
    PlanAgain { instance: InstanceId, epoch: Epoch },
    /// Take a job's engines away; its runner is told when they are gone.
    StopJob { instance: InstanceId },
}

/// Notes that wait for a runner that is busy. Few come, and it has to act on each: one that falls further behind is given up.
pub const NOTES_BUFFERED_MAX: usize = 64;

/// What becomes of a job's engines, for its runner, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum RunnerNote {
    /// Where its engines will be.
    Planned(Plan),
    /// All engines are linked in this epoch. One `Broken` with it, or `Ended`, follows.
    Ready { epoch: Epoch, engines: Vec<EngineAt> },
    /// What was under way in this epoch is lost, without a cause when `PlanAgain` asked for it. Another `Ready` follows, or `Ended`.
    Broken { epoch: Epoch, cause: Option<String> },
    /// These workers, or as many, were lost before and could be had again with `PlanAgain`.
    CouldGrow { epoch: Epoch, workers: Vec<String> },
    /// The coordinator stops: save what is to be kept, then send `StopJob`. After this time the engines are taken away all the same.
    Drain { within: Duration },
    /// Its engines are gone: as asked for, or because there is no use in going on. The last note.
    Ended { failure: Option<ClusterFailure> },
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

    /// Reads a model and has it planned; its name. None when the coordinator is stopping.
    pub async fn load(&self, request: LoadRequest) -> Option<Result<String, LoadError>> {
        self.ask(|answer| ServingCommand::Load { request, answer }).await
    }

    /// Takes the served model away; its name. None when the coordinator is stopping.
    pub async fn unload(&self) -> Option<Result<String, LoadError>> {
        self.ask(|answer| ServingCommand::Unload { answer }).await
    }

    /// Puts an adapter beside the served model, answered once it can be asked for. None when the coordinator is stopping.
    pub async fn load_adapter(&self, name: String, path: PathBuf) -> Option<Result<Arc<AdapterFacts>, ServeAdapterError>> {
        self.ask(|answer| ServingCommand::LoadAdapter { name, path, answer }).await
    }

    /// Takes an adapter away, answered once no new request can have it. None when the coordinator is stopping.
    pub async fn drop_adapter(&self, name: String) -> Option<Result<Arc<AdapterFacts>, ServeAdapterError>> {
        self.ask(|answer| ServingCommand::DropAdapter { name, answer }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> ServingCommand) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.ok()?;
        answered.await.ok()
    }
}

//! What the coordinator's core is told, what it asks for, and how it can end.

use super::{
    adapters::{AdapterFacts, AdapterFailure, AdapterOutcome},
    placement::WhyNot,
    settings::{InstanceSettings, Kind},
};
use crate::serving::{Admitted, RequestEvent};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineStatus, Link, NodeFacts, Peer},
    ids::{AdapterId, Epoch, InstanceId, NodeId, SequenceId},
    links::LinkFacts,
    plan::Plan,
    request::{Delivery, SessionCommand},
    units::Bytes,
};
use std::{ops::Range, sync::Arc, time::Duration};

/// What a worker says is the case.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The version of the wanted state that this is about.
    pub version: u64,
    pub engines: Vec<EngineStatus>,
    /// What it measured to its neighbours.
    pub links: Vec<LinkFacts>,
}

#[derive(Debug)]
pub enum Event {
    /// A worker's stream stands and it sent its first snapshot. `reached` is the address under which it answered.
    WorkerUp {
        facts: Box<NodeFacts>,
        reached: String,
        snapshot: Snapshot,
    },
    /// `addresses` are where it is now.
    WorkerObserved {
        node: NodeId,
        addresses: Vec<String>,
        snapshot: Snapshot,
    },
    /// Its stream is gone.
    WorkerDown {
        node: NodeId,
        cause: String,
    },
    Linked {
        instance: InstanceId,
        epoch: Epoch,
        engine: u32,
        result: Result<(), String>,
    },
    /// With the lead of the served model.
    SessionOpened {
        epoch: Epoch,
    },
    /// The session with the lead ended, or a job's runner is in trouble with its engines; `node` is who is blamed (by id or by name), if anybody.
    SessionBroken {
        instance: InstanceId,
        epoch: Epoch,
        node: Option<String>,
        message: String,
    },
    Delivered {
        epoch: Epoch,
        delivery: Delivery,
    },
    /// Have an adapter of the served model on all its engines. A number is never used again.
    LoadAdapter {
        adapter: AdapterId,
        facts: Arc<AdapterFacts>,
        /// By the user, at the start.
        is_given: bool,
    },
    DropAdapter {
        adapter: AdapterId,
    },
    AdapterLoaded {
        epoch: Epoch,
        engine: u32,
        adapter: AdapterId,
        result: Result<(), AdapterFailure>,
    },
    AdapterDropped {
        epoch: Epoch,
        engine: u32,
        adapter: AdapterId,
    },
    Submitted {
        sequence: SequenceId,
        request: Admitted,
    },
    /// The client is gone, or does not read.
    Abandoned {
        sequence: SequenceId,
    },
    /// Plan a model over the workers and keep its engines alive. A number that is in use changes nothing.
    Start {
        instance: InstanceId,
        kind: Kind,
        settings: InstanceSettings,
    },
    /// A job that has kept what it has wants the engines of this epoch planned anew.
    PlanAgain {
        instance: InstanceId,
        epoch: Epoch,
    },
    /// Take the engines of an instance away; the others go on.
    Stop {
        instance: InstanceId,
    },
    /// Take nothing new, finish what runs within the limit, stop all engines, end.
    Drain {
        limit: Duration,
    },
    Tick,
}

#[derive(Debug, PartialEq)]
pub enum Effect {
    SetDesired {
        node: NodeId,
        version: u64,
        engines: Vec<EngineSpec>,
        neighbours: Vec<Peer>,
    },
    /// Tell an engine (by its number) its epoch and its neighbours; answered by `Linked`.
    Link {
        instance: InstanceId,
        epoch: Epoch,
        engine: u32,
        name: String,
        addresses: Vec<String>,
        link: Link,
    },
    /// Answered by `SessionOpened` or `SessionBroken`.
    OpenSession {
        epoch: Epoch,
        name: String,
        addresses: Vec<String>,
    },
    CloseSession,
    /// For the open session.
    Command(SessionCommand),
    /// Give an engine of the served model, which has these layers, an adapter; answered by `AdapterLoaded`.
    LoadAdapter {
        epoch: Epoch,
        engine: EngineAt,
        layers: Range<u32>,
        adapter: AdapterId,
    },
    /// Answered by `AdapterDropped`, by the lead once no sequence has it any more.
    DropAdapter {
        epoch: Epoch,
        engine: EngineAt,
        adapter: AdapterId,
    },
    /// An adapter can be asked for; or it is not there (any more), for this reason.
    AdapterSettled {
        adapter: AdapterId,
        outcome: AdapterOutcome,
    },
    /// For a client; the last one of a request is `Finished` or `Failed`.
    Answer {
        sequence: SequenceId,
        event: RequestEvent,
    },
    Planned {
        instance: InstanceId,
        plan: Plan,
    },
    /// All engines of a job are linked. After this exactly one of `TrainingBroken` with this epoch and `InstanceEnded` follows.
    TrainingReady {
        instance: InstanceId,
        epoch: Epoch,
        engines: Vec<EngineAt>,
    },
    /// What was under way with the engines of this epoch is lost; unless the instance ends, another epoch follows. Without a cause the job asked
    /// for it.
    TrainingBroken {
        instance: InstanceId,
        epoch: Epoch,
        cause: Option<String>,
    },
    /// A job goes on without workers that it lost, and a plan would have these again: it may ask for one.
    TrainingCouldGrow {
        instance: InstanceId,
        epoch: Epoch,
        workers: Vec<String>,
    },
    /// The coordinator stops: a job that has something to keep saves it and asks to be stopped, which is done anyway after this time.
    TrainingDrain {
        instance: InstanceId,
        within: Duration,
    },
    /// Its engines are gone, and its number is free; the last effect about it.
    InstanceEnded {
        instance: InstanceId,
        failure: Option<ClusterFailure>,
    },
    /// Everything is stopped; the last effect.
    End(Option<ClusterFailure>),
}

/// An engine that a job's runner may speak with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineAt {
    /// Its place among all engines of the plan: stage by stage, rank by rank.
    pub number: u32,
    pub stage: u32,
    pub rank: u32,
    pub node: NodeId,
    /// Of its worker.
    pub name: String,
    /// `host:port`, best first.
    pub addresses: Vec<String>,
}

/// Why a coordinator, or one instance, gave up.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClusterFailure {
    #[error(
        "{found} of {wanted} workers of cluster `{cluster}` found within {} s: start `mlx-cluster worker --cluster {cluster}` on each machine; where \
         multicast does not pass, add `--join HOST:PORT` with the address of this coordinator", waited.as_secs()
    )]
    NoWorkers { cluster: String, found: usize, wanted: usize, waited: Duration },
    #[error(transparent)]
    DoesNotFit(#[from] WhyNot),
    #[error("{why}; {taken} of their memory is taken by {by}: wait until that is over, or end it")]
    DoesNotFitBeside { why: WhyNot, taken: Bytes, by: String },
    #[error("worker {worker}: {cause}{}", last_lines(output))]
    Engine { worker: String, cause: String, output: Vec<String> },
    #[error(
        "the engines cannot be linked: {message} (blamed: worker {worker}); check that the workers reach each other and that no firewall closes their ports"
    )]
    Link { worker: String, message: String },
    #[error("adapter `{name}` cannot be served: {message}")]
    Adapter { name: String, message: String },
    #[error("worker {worker} made no progress with loading for {} s: see its log", waited.as_secs())]
    Stalled { worker: String, waited: Duration },
    #[error("the coordinator is stopping: start it again and ask then")]
    Stopping,
}

fn last_lines(output: &[String]) -> String {
    let start = output.len().saturating_sub(5);
    output.iter().skip(start).map(|line| format!("\n  {line}")).collect()
}

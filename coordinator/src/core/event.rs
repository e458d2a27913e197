//! What the coordinator's core is told, what it asks for, and how it can end.

use super::placement::{Reckoned, WhyNot};
use crate::serving::{Admitted, RequestEvent};
use mlx_cluster_common::{
    cache::CacheOptions,
    engine::{EngineSpec, EngineStatus, Link, ModelSource, NodeFacts, Peer},
    ids::{Epoch, NodeId, SequenceId},
    links::LinkFacts,
    plan::{Collective, Optimize, Plan, Strategy, ToldStage},
    request::{Delivery, SessionCommand},
    spec::ModelSpec,
    weights::WeightMap,
};
use std::{sync::Arc, time::Duration};

/// The model as the planner and the engines need it.
#[derive(Debug)]
pub struct ServedFacts {
    pub name: String,
    pub source: ModelSource,
    pub spec: ModelSpec,
    pub weights: WeightMap,
    pub fingerprint: u64,
    /// What the planner reckoned before.
    pub reckoned: Reckoned,
}

/// What the coordinator was started with.
#[derive(Debug, Clone)]
pub struct Settings {
    pub cluster: String,
    /// Part of the engines' ids, so that engines of an earlier coordinator are never taken for ours.
    pub run: String,
    pub model: Option<Arc<ServedFacts>>,
    pub min_workers: usize,
    pub strategy: Strategy,
    pub split: Option<Vec<u32>>,
    pub stages: Option<Vec<ToldStage>>,
    pub collective: Collective,
    pub optimize: Optimize,
    pub context_tokens: Option<u32>,
    pub caches: CacheOptions,
    /// How long to wait for the first `min_workers`; None waits for ever.
    pub wait: Option<Duration>,
}

impl Settings {
    /// Workers that are needed before anything is planned.
    pub(super) fn wanted_workers(&self) -> usize {
        let split = self.split.as_ref().map_or(0, Vec::len);
        let named: usize = self.stages.iter().flatten().map(|stage| stage.ranks.len()).sum();
        let least = usize::from(self.model.is_some());
        self.min_workers.max(split).max(named).max(least)
    }
}

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
        epoch: Epoch,
        engine: u32,
        result: Result<(), String>,
    },
    SessionOpened {
        epoch: Epoch,
    },
    /// The session with the lead ended; `node` is whom the lead blames, if anybody.
    SessionBroken {
        epoch: Epoch,
        node: Option<String>,
        message: String,
    },
    Delivered {
        epoch: Epoch,
        delivery: Delivery,
    },
    Submitted {
        sequence: SequenceId,
        request: Admitted,
    },
    /// The client is gone, or does not read.
    Abandoned {
        sequence: SequenceId,
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
    /// For a client; the last one of a request is `Finished` or `Failed`.
    Answer {
        sequence: SequenceId,
        event: RequestEvent,
    },
    Planned(Plan),
    /// Everything is stopped; the last effect.
    End(Option<ClusterFailure>),
}

/// Why a coordinator gave up.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClusterFailure {
    #[error(
        "{found} of {wanted} workers of cluster `{cluster}` found within {} s: start `mlx-cluster worker --cluster {cluster}` on each machine; where \
         multicast does not pass, add `--join HOST:PORT` with the address of this coordinator", waited.as_secs()
    )]
    NoWorkers { cluster: String, found: usize, wanted: usize, waited: Duration },
    #[error(transparent)]
    DoesNotFit(#[from] WhyNot),
    #[error("worker {worker}: {cause}{}", last_lines(output))]
    Engine { worker: String, cause: String, output: Vec<String> },
    #[error(
        "the engines cannot be linked: {message} (blamed: worker {worker}); check that the workers reach each other and that no firewall closes their ports"
    )]
    Link { worker: String, message: String },
    #[error("worker {worker} made no progress with loading for {} s: see its log", waited.as_secs())]
    Stalled { worker: String, waited: Duration },
}

fn last_lines(output: &[String]) -> String {
    let start = output.len().saturating_sub(5);
    output.iter().skip(start).map(|line| format!("\n  {line}")).collect()
}

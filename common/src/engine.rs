//! What an engine process is told to be, and how it is linked to the others of its instance.

use crate::{
    cache::{CacheOptions, CacheReservation},
    ids::{EngineId, Epoch, NodeId},
    plan::Collective,
    tensor::TensorPlace,
    training::TrainingRole,
    units::Bytes,
};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Where a model's files come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// A folder that every node of the plan has under this path.
    Folder(String),
    /// A repository on the Hugging Face hub at a revision (a commit where known).
    Repo { id: String, revision: String },
}

impl std::fmt::Display for ModelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelSource::Folder(path) => f.write_str(path),
            ModelSource::Repo { id, revision } => write!(f, "{id}@{revision}"),
        }
    }
}

/// One shard that a worker shall keep an engine for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineSpec {
    pub id: EngineId,
    pub model: ModelSource,
    /// Hash of the config and the weight index as the coordinator saw them; an engine that sees others refuses.
    pub fingerprint: u64,
    pub stage: u32,
    pub n_stages: u32,
    pub layers: Range<u32>,
    /// Which of the stage's ranks this is, and how they share.
    pub place: TensorPlace,
    pub collective: Collective,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: u32,
    /// Tokens that the KV caches of all sequences together may hold.
    pub cache_tokens: u64,
    /// What the plan reserves on the node for this engine.
    pub memory: Bytes,
    pub caches: CacheOptions,
    /// What each sequence counts for against `cache_tokens`.
    pub reservation: CacheReservation,
    /// That work at the same time, at most: the plan has room for the states of so many.
    pub sequences: u32,
    /// All workers that may hold or fetch tensors of the model, this one too: first those of the plan, engine by engine. The same order for
    /// all engines of a plan, so that all agree who fetches what.
    pub weight_peers: Vec<WeightPeer>,
    /// What it trains; None: it serves.
    pub training: Option<TrainingRole>,
}

/// A worker as a source of weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightPeer {
    pub node: NodeId,
    pub name: String,
    /// `host:port` of the worker's service, best first.
    pub addresses: Vec<String>,
    /// What the plan has it hold; empty for a worker that is not in the plan.
    pub layers: Range<u32>,
}

impl EngineSpec {
    pub fn is_first(&self) -> bool {
        self.stage == 0
    }

    pub fn is_last(&self) -> bool {
        self.stage + 1 == self.n_stages
    }

    /// Rank 0 of stage 0: makes the steps and speaks with the coordinator.
    pub fn is_lead(&self) -> bool {
        self.is_first() && self.place.rank == 0
    }
}

/// Connects an engine to its neighbours for one epoch; all sequences of earlier epochs are dropped.
///
/// Where engines serve, rank 0 of a stage takes the steps from rank 0 of the stage before, hands each to the other ranks of its own stage as
/// it came, and what its stage makes of it on to the next. Where they train, each gets its batches from outside, and exchanges activations and
/// cotangents with the rank of its own number in the stages before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub epoch: Epoch,
    /// To serve, for rank 0: the engine of rank 0 of the next stage, or the lead when this is the last stage. To train, for each rank: the
    /// engine of this rank of the next stage, none for the last stage. None when there is one stage.
    pub next: Option<Peer>,
    /// To serve, for rank 0: the engines of the stage's other ranks, by rank. None to train.
    pub ranks: Vec<Peer>,
    /// None when the stage has one rank.
    pub group: Option<GroupLink>,
}

/// How the ranks of a stage find each other for collectives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupLink {
    /// By rank: where it listens for the group, `ip:port`, as the rank before it reaches it.
    pub addresses: Vec<String>,
    /// By rank: the worker's name, for messages.
    pub names: Vec<String>,
    /// By rank: the process; a group that was formed by others cannot be used again.
    pub incarnations: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub node: NodeId,
    pub name: String,
    /// `host:port`, best first.
    pub addresses: Vec<String>,
}

/// What a node is, measured by its worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeFacts {
    pub id: NodeId,
    pub name: String,
    pub version: String,
    pub os: String,
    pub chip: String,
    /// What models may use: the GPU's share of unified memory on a Mac, or `--memory-limit`.
    pub usable_memory: Bytes,
    pub total_memory: Bytes,
    /// Bytes per second read from memory by a streaming kernel.
    pub memory_bandwidth: f64,
    /// Floating-point operations per second of a large f32 matrix product.
    pub matmul_rate: f64,
    pub addresses: Vec<String>,
}

/// An engine as its worker sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStatus {
    pub id: EngineId,
    pub state: EngineState,
}

#[derive(Debug, Clone, PartialEq)]
pub enum EngineState {
    Fetching {
        file: String,
        done: Bytes,
        total: Bytes,
    },
    Loading {
        done: Bytes,
        total: Bytes,
    },
    /// Serves on this port; `incarnation` tells one process from the next.
    Ready {
        port: u32,
        /// Kept free for the collectives of its group; 0 when it is alone.
        group_port: u32,
        incarnation: u64,
        resident: Bytes,
    },
    /// Gone; the worker starts it again by itself after `retry_in_ms`, unless it is hopeless.
    Failed {
        cause: String,
        output: Vec<String>,
        retry_in_ms: Option<u64>,
        /// The worker whose engine it lost, when that is why it ended: then it is not at fault itself.
        lost: Option<String>,
    },
}

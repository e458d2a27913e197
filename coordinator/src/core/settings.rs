//! What the coordinator, and each model that it runs, was started with.

use super::placement::Reckoned;
use mlx_cluster_common::{
    cache::CacheOptions,
    engine::ModelSource,
    plan::{Collective, Optimize, Strategy, ToldStage},
    spec::ModelSpec,
    training::{TrainStrategy, TrainingRole},
    weights::WeightMap,
};
use std::{sync::Arc, time::Duration};

/// A model as the planner and the engines need it.
#[derive(Debug)]
pub struct ModelFacts {
    pub name: String,
    pub source: ModelSource,
    pub spec: ModelSpec,
    pub weights: WeightMap,
    pub fingerprint: u64,
    /// What the planner reckoned before.
    pub reckoned: Reckoned,
}

/// A model that a job trains.
#[derive(Debug)]
pub struct TrainingFacts {
    pub model: Arc<ModelFacts>,
    /// Its `parallel` is the plan's to say.
    pub role: TrainingRole,
    pub work: TrainingWork,
}

/// What a job has its engines do, as far as the planner minds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingWork {
    pub strategy: TrainStrategy,
    /// Rows of a batch, over all replicas.
    pub batch_size: u32,
    /// Rows are cut to this.
    pub max_seq_length: u32,
    /// The longest row that the data has.
    pub tokens_per_row_max: Option<u32>,
    /// Batches for each update.
    pub accumulation: u32,
}

/// What the engines of an instance are for.
#[derive(Debug, Clone)]
pub enum Kind {
    /// They answer requests, through the lead.
    Serving(Arc<ModelFacts>),
    /// They make the steps of a job, which speaks with each of them.
    Training(Arc<TrainingFacts>),
}

impl Kind {
    pub fn model(&self) -> &ModelFacts {
        match self {
            Kind::Serving(model) => model,
            Kind::Training(facts) => &facts.model,
        }
    }

    pub fn role(&self) -> Option<&TrainingRole> {
        match self {
            Kind::Serving(_) => None,
            Kind::Training(facts) => Some(&facts.role),
        }
    }
}

/// What holds for the whole cluster.
#[derive(Debug, Clone)]
pub struct Settings {
    pub cluster: String,
    /// Part of the engines' ids, so that engines of an earlier coordinator are never taken for ours.
    pub run: String,
    pub min_workers: usize,
    /// How long a first start waits for its workers; None waits for ever.
    pub wait: Option<Duration>,
}

/// How one instance is to be spread over the workers.
#[derive(Debug, Clone, Default)]
pub struct InstanceSettings {
    pub strategy: Strategy,
    /// Layers of each stage, exactly.
    pub split: Option<Vec<u32>>,
    /// Which workers hold which layers, exactly.
    pub stages: Option<Vec<ToldStage>>,
    pub collective: Collective,
    pub optimize: Optimize,
    pub context_tokens: Option<u32>,
    pub caches: CacheOptions,
}

impl InstanceSettings {
    /// Workers that the user's own division of the layers takes; 1 where there is none.
    pub(super) fn named_workers(&self) -> usize {
        let split = self.split.as_ref().map_or(0, Vec::len);
        let named: usize = self.stages.iter().flatten().map(|stage| stage.ranks.len()).sum();
        split.max(named).max(1)
    }
}

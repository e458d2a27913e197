//! Why there is no plan, with the numbers of every worker and what to try.

use mlx_cluster_common::{cache::CacheError, plan::Strategy, tensor::CoverError, training::TrainStrategy, units::Bytes};

/// A node and what models may use of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeMemory {
    pub name: String,
    pub usable: Bytes,
}

/// Why the model cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyNot {
    #[error("--context must be at least 1")]
    NoContext,
    #[error("--context {asked} is longer than the {max} tokens that the model was made for (max_position_embeddings): give at most {max}")]
    ContextTooLong { asked: u32, max: u32 },
    #[error("--split {split} has a stage without layers: give each stage at least one")]
    EmptyStage { split: String },
    #[error("--split {split} adds up to {sum} layers, the model has {layers}")]
    SplitSum { split: String, sum: u64, layers: u32 },
    #[error("the model has {layers} layers, too few for {stages} stages: ask for at most {layers} workers")]
    TooFewLayers { layers: u32, stages: usize },
    #[error("{found} workers are connected, {wanted} are needed: start `mlx-cluster worker` on more machines")]
    TooFewNodes { found: usize, wanted: usize },
    #[error(
        "the model does not fit: it needs {} (weights {model_bytes}, caches {cache_bytes} for {context_tokens} tokens, working memory \
         {working_bytes} on each worker); {}; try a more quantised model, a smaller --context or one more worker", total(*model_bytes, *cache_bytes, *working_bytes), each(nodes)
    )]
    DoesNotFit { model_bytes: Bytes, cache_bytes: Bytes, working_bytes: Bytes, context_tokens: u32, nodes: Vec<NodeMemory> },
    #[error(
        "{name} cannot hold its {}{layers} layers as told: they need {needed} with a context of {context_tokens} tokens, {usable} is usable; \
         give it fewer layers{} or a smaller --context", part_of(*ranks), if *ranks > 1 { ", a smaller share" } else { "" }
    )]
    ShareDoesNotFit { name: String, layers: u32, ranks: usize, needed: Bytes, usable: Bytes, context_tokens: u32 },
    #[error("--stages {stages} does not go on at layer {next}: the stages have to cover layers 0 to {} in order, each once", layers.saturating_sub(1))]
    StagesGap { stages: String, next: u32, layers: u32 },
    #[error("--stages names worker {name} twice: a worker holds one part of a model")]
    NamedTwice { name: String },
    #[error("--stages names worker {name}, which is not connected; connected are: {}", known.join(", "))]
    UnknownWorker { name: String, known: Vec<String> },
    #[error("--stages names worker {name}, and {} workers are called so: write the id instead, one of {}", ids.len(), ids.join(", "))]
    AmbiguousWorker { name: String, ids: Vec<String> },
    #[error(
        "layers from {cut} on read keys and values of layers before it, so a stage of several workers can neither end nor begin there: move the cut"
    )]
    SharedCut { cut: u32 },
    #[error("the model cannot be split in shares of {shares:?}: {cause}")]
    Split { shares: Vec<u32>, cause: String },
    #[error(transparent)]
    NotCovered(#[from] CoverError),
    #[error("--stages {stages} is not what --strategy {strategy} says: leave one of them out")]
    OtherStrategy { stages: String, strategy: Strategy },
    #[error(transparent)]
    Caches(#[from] CacheError),
    #[error(
        "a batch of {batch_size} rows of {tokens} tokens, with an update every {accumulation} batches, trains nothing: each of these has to be \
         at least 1"
    )]
    EmptyBatch { batch_size: u32, tokens: u32, accumulation: u32 },
    #[error("nothing of the model is trained: give --num-layers of at least 1, or lora keys that name linears of these layers")]
    NothingTrained,
    #[error("--split is for pipelines, --strategy {strategy} has none: leave one of them out")]
    SplitIsForPipelines { strategy: TrainStrategy },
    #[error(
        "factors of `{path}` are those of the head too, and the two would be on different stages: leave it out of the lora keys, or take --strategy \
         data or tensor"
    )]
    SharedEmbedding { path: String },
    #[error(
        "a batch of {batch_size} rows is too small for {replicas} replicas: give each a row with a larger --batch-size, or take --strategy pipeline"
    )]
    TooFewRows { batch_size: u32, replicas: usize },
    #[error(
        "the training does not fit with --strategy {strategy}: on one worker it would take {} (weights {model_bytes}, what is trained with gradients \
         and optimizer {state_bytes}, working memory {working_bytes} for a row of {tokens} tokens); {}; try {}a smaller --max-seq-length, fewer \
         --num-layers or more workers",
        total(*model_bytes, *state_bytes, *working_bytes), each(nodes), if *keeps_all { "--grad-checkpoint, " } else { "" }
    )]
    TrainingDoesNotFit {
        strategy: TrainStrategy,
        model_bytes: Bytes,
        state_bytes: Bytes,
        working_bytes: Bytes,
        tokens: u32,
        nodes: Vec<NodeMemory>,
        keeps_all: bool,
    },
    #[error(
        "{name} cannot train its {layers} layers as told: with a row of {tokens} tokens at a time they take {needed}, {usable} is usable; give it \
         fewer layers or a smaller --max-seq-length"
    )]
    TrainingShareDoesNotFit { name: String, layers: u32, needed: Bytes, usable: Bytes, tokens: u32 },
    #[error("the stages do not cover the model's {layers} layers exactly once; please report this")]
    NotTiled { layers: u32 },
}

impl WhyNot {
    /// Whether other options, not other machines, would change it.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            WhyNot::NoContext
                | WhyNot::Caches(_)
                | WhyNot::OtherStrategy { .. }
                | WhyNot::ContextTooLong { .. }
                | WhyNot::EmptyStage { .. }
                | WhyNot::SplitSum { .. }
                | WhyNot::TooFewLayers { .. }
                | WhyNot::StagesGap { .. }
                | WhyNot::NamedTwice { .. }
                | WhyNot::AmbiguousWorker { .. }
                | WhyNot::SharedCut { .. }
                | WhyNot::EmptyBatch { .. }
                | WhyNot::NothingTrained
                | WhyNot::SplitIsForPipelines { .. }
                | WhyNot::SharedEmbedding { .. }
                | WhyNot::TooFewRows { .. }
        )
    }
}

fn total(model: Bytes, cache: Bytes, working: Bytes) -> Bytes {
    model + cache + working
}

fn part_of(ranks: usize) -> &'static str {
    if ranks > 1 { "part of " } else { "" }
}

fn each(nodes: &[NodeMemory]) -> String {
    let one = |node: &NodeMemory| format!("{} has {} usable", node.name, node.usable);
    nodes.iter().map(one).collect::<Vec<_>>().join(", ")
}

//! The decision which node holds which layers, and why, in a form that can be printed before anything loads.

use crate::{
    cache::{CacheOptions, CacheReservation},
    ids::NodeId,
    units::Bytes,
};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range, str::FromStr};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// As few stages as the model needs, however many workers there are.
    #[default]
    Auto,
    Pipeline,
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Strategy::Auto),
            "pipeline" => Ok(Strategy::Pipeline),
            other => Err(format!("strategy `{other}` is not one of auto, pipeline")),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Strategy::Auto => "auto",
            Strategy::Pipeline => "pipeline",
        })
    }
}

/// Stages in the order of the computation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub model: String,
    pub strategy: Strategy,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: u32,
    /// Tokens that the caches of all sequences together may hold, on every stage.
    pub cache_tokens: u64,
    pub caches: CacheOptions,
    /// What each sequence counts for against `cache_tokens`.
    pub reservation: CacheReservation,
    pub stages: Vec<Stage>,
    /// How the split came about, in a sentence.
    pub why: String,
}

/// Consecutive layers on one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    pub node: NodeId,
    pub node_name: String,
    pub layers: Range<u32>,
    pub weights: Bytes,
    /// KV caches for `cache_tokens`.
    pub cache: Bytes,
    /// Activations of the largest step, and what MLX keeps besides.
    pub working: Bytes,
    pub usable: Bytes,
}

impl Stage {
    pub fn needed(&self) -> Bytes {
        self.weights + self.cache + self.working
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { model, strategy, context_tokens, cache_tokens, stages, why, .. } = self;
        let n = stages.len();
        writeln!(
            f,
            "plan for {model}: {n} stage{}, strategy {strategy}, context {context_tokens} tokens, caches for {cache_tokens} tokens",
            if n == 1 { "" } else { "s" }
        )?;
        let width = stages.iter().map(|stage| stage.node_name.len()).max().unwrap_or(0).max(6);
        writeln!(
            f,
            "  {:width$}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}",
            "worker", "layers", "weights", "caches", "working", "together", "usable"
        )?;
        for stage in stages {
            let layers = match stage.layers.end - stage.layers.start {
                1 => stage.layers.start.to_string(),
                _ => format!("{}-{}", stage.layers.start, stage.layers.end - 1),
            };
            writeln!(
                f,
                "  {:width$}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}",
                stage.node_name,
                layers,
                stage.weights,
                stage.cache,
                stage.working,
                stage.needed(),
                stage.usable
            )?;
        }
        write!(f, "  {why}")
    }
}

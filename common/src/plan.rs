//! The decision which node holds which layers, and why, in a form that can be printed before anything loads.

use crate::{
    cache::{CacheOptions, CacheReservation},
    ids::NodeId,
    prediction::{Alternative, Prediction},
    training::TrainingPlan,
    units::Bytes,
};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range, str::FromStr};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// What is predicted to be best, with as few workers as that takes.
    #[default]
    Auto,
    /// A stage a worker.
    Pipeline,
    /// One stage, whose matrices are split over all workers.
    Tensor,
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Strategy::Auto),
            "pipeline" => Ok(Strategy::Pipeline),
            "tensor" => Ok(Strategy::Tensor),
            other => Err(format!("strategy `{other}` is not one of auto, pipeline, tensor")),
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Strategy::Auto => "auto",
            Strategy::Pipeline => "pipeline",
            Strategy::Tensor => "tensor",
        })
    }
}

/// What a plan is made best for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimize {
    /// Tokens per second of one request.
    #[default]
    Latency,
    /// Tokens per second of many requests together.
    Throughput,
}

impl FromStr for Optimize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "latency" => Ok(Optimize::Latency),
            "throughput" => Ok(Optimize::Throughput),
            other => Err(format!("`{other}` is not one of latency, throughput")),
        }
    }
}

/// Which of MLX's collectives a tensor-parallel group uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Collective {
    /// JACCL where all ranks have it, else the ring.
    #[default]
    Auto,
    /// Over TCP.
    Ring,
    /// Over RDMA on Thunderbolt.
    Jaccl,
}

impl FromStr for Collective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Collective::Auto),
            "ring" => Ok(Collective::Ring),
            "jaccl" => Ok(Collective::Jaccl),
            other => Err(format!("`{other}` is not one of auto, ring, jaccl")),
        }
    }
}

/// A stage that the user wrote: `a+b:0-11`, or `a*2+b:0-11` for unequal shares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToldStage {
    /// Names of workers and their shares, by rank.
    pub ranks: Vec<(String, u32)>,
    pub layers: Range<u32>,
}

impl FromStr for ToldStage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| format!("stage `{text}` {what}: write it as `name:0-11`, `a+b:0-11` or `a*2+b:0-11`");
        let (names, layers) = text.rsplit_once(':').ok_or_else(|| wrong("has no layers"))?;
        let (first, last) = layers.split_once('-').unwrap_or((layers, layers));
        let number = |text: &str| text.trim().parse::<u32>().map_err(|_| wrong("has layers that are no numbers"));
        let (first, last) = (number(first)?, number(last)?);
        let end = last.checked_add(1).filter(|end| first < *end).ok_or_else(|| wrong("ends before it begins"))?;
        let rank = |text: &str| {
            let (name, share) = text.rsplit_once('*').unwrap_or((text, "1"));
            let share = share.trim().parse::<u32>().ok().filter(|share| (1..=1000).contains(share));
            let share = share.ok_or_else(|| wrong("has a share that is not a number from 1 to 1000"))?;
            match name.trim() {
                "" => Err(wrong("has an empty name")),
                name => Ok((name.to_owned(), share)),
            }
        };
        Ok(ToldStage { ranks: names.split('+').map(rank).collect::<Result<_, _>>()?, layers: first..end })
    }
}

impl fmt::Display for ToldStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rank = |(name, share): &(String, u32)| if *share == 1 { name.clone() } else { format!("{name}*{share}") };
        let names: Vec<_> = self.ranks.iter().map(rank).collect();
        write!(f, "{}:{}-{}", names.join("+"), self.layers.start, self.layers.end.saturating_sub(1))
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
    /// Sequences that may work at the same time: states are reckoned for so many.
    pub sequences: u32,
    pub stages: Vec<Stage>,
    /// None where bandwidths were not measured.
    pub prediction: Option<Prediction>,
    /// What else was thought of, and why it lost.
    pub alternatives: Vec<Alternative>,
    /// How the split came about, in a sentence.
    pub why: String,
    /// None where the model is served.
    pub training: Option<Box<TrainingPlan>>,
}

/// Consecutive layers on one node, or on several that form a tensor-parallel group or, in training, are replicas.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    pub layers: Range<u32>,
    /// By rank; one where the stage is not split.
    pub ranks: Vec<Rank>,
}

/// One node's part of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rank {
    pub node: NodeId,
    pub node_name: String,
    /// What this rank takes of every block that can be split so, in proportion to the shares of all ranks.
    pub share: u32,
    pub weights: Bytes,
    /// KV caches for `cache_tokens`, and states; in training adapters, gradients and what the optimizer keeps.
    pub cache: Bytes,
    /// Activations of the largest step, in training of all micro-batches on the way; and what MLX keeps besides.
    pub working: Bytes,
    pub usable: Bytes,
}

impl Plan {
    /// Every rank of every stage, stage by stage: the order in which engines are numbered.
    pub fn ranks(&self) -> impl Iterator<Item = &Rank> {
        self.stages.iter().flat_map(|stage| &stage.ranks)
    }

    fn fmt_title(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { model, strategy, context_tokens, cache_tokens, .. } = self;
        let n = self.stages.len();
        let stages = format!("{n} stage{}", if n == 1 { "" } else { "s" });
        match &self.training {
            Some(training) => writeln!(f, "plan to train {model}: {stages}, strategy {}", training.strategy),
            None => writeln!(
                f,
                "plan for {model}: {stages}, strategy {strategy}, context {context_tokens} tokens, caches for {cache_tokens} tokens"
            ),
        }
    }
}

impl Stage {
    pub fn shares(&self) -> Vec<u32> {
        self.ranks.iter().map(|rank| rank.share).collect()
    }

    /// As a table shows it: one number, or first and last.
    fn layers_text(&self) -> String {
        match self.layers.end - self.layers.start {
            1 => self.layers.start.to_string(),
            _ => format!("{}-{}", self.layers.start, self.layers.end - 1),
        }
    }
}

impl Rank {
    pub fn needed(&self) -> Bytes {
        self.weights + self.cache + self.working
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { stages, why, .. } = self;
        self.fmt_title(f)?;
        let width = self.ranks().map(|rank| rank.node_name.len()).max().unwrap_or(0).max(6);
        let caches = if self.training.is_some() { "training" } else { "caches" };
        writeln!(
            f,
            "  {:width$}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}",
            "worker", "layers", "weights", caches, "working", "together", "usable"
        )?;
        for stage in stages {
            for (number, rank) in stage.ranks.iter().enumerate() {
                let layers = if number == 0 { stage.layers_text() } else { "+".into() };
                writeln!(
                    f,
                    "  {:width$}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}",
                    rank.node_name,
                    layers,
                    rank.weights,
                    rank.cache,
                    rank.working,
                    rank.needed(),
                    rank.usable
                )?;
            }
        }
        write!(f, "  {why}")?;
        if let Some(training) = &self.training {
            let shares = stages.first().map(Stage::shares).unwrap_or_default();
            write!(f, "\n  training: {}; {training}", training.parallel_text(stages.len(), &shares))?;
            if let Some(seconds) = training.step_seconds {
                let tokens = f64::from(training.batch_size) * f64::from(training.tokens_per_row);
                write!(f, "\n  predicted: {seconds:.2} s a batch of full rows, {:.0} tokens/s", tokens / seconds.max(1e-9))?;
            }
        }
        if let Some(prediction) = &self.prediction {
            write!(f, "\n  {prediction}")?;
        }
        self.alternatives.iter().try_for_each(|alternative| write!(f, "\n  not {alternative}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_stages_are_read_and_written() {
        let stage: ToldStage = "a+b:0-11".parse().expect("reads");
        assert_eq!(stage, ToldStage { ranks: vec![("a".into(), 1), ("b".into(), 1)], layers: 0..12 });
        let unequal: ToldStage = "mini.local*2+b:12-12".parse().expect("reads");
        assert_eq!(unequal, ToldStage { ranks: vec![("mini.local".into(), 2), ("b".into(), 1)], layers: 12..13 });
        assert_eq!([stage.to_string(), unequal.to_string()], ["a+b:0-11", "mini.local*2+b:12-12"]);
        assert_eq!("c:7".parse::<ToldStage>().map(|stage| stage.layers), Ok(7..8));
        for wrong in ["a", "a:", "a:3-2", ":0-1", "a+:0-1", "a*0:0-1", "a*x:0-1", "a:0-4294967295", "a:x-1"] {
            assert!(wrong.parse::<ToldStage>().is_err(), "{wrong}");
        }
    }
}

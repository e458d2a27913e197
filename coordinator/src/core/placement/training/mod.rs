//! Plans for training: the same nodes, links and cuts as for serving, with the costs of going back.

mod choice;
mod layouts;
mod memory;
mod pace;
#[cfg(test)]
mod tests;

use super::{Candidate, NodeMemory, Reckoned, WhyNot, by_capability, check_split, check_whole, costs::activation_dtype, machines::Ways};
use choice::{Choice, Way};
use layouts::{Layouts, Trial, in_flight};
use memory::{Model, RankCosts};
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    engine::NodeFacts,
    links::LinkFacts,
    plan::{Plan, Strategy},
    spec::ModelSpec,
    training::{TrainStrategy, TrainingPlan, TrainingRole, trainable},
    units::Bytes,
    weights::WeightMap,
};
use pace::Pace;
use std::ops::Range;

/// What the user asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingOptions {
    pub model: String,
    /// Its `parallel` is the plan's to say.
    pub role: TrainingRole,
    pub strategy: TrainStrategy,
    /// Rows of a batch, over all replicas.
    pub batch_size: u32,
    /// Rows are cut to this.
    pub max_seq_length: u32,
    /// The longest row that the data has, where that is known.
    pub tokens_per_row_max: Option<u32>,
    /// Batches for each update.
    pub accumulation: u32,
    /// Fewer workers than this are refused.
    pub min_workers: usize,
    /// Layers of each stage of a pipeline, exactly.
    pub split: Option<Vec<u32>>,
}

impl TrainingOptions {
    /// What memory is reckoned for.
    fn tokens_per_row(&self) -> u32 {
        self.max_seq_length.min(self.tokens_per_row_max.unwrap_or(u32::MAX))
    }

    fn check(&self, spec: &ModelSpec, map: &WeightMap) -> Result<(), WhyNot> {
        let Self { batch_size, accumulation, strategy, .. } = self;
        let tokens = self.tokens_per_row();
        if [*batch_size, tokens, *accumulation].contains(&0) {
            return Err(WhyNot::EmptyBatch { batch_size: *batch_size, tokens, accumulation: *accumulation });
        }
        check_split(spec.n_layers(), self.split.as_deref())?;
        if self.split.is_some() && matches!(strategy, TrainStrategy::Data | TrainStrategy::Tensor) {
            return Err(WhyNot::SplitIsForPipelines { strategy: *strategy });
        }
        let least = self.min_workers.max(1);
        let stages = if *strategy == TrainStrategy::Pipeline { least } else { 1 };
        if stages > spec.n_layers() as usize {
            return Err(WhyNot::TooFewLayers { layers: spec.n_layers(), stages });
        }
        if trainable(spec, map, &self.role, 0..spec.n_layers()) == 0 {
            return Err(WhyNot::NothingTrained);
        }
        Ok(())
    }
}

/// Decides which node trains which layers with which rows, or says with numbers why it cannot be. `links` are ways as measured; a usual one
/// is assumed where none is given.
pub fn plan_training(
    spec: &ModelSpec,
    map: &WeightMap,
    nodes: &[NodeFacts],
    links: &[LinkFacts],
    options: &TrainingOptions,
) -> Result<Plan, WhyNot> {
    options.check(spec, map)?;
    let wanted = options.split.as_ref().map_or(options.min_workers.max(1), Vec::len);
    if nodes.len() < wanted {
        return Err(WhyNot::TooFewNodes { found: nodes.len(), wanted });
    }
    let nodes = by_capability(nodes);
    let ways = Ways::new(&nodes, links);
    let model = Model { spec, map };
    let whole = RankCosts::new(model, model, &options.role);
    let pace = Pace {
        spec,
        nodes: &nodes,
        ways: &ways,
        number_bytes: activation_dtype(map).size() as f64,
        tokens_per_row: f64::from(options.tokens_per_row()),
        accumulation: f64::from(options.accumulation),
    };
    let mut planner = Planner { layouts: Layouts::new(spec, map, options, &whole, &pace) };
    let Choice { trial, way, alternatives } = planner.choose()?.ok_or_else(|| planner.does_not_fit())?;
    let why = planner.why(&trial, way);
    let training = TrainingPlan {
        strategy: options.strategy,
        parallel: trial.parallel,
        micro_batch_rows: trial.micro_batch_rows,
        batch_size: options.batch_size,
        tokens_per_row: options.tokens_per_row(),
        accumulation: options.accumulation,
        fine_tune: options.role.fine_tune.name().to_owned(),
        trainable: trainable(spec, map, &options.role, 0..spec.n_layers()),
        gradients: Bytes(trial.gradients),
        step_seconds: trial.seconds,
    };
    let plan = Plan {
        model: options.model.clone(),
        strategy: serving_strategy(options.strategy),
        context_tokens: options.tokens_per_row(),
        cache_tokens: u64::from(options.tokens_per_row()) * u64::from(trial.micro_batch_rows),
        caches: CacheOptions::default(),
        reservation: CacheReservation::default(),
        sequences: trial.micro_batch_rows,
        stages: trial.stages,
        prediction: None,
        alternatives,
        why,
        training: Some(Box::new(training)),
    };
    check_whole(spec, map, &plan, &Reckoned::default())?;
    Ok(plan)
}

/// Where something asks for one of serving's.
fn serving_strategy(strategy: TrainStrategy) -> Strategy {
    match strategy {
        TrainStrategy::Auto | TrainStrategy::Data => Strategy::Auto,
        TrainStrategy::Pipeline => Strategy::Pipeline,
        TrainStrategy::Tensor => Strategy::Tensor,
    }
}

/// The search, with what it has found out.
struct Planner<'a> {
    layouts: Layouts<'a>,
}

impl Planner<'_> {
    fn options(&self) -> &TrainingOptions {
        self.layouts.options
    }

    fn nodes(&self) -> &[Candidate<'_>] {
        self.layouts.nodes
    }

    fn min_workers(&self) -> usize {
        self.options().min_workers.max(1)
    }

    fn choose(&mut self) -> Result<Option<Choice>, WhyNot> {
        if let Some(split) = &self.options().split {
            let cuts = ranges(split);
            return match self.layouts.grid(&prefix(cuts.len()), cuts.len(), Some(&cuts)) {
                Some(trial) => Ok(Some(Choice::forced(trial, Way::Told))),
                None => Err(self.told_does_not_fit(&cuts)),
            };
        }
        let counts = (self.min_workers()..=self.nodes().len()).rev();
        let forced = |trial| Choice::forced(trial, Way::Asked);
        match self.options().strategy {
            TrainStrategy::Auto => self.fastest(),
            TrainStrategy::Pipeline => {
                let most = self.layouts.spec.n_layers() as usize;
                Ok(counts.filter(|n| *n <= most).find_map(|n| self.layouts.grid(&prefix(n), n, None)).map(forced))
            }
            TrainStrategy::Data => self.replicas().map(|trial| trial.map(forced)),
            TrainStrategy::Tensor => self.tensor().map(|trial| trial.map(forced)),
        }
    }

    /// Over as many workers as can be, each with as many of the layers as can be.
    fn replicas(&self) -> Result<Option<Trial>, WhyNot> {
        let (rows, least) = (self.options().batch_size, self.min_workers());
        for n in (least..=self.nodes().len()).rev() {
            // One worker is one replica; several are two or more.
            let stages = (1..=n).filter(|k| n.is_multiple_of(*k) && (n == 1 || n / k > 1));
            if let Some(trial) = stages.into_iter().find_map(|k| self.layouts.grid(&prefix(n), k, None)) {
                return Ok(Some(trial));
            }
        }
        if (rows as usize) < least {
            return Err(WhyNot::TooFewRows { batch_size: rows, replicas: least });
        }
        Ok(None)
    }

    fn tensor(&mut self) -> Result<Option<Trial>, WhyNot> {
        for n in (self.min_workers()..=self.nodes().len()).rev() {
            if let Some(trial) = self.group(&prefix(n))? {
                return Ok(Some(trial));
            }
        }
        Ok(None)
    }

    fn does_not_fit(&self) -> WhyNot {
        let (layouts, all) = (&self.layouts, 0..self.layouts.spec.n_layers());
        if self.layouts.shares_embedding() && self.options().strategy == TrainStrategy::Pipeline {
            return WhyNot::SharedEmbedding { path: layouts.spec.embedding.path.clone() };
        }
        let tokens = self.options().tokens_per_row();
        let nodes = self.nodes().iter().map(|Candidate { node, .. }| NodeMemory { name: node.name.clone(), usable: node.usable_memory });
        WhyNot::TrainingDoesNotFit {
            strategy: self.options().strategy,
            model_bytes: Bytes(layouts.whole.weights(&all)),
            state_bytes: Bytes(layouts.whole.state(&all)),
            working_bytes: Bytes(layouts.whole.working(&all, &layouts.whole.micro(1, tokens), 1)),
            tokens,
            nodes: nodes.collect(),
            keeps_all: !self.options().role.grad_checkpoint,
        }
    }

    /// Names the first worker for which one row is too much.
    fn told_does_not_fit(&self, cuts: &[Range<u32>]) -> WhyNot {
        if cuts.len() > 1 && self.layouts.shares_embedding() {
            return WhyNot::SharedEmbedding { path: self.layouts.spec.embedding.path.clone() };
        }
        let (tokens, whole) = (self.options().tokens_per_row(), self.layouts.whole);
        let micro = whole.micro(1, tokens);
        for ((number, layers), candidate) in cuts.iter().enumerate().zip(self.nodes()) {
            let in_flight = in_flight(cuts.len() - number, self.options().batch_size.into());
            let needed = Bytes(whole.needed(layers, &micro, in_flight));
            let usable = candidate.node.usable_memory;
            if needed > usable {
                let name = candidate.node.name.clone();
                return WhyNot::TrainingShareDoesNotFit { name, layers: layers.end - layers.start, needed, usable, tokens };
            }
        }
        self.does_not_fit()
    }
}

/// The most capable nodes.
fn prefix(n: usize) -> Vec<usize> {
    (0..n).collect()
}

fn ranges(split: &[u32]) -> Vec<Range<u32>> {
    super::planner::ranges(split)
}

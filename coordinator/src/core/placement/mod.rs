//! Which node holds which layers: pure, total and deterministic, with numbers for people.

mod costs;
mod fastest;
mod layout;
mod machines;
mod planner;
mod predict;
mod predicted;
mod reckoned;
mod search;
mod split;
mod steadiest;
mod told;
mod training;
mod why_not;

#[cfg(test)]
mod published_tests;
#[cfg(test)]
mod search_tests;
#[cfg(test)]
pub(crate) mod tests;

pub use reckoned::Reckoned;
pub use told::{check_split, check_stages};
pub use training::{TrainingOptions, plan_training};
pub use why_not::{NodeMemory, WhyNot};

use layout::Sizes;
use machines::{Ways, mean_over_equals};
use mlx_cluster_common::{
    cache::CacheOptions,
    engine::NodeFacts,
    links::LinkFacts,
    plan::{Optimize, Plan, Strategy, ToldStage},
    spec::{ModelSpec, Part},
    tensor,
    training::Parallel,
    weights::WeightMap,
};
use planner::Planner;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// Longest context that is planned for unless told otherwise.
pub const DEFAULT_CONTEXT_TOKENS: u32 = 32_768;
/// The context is not lowered below this to make a model fit.
pub const MIN_CONTEXT_TOKENS: u32 = 512;
/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PlanOptions {
    pub model: String,
    pub strategy: Strategy,
    /// Layers of each stage, exactly.
    pub split: Option<Vec<u32>>,
    /// Which workers hold which layers, exactly.
    pub stages: Option<Vec<ToldStage>>,
    pub optimize: Optimize,
    pub context_tokens: Option<u32>,
    pub caches: CacheOptions,
    /// Fewer workers than this are refused.
    pub min_workers: usize,
}

/// Decides which node holds which layers, or says with numbers why it cannot be. `links` are ways as measured; a usual one is assumed where
/// none is given.
pub fn plan(spec: &ModelSpec, map: &WeightMap, nodes: &[NodeFacts], links: &[LinkFacts], options: &PlanOptions) -> Result<Plan, WhyNot> {
    plan_again(&Reckoned::default(), spec, map, nodes, links, options)
}

/// The same plan as [`plan`] makes, sooner when something was reckoned about the same model before.
pub fn plan_again(
    reckoned: &Reckoned,
    spec: &ModelSpec,
    map: &WeightMap,
    nodes: &[NodeFacts],
    links: &[LinkFacts],
    options: &PlanOptions,
) -> Result<Plan, WhyNot> {
    let caches = options.caches;
    caches.check(spec)?;
    let context = context_range(spec, options)?;
    check_split(spec.n_layers(), options.split.as_deref())?;
    check_stages(spec, options.stages.as_deref(), options.strategy)?;
    let wanted = wanted_workers(spec, options)?;
    if nodes.len() < wanted {
        return Err(WhyNot::TooFewNodes { found: nodes.len(), wanted });
    }
    let sizes = Sizes::new(spec, map, caches, reckoned);
    let nodes = by_capability(nodes);
    let planner = Planner {
        spec,
        whole: sizes.group(&[1])?,
        sizes: &sizes,
        caches,
        ways: Ways::new(&nodes, links),
        number_bytes: costs::activation_dtype(map).size() as f64,
        plain_cache: CacheOptions::default().bytes_per_token(spec, 0..spec.n_layers(), costs::activation_dtype(map)),
        reservation: caches.reservation(spec, costs::activation_dtype(map)),
        nodes,
        n_layers: spec.n_layers(),
        min_workers: options.min_workers.max(1),
        context,
        options,
    };
    let fit = planner.fit()?;
    let plan = planner.plan(&fit)?;
    check_whole(spec, map, &plan, reckoned)?;
    Ok(plan)
}

/// Workers without which no plan is possible.
fn wanted_workers(spec: &ModelSpec, options: &PlanOptions) -> Result<usize, WhyNot> {
    let least = options.min_workers.max(1);
    let stages = if options.strategy == Strategy::Tensor { 1 } else { least };
    if spec.n_layers() == 0 || stages > spec.n_layers() as usize {
        return Err(WhyNot::TooFewLayers { layers: spec.n_layers(), stages });
    }
    let told = options.stages.as_ref().map(|stages| stages.iter().map(|stage| stage.ranks.len()).sum());
    Ok(told.or(options.split.as_ref().map(Vec::len)).unwrap_or(least))
}

/// The context to start with, and the least that will do.
fn context_range(spec: &ModelSpec, options: &PlanOptions) -> Result<Range<u32>, WhyNot> {
    let model_max = spec.max_position_embeddings.unwrap_or(u32::MAX);
    match options.context_tokens {
        Some(0) => Err(WhyNot::NoContext),
        Some(asked) if asked > model_max => Err(WhyNot::ContextTooLong { asked, max: model_max }),
        Some(asked) => Ok(asked..asked),
        None => {
            let wished = model_max.clamp(1, DEFAULT_CONTEXT_TOKENS);
            Ok(wished.min(MIN_CONTEXT_TOKENS)..wished)
        }
    }
}

/// A node and its rates, None where nobody measured.
struct Candidate<'a> {
    node: &'a NodeFacts,
    /// Bytes per second.
    bandwidth: Option<f64>,
    /// Floating-point operations per second.
    matmul_rate: Option<f64>,
}

/// Memory counts in steps of 2^(1/4), so that machines of one size stay in the order of their names whatever else runs on them.
fn memory_step(node: &NodeFacts) -> i64 {
    ((node.usable_memory.0.max(1) as f64).log2() * 4.0) as i64
}

/// Most memory first, then most bandwidth, then by name and id.
fn by_capability(nodes: &[NodeFacts]) -> Vec<Candidate<'_>> {
    let candidate = |node| Candidate {
        node,
        bandwidth: mean_over_equals(node, nodes, |node| node.memory_bandwidth),
        matmul_rate: mean_over_equals(node, nodes, |node| node.matmul_rate),
    };
    let mut candidates: Vec<_> = nodes.iter().map(candidate).collect();
    candidates.sort_by(|a, b| {
        let memory = memory_step(b.node).cmp(&memory_step(a.node));
        let speed = || b.bandwidth.unwrap_or(0.0).total_cmp(&a.bandwidth.unwrap_or(0.0));
        memory.then_with(speed).then_with(|| a.node.name.cmp(&b.node.name)).then_with(|| a.node.id.cmp(&b.node.id))
    });
    candidates
}

/// Proves that the stages hold every part once, and the ranks of a stage every entry of its parameters, all of them where they are replicas: layer ranges without gap or overlap, a
/// tied embedding on both ends, each node named once.
fn check_whole(spec: &ModelSpec, map: &WeightMap, plan: &Plan, reckoned: &Reckoned) -> Result<(), WhyNot> {
    let are_replicas = plan.training.as_ref().is_some_and(|training| training.parallel == Parallel::Data);
    let mut held: BTreeMap<Part, usize> = BTreeMap::new();
    let mut next = 0;
    for stage in &plan.stages {
        if stage.layers.start != next || stage.layers.is_empty() || stage.ranks.is_empty() {
            return Err(WhyNot::NotTiled { layers: spec.n_layers() });
        }
        next = stage.layers.end;
        let parts = spec.parts_of(stage.layers.clone());
        let shares = stage.shares();
        if shares.len() > 1 && !are_replicas && !reckoned.is_covered(&shares, &stage.layers) {
            tensor::check_cover(spec, map, &parts, &shares)?;
            reckoned.keep_covered(&shares, &stage.layers);
        }
        parts.into_iter().for_each(|part| *held.entry(part).or_default() += 1);
    }
    let twice = spec.head.may_be_tied() && plan.stages.len() > 1;
    let wanted = |part: &Part| if *part == Part::Embedding && twice { 2 } else { 1 };
    let whole = spec.parts().iter().all(|part| held.get(part) == Some(&wanted(part)));
    let nodes: BTreeSet<_> = plan.ranks().map(|rank| &rank.node).collect();
    if next != spec.n_layers() || !whole || nodes.len() != plan.ranks().count() {
        return Err(WhyNot::NotTiled { layers: spec.n_layers() });
    }
    Ok(())
}

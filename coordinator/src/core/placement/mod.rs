//! Which node holds which layers: pure, total and deterministic, with numbers for people.

mod costs;
mod split;
mod why_not;

#[cfg(test)]
pub(crate) mod tests;

pub use why_not::{NodeMemory, WhyNot};

use costs::Costs;
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    engine::NodeFacts,
    plan::{Plan, Rank, Stage, Strategy},
    spec::{ModelSpec, Part},
    units::Bytes,
    weights::WeightMap,
};
use std::{collections::BTreeMap, ops::Range};

/// Longest context that is planned for unless told otherwise.
pub const DEFAULT_CONTEXT_TOKENS: u32 = 32_768;
/// The context is not lowered below this to make a model fit.
pub const MIN_CONTEXT_TOKENS: u32 = 512;
/// Caches are made for this many full contexts where memory allows.
const WISHED_CONTEXTS: u64 = 16;
/// A model that takes more of the best node than this goes over several nodes where there are some.
const COMFORTABLE: f64 = 0.9;
/// With every node filled less than this, speed decides about the split instead of memory.
const PLENTIFUL: f64 = 0.8;
const CONTEXT_STEP: u32 = 256;
/// What a layer takes at decode besides reading its weights: starting kernels. It matters for small models only.
const LAYER_SECONDS: f64 = 100e-6;

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PlanOptions {
    pub model: String,
    pub strategy: Strategy,
    /// Layers of each stage, exactly.
    pub split: Option<Vec<u32>>,
    pub context_tokens: Option<u32>,
    pub caches: CacheOptions,
    /// Fewer stages than this are refused.
    pub min_stages: usize,
}

/// How the layers were divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Balance {
    Bandwidth,
    Memory,
}

struct Planner<'a> {
    costs: Costs,
    /// What a token would take in caches of the plain kind.
    plain_cache: u64,
    caches: CacheOptions,
    reservation: CacheReservation,
    /// Most capable first.
    nodes: Vec<Candidate<'a>>,
    n_layers: u32,
    min_stages: usize,
    strategy: Strategy,
    /// What is tried first, and the least to go down to.
    context: Range<u32>,
}

struct Fit {
    context_tokens: u32,
    layers: Vec<Range<u32>>,
    balance: Balance,
}

/// Decides which node holds which layers, or says with numbers why it cannot be.
pub fn plan(spec: &ModelSpec, map: &WeightMap, nodes: &[NodeFacts], options: &PlanOptions) -> Result<Plan, WhyNot> {
    options.caches.check(spec)?;
    let context = context_range(spec, options)?;
    let split = options.split.as_deref();
    check_split(spec.n_layers(), split)?;
    let min_stages = options.min_stages.max(1);
    if spec.n_layers() == 0 || min_stages > spec.n_layers() as usize {
        return Err(WhyNot::TooFewLayers { layers: spec.n_layers(), stages: min_stages });
    }
    let wanted = split.map_or(min_stages, <[u32]>::len);
    if nodes.len() < wanted {
        return Err(WhyNot::TooFewNodes { found: nodes.len(), wanted });
    }
    let planner = Planner {
        costs: Costs::new(spec, map, &options.caches),
        plain_cache: CacheOptions::default().bytes_per_token(spec, 0..spec.n_layers(), costs::activation_dtype(map)),
        caches: options.caches,
        reservation: options.caches.reservation(spec, costs::activation_dtype(map)),
        nodes: by_capability(nodes),
        n_layers: spec.n_layers(),
        min_stages,
        strategy: options.strategy,
        context,
    };
    let fit = match split {
        Some(split) => planner.told(split)?,
        None => planner.best().ok_or_else(|| planner.does_not_fit())?,
    };
    let plan = planner.plan(&fit, options);
    check_tiles(spec, &plan)?;
    Ok(plan)
}

/// Whether a `--split` can be right for a model, before any worker is known.
pub fn check_split(n_layers: u32, split: Option<&[u32]>) -> Result<(), WhyNot> {
    let Some(split) = split else { return Ok(()) };
    let text = || split.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    if split.is_empty() || split.contains(&0) {
        return Err(WhyNot::EmptyStage { split: text() });
    }
    match split.iter().map(|n| u64::from(*n)).sum::<u64>() {
        sum if sum == u64::from(n_layers) => Ok(()),
        sum => Err(WhyNot::SplitSum { split: text(), sum, layers: n_layers }),
    }
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

/// A node and its memory bandwidth, None where nobody measured.
struct Candidate<'a> {
    node: &'a NodeFacts,
    bandwidth: Option<f64>,
}

/// Memory counts in steps of 2^(1/4), so that machines of one size stay in the order of their names whatever else runs on them.
fn memory_step(node: &NodeFacts) -> i64 {
    ((node.usable_memory.0.max(1) as f64).log2() * 4.0) as i64
}

/// Most memory first, then most bandwidth, then by name and id.
fn by_capability(nodes: &[NodeFacts]) -> Vec<Candidate<'_>> {
    let mut candidates: Vec<_> = nodes.iter().map(|node| Candidate { node, bandwidth: bandwidth(node, nodes) }).collect();
    candidates.sort_by(|a, b| {
        let memory = memory_step(b.node).cmp(&memory_step(a.node));
        let speed = || b.bandwidth.unwrap_or(0.0).total_cmp(&a.bandwidth.unwrap_or(0.0));
        memory.then_with(speed).then_with(|| a.node.name.cmp(&b.node.name)).then_with(|| a.node.id.cmp(&b.node.id))
    });
    candidates
}

/// The mean over machines of this kind, so that noise in the measurement does not tell equals apart.
fn bandwidth(node: &NodeFacts, nodes: &[NodeFacts]) -> Option<f64> {
    let kind = |node: &NodeFacts| (node.os.clone(), node.chip.clone(), node.total_memory);
    let mut measured: Vec<f64> = nodes.iter().filter(|other| kind(other) == kind(node)).map(|other| other.memory_bandwidth).collect();
    // The order of the nodes must not show in the last digit of the sum.
    measured.sort_by(f64::total_cmp);
    let all_known = measured.iter().all(|bandwidth| bandwidth.is_finite() && *bandwidth > 0.0);
    all_known.then(|| measured.iter().sum::<f64>() / measured.len() as f64)
}

impl Planner<'_> {
    /// The plan's split by strategy: first with the context that was wished for, then with less.
    fn best(&self) -> Option<Fit> {
        let most = self.nodes.len().min(self.n_layers as usize);
        let wished = self.context.end;
        let counts: Vec<usize> = match self.strategy {
            Strategy::Pipeline | Strategy::Tensor => (self.min_stages..=most).rev().collect(),
            Strategy::Auto => (self.min_stages..=most).collect(),
        };
        let cramped = |n: usize| n == 1 && self.strategy == Strategy::Auto && most > 1;
        let at = |n: usize, share: f64| self.fit(n, wished, share);
        let first = counts.iter().find_map(|n| at(*n, if cramped(*n) { COMFORTABLE } else { 1.0 }));
        first.or_else(|| counts.iter().find_map(|n| at(*n, 1.0))).or_else(|| self.longest_context(&counts))
    }

    /// The split with the longest context that fits; on ties the earlier number of stages.
    fn longest_context(&self, counts: &[usize]) -> Option<Fit> {
        let mut best: Option<Fit> = None;
        for n in counts {
            let at_least = best.as_ref().map_or(self.context.start, |fit| fit.context_tokens + 1);
            let longer = self.longest_context_of(*n, at_least);
            best = longer.or(best);
        }
        best
    }

    fn longest_context_of(&self, n: usize, at_least: u32) -> Option<Fit> {
        let mut fit = self.fit(n, at_least, 1.0)?;
        let (mut low, mut high) = (at_least, self.context.end);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match self.fit(n, middle, 1.0) {
                Some(_) => low = middle,
                None => high = middle,
            }
        }
        let rounded = (low / CONTEXT_STEP * CONTEXT_STEP).max(at_least);
        if let Some(found) = self.fit(n, rounded, 1.0) {
            fit = found;
        }
        Some(fit)
    }

    /// The best split over the first `n` nodes with each filled to at most `share` of its usable memory.
    fn fit(&self, n: usize, context_tokens: u32, share: f64) -> Option<Fit> {
        let nodes = self.nodes.get(..n)?;
        let cache_tokens = self.reservation.of(context_tokens);
        let filled = |stage: usize, layers: &Range<u32>| {
            let usable = nodes.get(stage).map_or(0, |candidate| candidate.node.usable_memory.0);
            let needed = self.costs.needed(layers, cache_tokens);
            (needed <= usable).then(|| needed as f64 / usable.max(1) as f64)
        };
        if nodes.iter().all(|candidate| candidate.bandwidth.is_some()) {
            let time = |stage: usize, layers: Range<u32>| {
                filled(stage, &layers).filter(|filled| *filled <= share.min(PLENTIFUL))?;
                let reading = self.costs.read(&layers) as f64 / nodes.get(stage)?.bandwidth?;
                Some(reading + layers.len() as f64 * LAYER_SECONDS)
            };
            if let Some(layers) = split::best(self.n_layers, n, time) {
                return Some(Fit { context_tokens, layers, balance: Balance::Bandwidth });
            }
        }
        let layers = split::best(self.n_layers, n, |stage, layers| filled(stage, &layers).filter(|filled| *filled <= share))?;
        Some(Fit { context_tokens, layers, balance: Balance::Memory })
    }

    /// The split that was asked for, with the longest context that fits it.
    fn told(&self, split: &[u32]) -> Result<Fit, WhyNot> {
        let mut start = 0;
        let layers: Vec<Range<u32>> = split
            .iter()
            .map(|n| {
                let range = start..start + n;
                start = range.end;
                range
            })
            .collect();
        let most = self.most_cache_tokens(&layers);
        if most < self.reservation.of(self.context.start) {
            return Err(self.split_does_not_fit(&layers));
        }
        let context_tokens = self.context.end.min(self.reservation.longest(most));
        Ok(Fit { context_tokens, layers, balance: Balance::Memory })
    }

    /// Tokens that the caches of every stage can hold; 0 when a stage does not even hold its weights.
    fn most_cache_tokens(&self, layers: &[Range<u32>]) -> u64 {
        let tokens = layers.iter().zip(&self.nodes).map(|(layers, candidate)| {
            let per_token = self.costs.cache_per_token(layers);
            match candidate.node.usable_memory.0.checked_sub(self.costs.needed(layers, 0)) {
                None => 0,
                Some(_) if per_token == 0 => u64::MAX,
                Some(free) => free / per_token,
            }
        });
        tokens.min().unwrap_or(0)
    }

    fn plan(&self, fit: &Fit, options: &PlanOptions) -> Plan {
        let context = self.reservation.of(fit.context_tokens);
        let cache_tokens = self.most_cache_tokens(&fit.layers).min(context * WISHED_CONTEXTS).max(context);
        let stage = |(layers, Candidate { node, .. }): (&Range<u32>, &Candidate<'_>)| Stage {
            layers: layers.clone(),
            ranks: vec![Rank {
                node: node.id.clone(),
                node_name: node.name.clone(),
                share: 1,
                weights: Bytes(self.costs.weights(layers)),
                cache: Bytes(self.costs.cache_per_token(layers).saturating_mul(cache_tokens)),
                working: Bytes(self.costs.working(layers)),
                usable: node.usable_memory,
            }],
        };
        Plan {
            model: options.model.clone(),
            strategy: self.strategy,
            context_tokens: fit.context_tokens,
            cache_tokens,
            caches: self.caches,
            reservation: self.reservation,
            stages: fit.layers.iter().zip(&self.nodes).map(stage).collect(),
            why: self.why(fit, options),
        }
    }

    fn why(&self, fit: &Fit, options: &PlanOptions) -> String {
        let n = fit.layers.len();
        let balance = match fit.balance {
            Balance::Bandwidth => "layers balanced by measured memory bandwidth",
            Balance::Memory => "layers in proportion to usable memory",
        };
        let whole = Bytes(self.costs.needed(&(0..self.n_layers), self.reservation.of(self.context.end)));
        let first = self.nodes.first().map_or("", |candidate| candidate.node.name.as_str());
        let usable = self.nodes.first().map_or(Bytes(0), |candidate| candidate.node.usable_memory);
        let mut why = match (&options.split, self.strategy, n) {
            (Some(_), ..) => "layers split as told".to_owned(),
            (None, Strategy::Auto, 1) => format!("{first} holds the whole model: {whole} of {usable} usable with one full context"),
            (None, Strategy::Auto, _) if n == self.min_stages => format!("{n} stages, as many as asked for; {balance}"),
            (None, Strategy::Auto, _) => {
                format!("{n} stages: the whole model with one full context takes {whole}, {first} has {usable} usable; {balance}")
            }
            (None, Strategy::Pipeline | Strategy::Tensor, 1) => "one worker, so one stage".to_owned(),
            (None, Strategy::Pipeline | Strategy::Tensor, _) => format!("a pipeline over {n} workers as asked; {balance}"),
        };
        if fit.context_tokens < self.context.end {
            why += &format!("; context lowered from {} to {} tokens to fit", self.context.end, fit.context_tokens);
        }
        if self.caches != CacheOptions::default() {
            let (now, plain) = (Bytes(self.costs.cache_per_token(&(0..self.n_layers))), Bytes(self.plain_cache));
            why += &format!("; {}: a token takes {now} in the caches", self.caches);
            why += &if now == plain { String::new() } else { format!(" instead of {plain}") };
            why += &format!(", a full context {}", Bytes(now.0.saturating_mul(self.reservation.of(fit.context_tokens))));
        }
        let spare: Vec<_> = self.nodes.iter().skip(n).map(|candidate| candidate.node.name.as_str()).collect();
        if !spare.is_empty() {
            why += &format!("; not used: {}", spare.join(", "));
        }
        why
    }

    fn does_not_fit(&self) -> WhyNot {
        let all = 0..self.n_layers;
        let context_tokens = self.context.start;
        let nodes = self.nodes.iter().map(|Candidate { node, .. }| NodeMemory { name: node.name.clone(), usable: node.usable_memory });
        WhyNot::DoesNotFit {
            model_bytes: Bytes(self.costs.weights(&all)),
            cache_bytes: Bytes(self.costs.cache_per_token(&all).saturating_mul(self.reservation.of(context_tokens))),
            working_bytes: Bytes(self.costs.working(&all)),
            context_tokens,
            nodes: nodes.collect(),
        }
    }

    fn split_does_not_fit(&self, layers: &[Range<u32>]) -> WhyNot {
        let context_tokens = self.context.start;
        let needed = |layers: &Range<u32>| self.costs.needed(layers, self.reservation.of(context_tokens));
        let over = layers.iter().zip(&self.nodes).find(|(layers, candidate)| needed(layers) > candidate.node.usable_memory.0);
        match over {
            Some((layers, Candidate { node, .. })) => WhyNot::ShareDoesNotFit {
                name: node.name.clone(),
                layers: layers.end - layers.start,
                needed: Bytes(needed(layers)),
                usable: node.usable_memory,
                context_tokens,
            },
            None => self.does_not_fit(),
        }
    }
}

/// Proves that the stages hold every part once: layer ranges without gap or overlap, a tied embedding on both ends.
fn check_tiles(spec: &ModelSpec, plan: &Plan) -> Result<(), WhyNot> {
    let mut held: BTreeMap<Part, usize> = BTreeMap::new();
    let mut next = 0;
    for stage in &plan.stages {
        if stage.layers.start != next || stage.layers.is_empty() {
            return Err(WhyNot::NotTiled { layers: spec.n_layers() });
        }
        next = stage.layers.end;
        spec.parts_of(stage.layers.clone()).into_iter().for_each(|part| *held.entry(part).or_default() += 1);
    }
    let twice = spec.head.may_be_tied() && plan.stages.len() > 1;
    let wanted = |part: &Part| if *part == Part::Embedding && twice { 2 } else { 1 };
    let whole = spec.parts().iter().all(|part| held.get(part) == Some(&wanted(part)));
    if next != spec.n_layers() || !whole {
        return Err(WhyNot::NotTiled { layers: spec.n_layers() });
    }
    Ok(())
}

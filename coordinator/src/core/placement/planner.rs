//! The search for a layout: what fits, with which context, balanced by memory or by bandwidth.

use super::{
    Candidate, NodeMemory, PlanOptions, WhyNot,
    costs::{Costs, SEQUENCES},
    layout::{Group, Layout, LayoutStage, Sizes},
    machines::Ways,
    predict::Predictor,
    search::proportional,
    split, told,
};
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    plan::{Plan, Rank, Stage, Strategy},
    prediction::Alternative,
    spec::ModelSpec,
    units::Bytes,
};
use std::{ops::Range, sync::Arc};

/// Caches are made for this many full contexts where memory allows.
const WISHED_CONTEXTS: u64 = 16;
/// A model that takes more of the best node than this goes over several nodes where there are some.
pub(super) const COMFORTABLE: f64 = 0.9;
/// With every node filled less than this, speed decides about the split instead of memory.
const PLENTIFUL: f64 = 0.8;
/// As many as an engine ever takes at once, where sequences need nothing but tokens in caches.
const SEQUENCES_MAX: u32 = 64;
const CONTEXT_STEP: u32 = 256;
/// What a layer takes at decode besides reading its weights: starting kernels. It matters for small models only.
const LAYER_SECONDS: f64 = 100e-6;

/// How the layers were divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Balance {
    Bandwidth,
    Memory,
    Prediction,
    Told,
}

pub(super) struct Planner<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) sizes: &'a Sizes<'a>,
    pub(super) caches: CacheOptions,
    pub(super) whole: Arc<Group>,
    pub(super) ways: Ways,
    /// Of a number of the activations.
    pub(super) number_bytes: f64,
    /// What a token would take in caches of the plain kind.
    pub(super) plain_cache: u64,
    pub(super) reservation: CacheReservation,
    /// Most capable first.
    pub(super) nodes: Vec<Candidate<'a>>,
    pub(super) n_layers: u32,
    pub(super) min_workers: usize,
    /// What is tried first, and the least to go down to.
    pub(super) context: Range<u32>,
    pub(super) options: &'a PlanOptions,
}

pub(super) struct Fit {
    pub(super) context_tokens: u32,
    pub(super) layout: Layout,
    pub(super) balance: Balance,
    pub(super) alternatives: Vec<Alternative>,
}

impl Fit {
    pub(super) fn new(context_tokens: u32, layout: Layout, balance: Balance) -> Self {
        Self { context_tokens, layout, balance, alternatives: Vec::new() }
    }
}

impl Planner<'_> {
    pub(super) fn fit(&self) -> Result<Fit, WhyNot> {
        if let Some(stages) = &self.options.stages {
            return self.told(told::layout(stages, &self.nodes)?);
        }
        if let Some(split) = &self.options.split {
            return self.told(Layout::pipeline(&ranges(split)));
        }
        let fit = match self.options.strategy {
            Strategy::Tensor => self.tensor()?,
            Strategy::Pipeline => self.best(),
            Strategy::Auto => self.predicted()?.or_else(|| self.best()),
        };
        fit.ok_or_else(|| self.does_not_fit())
    }

    /// The whole model, for which there is always one rank.
    pub(super) fn whole_rank(&self) -> Option<&Costs> {
        self.whole.ranks.first()
    }

    /// One group over all nodes: in equal parts where that fits with the context that was wished for, else in proportion to memory. Without the
    /// smallest nodes only if it does not fit otherwise.
    fn tensor(&self) -> Result<Option<Fit>, WhyNot> {
        let groups = (self.min_workers..=self.nodes.len()).rev().flat_map(|n| {
            let group = |shares| Layout::group(self.n_layers, (0..n).collect(), shares);
            let memory = self.nodes.iter().take(n).map(|node| node.node.usable_memory.0 as f64);
            [group(vec![1; n]), group(proportional(memory))]
        });
        let mut best: Option<Fit> = None;
        for layout in groups {
            let Some(fit) = self.with_longest_context(layout)? else { continue };
            if fit.context_tokens == self.context.end {
                return Ok(Some(fit));
            }
            if best.as_ref().is_none_or(|best| fit.context_tokens > best.context_tokens) {
                best = Some(fit);
            }
        }
        Ok(best)
    }

    fn with_longest_context(&self, layout: Layout) -> Result<Option<Fit>, WhyNot> {
        let context_tokens = self.sizes.longest_context(&layout, &self.nodes, &self.reservation, &self.context)?;
        Ok(context_tokens.map(|context_tokens| Fit::new(context_tokens, layout, Balance::Memory)))
    }

    pub(super) fn predictor(&self) -> Predictor<'_> {
        Predictor {
            spec: self.spec,
            sizes: self.sizes,
            nodes: &self.nodes,
            ways: &self.ways,
            number_bytes: self.number_bytes,
            requests: SEQUENCES,
        }
    }

    /// The plan's split by strategy: first with the context that was wished for, then with less.
    fn best(&self) -> Option<Fit> {
        let most = self.nodes.len().min(self.n_layers as usize);
        let wished = self.context.end;
        let counts: Vec<usize> = match self.options.strategy {
            Strategy::Pipeline | Strategy::Tensor => (self.min_workers..=most).rev().collect(),
            Strategy::Auto => (self.min_workers..=most).collect(),
        };
        let cramped = |n: usize| n == 1 && self.options.strategy == Strategy::Auto && most > 1;
        let at = |n: usize, share: f64| self.pipeline(n, wished, share);
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
        let mut fit = self.pipeline(n, at_least, 1.0)?;
        let (mut low, mut high) = (at_least, self.context.end);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match self.pipeline(n, middle, 1.0) {
                Some(_) => low = middle,
                None => high = middle,
            }
        }
        let rounded = (low / CONTEXT_STEP * CONTEXT_STEP).max(at_least);
        if let Some(found) = self.pipeline(n, rounded, 1.0) {
            fit = found;
        }
        Some(fit)
    }

    /// The best split over the first `n` nodes with each filled to at most `share` of its usable memory.
    fn pipeline(&self, n: usize, context_tokens: u32, share: f64) -> Option<Fit> {
        let (nodes, costs) = (self.nodes.get(..n)?, self.whole_rank()?);
        let cache_tokens = self.reservation.of(context_tokens);
        let filled = |stage: usize, layers: &Range<u32>| {
            let usable = nodes.get(stage).map_or(0, |candidate| candidate.node.usable_memory.0);
            let needed = costs.needed(layers, cache_tokens);
            (needed <= usable).then(|| needed as f64 / usable.max(1) as f64)
        };
        if nodes.iter().all(|candidate| candidate.bandwidth.is_some()) {
            let time = |stage: usize, layers: Range<u32>| {
                filled(stage, &layers).filter(|filled| *filled <= share.min(PLENTIFUL))?;
                let reading = costs.read(&layers) as f64 / nodes.get(stage)?.bandwidth?;
                Some(reading + layers.len() as f64 * LAYER_SECONDS)
            };
            if let Some(layers) = split::best(self.n_layers, n, time) {
                return Some(Fit::new(context_tokens, Layout::pipeline(&layers), Balance::Bandwidth));
            }
        }
        let layers = split::best(self.n_layers, n, |stage, layers| filled(stage, &layers).filter(|filled| *filled <= share))?;
        Some(Fit::new(context_tokens, Layout::pipeline(&layers), Balance::Memory))
    }

    /// The layout that was asked for, with the longest context that fits it.
    fn told(&self, layout: Layout) -> Result<Fit, WhyNot> {
        match self.sizes.longest_context(&layout, &self.nodes, &self.reservation, &self.context)? {
            Some(context_tokens) => Ok(Fit::new(context_tokens, layout, Balance::Told)),
            None => Err(self.stage_does_not_fit(&layout)),
        }
    }

    pub(super) fn plan(&self, fit: &Fit) -> Result<Plan, WhyNot> {
        let context = self.reservation.of(fit.context_tokens);
        let most = self.sizes.most_cache_tokens(&fit.layout, &self.nodes)?;
        let cache_tokens = most.min(context.saturating_mul(WISHED_CONTEXTS)).max(context);
        let stages = fit.layout.stages.iter().map(|stage| self.stage(stage, cache_tokens));
        Ok(Plan {
            model: self.options.model.clone(),
            strategy: self.options.strategy,
            context_tokens: fit.context_tokens,
            cache_tokens,
            caches: self.caches,
            reservation: self.reservation,
            sequences: if self.whole_rank().is_some_and(Costs::has_states) { SEQUENCES } else { SEQUENCES_MAX },
            stages: stages.collect::<Result<_, _>>()?,
            prediction: self.predictor().predict(&fit.layout),
            alternatives: fit.alternatives.clone(),
            why: self.why(fit),
            training: None,
        })
    }

    fn stage(&self, stage: &LayoutStage, cache_tokens: u64) -> Result<Stage, WhyNot> {
        let LayoutStage { layers, nodes, shares } = stage;
        let group = self.sizes.group(shares)?;
        let rank = |((node, share), costs): ((&usize, &u32), &Costs)| {
            let node = self.nodes.get(*node)?.node;
            Some(Rank {
                node: node.id.clone(),
                node_name: node.name.clone(),
                share: *share,
                weights: Bytes(costs.weights(layers)),
                cache: Bytes(costs.cache_and_states(layers, cache_tokens)),
                working: Bytes(costs.working(layers)),
                usable: node.usable_memory,
            })
        };
        Ok(Stage { layers: layers.clone(), ranks: nodes.iter().zip(shares).zip(&group.ranks).filter_map(rank).collect() })
    }

    fn why(&self, fit: &Fit) -> String {
        let mut why = self.why_layout(fit);
        if fit.context_tokens < self.context.end {
            why += &format!("; context lowered from {} to {} tokens to fit", self.context.end, fit.context_tokens);
        }
        let caches = self.caches;
        if caches != CacheOptions::default() {
            let (now, plain) = (self.whole_rank().map_or(0, |costs| costs.cache_per_token(&(0..self.n_layers))), Bytes(self.plain_cache));
            why += &format!("; {caches}: a token takes {} in the caches", Bytes(now));
            why += &if Bytes(now) == plain { String::new() } else { format!(" instead of {plain}") };
            why += &format!(", a full context {}", Bytes(now.saturating_mul(self.reservation.of(fit.context_tokens))));
        }
        let spare: Vec<_> =
            (0..).zip(&self.nodes).filter(|(place, _)| !fit.layout.uses(*place)).map(|(_, node)| node.node.name.as_str()).collect();
        if !spare.is_empty() {
            why += &format!("; not used: {}", spare.join(", "));
        }
        why
    }

    fn why_layout(&self, fit: &Fit) -> String {
        let (n_stages, n) = (fit.layout.stages.len(), fit.layout.n_nodes());
        let balance = match fit.balance {
            Balance::Bandwidth => "layers balanced by measured memory bandwidth",
            Balance::Memory => "layers in proportion to usable memory",
            Balance::Prediction => return self.why_predicted(fit),
            Balance::Told if self.options.stages.is_some() => return "workers and layers as told".to_owned(),
            Balance::Told => return "layers split as told".to_owned(),
        };
        let shares = || fit.layout.stages.first().map(|stage| stage.shares.as_slice()).unwrap_or_default();
        let needed = self.whole_rank().map_or(0, |costs| costs.needed(&(0..self.n_layers), self.reservation.of(self.context.end)));
        let whole = Bytes(needed);
        let first = self.nodes.first().map_or("", |candidate| candidate.node.name.as_str());
        let usable = self.nodes.first().map_or(Bytes(0), |candidate| candidate.node.usable_memory);
        match (self.options.strategy, n) {
            (Strategy::Auto, 1) => format!("{first} holds the whole model: {whole} of {usable} usable with one full context"),
            (Strategy::Auto, _) if n == self.min_workers => format!("{n_stages} stages, as many as asked for; {balance}"),
            (Strategy::Auto, _) => {
                format!("{n_stages} stages: the whole model with one full context takes {whole}, {first} has {usable} usable; {balance}")
            }
            (Strategy::Pipeline | Strategy::Tensor, 1) => "one worker, so one stage".to_owned(),
            (Strategy::Pipeline, _) => format!("a pipeline over {n} workers as asked; {balance}"),
            (Strategy::Tensor, _) if shares().windows(2).all(|pair| pair.first() == pair.last()) => {
                format!("every matrix split over {n} workers in equal parts as asked")
            }
            (Strategy::Tensor, _) => format!("every matrix split over {n} workers as asked, in proportion to usable memory"),
        }
    }

    fn does_not_fit(&self) -> WhyNot {
        let all = 0..self.n_layers;
        let context_tokens = self.context.start;
        let nodes = self.nodes.iter().map(|Candidate { node, .. }| NodeMemory { name: node.name.clone(), usable: node.usable_memory });
        let bytes = |of: &dyn Fn(&Costs) -> u64| Bytes(self.whole_rank().map_or(0, of));
        WhyNot::DoesNotFit {
            model_bytes: bytes(&|costs| costs.weights(&all)),
            cache_bytes: bytes(&|costs| costs.cache_and_states(&all, self.reservation.of(context_tokens))),
            working_bytes: bytes(&|costs| costs.working(&all)),
            context_tokens,
            nodes: nodes.collect(),
        }
    }

    /// Names the first worker for which the least context is too much.
    fn stage_does_not_fit(&self, layout: &Layout) -> WhyNot {
        let context_tokens = self.context.start;
        for stage in &layout.stages {
            let Ok(group) = self.sizes.group(&stage.shares) else { continue };
            for (costs, place) in group.ranks.iter().zip(&stage.nodes) {
                let Some(Candidate { node, .. }) = self.nodes.get(*place) else { continue };
                let needed = costs.needed(&stage.layers, self.reservation.of(context_tokens));
                if needed > node.usable_memory.0 {
                    return WhyNot::ShareDoesNotFit {
                        name: node.name.clone(),
                        layers: stage.layers.end - stage.layers.start,
                        ranks: stage.nodes.len(),
                        needed: Bytes(needed),
                        usable: node.usable_memory,
                        context_tokens,
                    };
                }
            }
        }
        self.does_not_fit()
    }
}

/// Consecutive layers, so many each.
pub(super) fn ranges(split: &[u32]) -> Vec<Range<u32>> {
    let mut start = 0u32;
    let range = |n: &u32| {
        let range = start..start.saturating_add(*n);
        start = range.end;
        range
    };
    split.iter().map(range).collect()
}

//! Which nodes would hold what, before it is a plan: stages of ranks, and the bytes of each.

use super::{Candidate, costs::Costs};
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    spec::ModelSpec,
    tensor::{TensorPlace, rank_model},
    weights::WeightMap,
};
use std::{cell::RefCell, collections::BTreeMap, ops::Range, rc::Rc};

/// Stages in the order of the computation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) stages: Vec<LayoutStage>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayoutStage {
    pub(super) layers: Range<u32>,
    /// Places in the list of candidates, by rank.
    pub(super) nodes: Vec<usize>,
    /// By rank.
    pub(super) shares: Vec<u32>,
}

/// The bytes of every rank of every group that was asked about. Splitting a model takes longer than adding up, so it is done once.
pub(super) struct Sizes<'a> {
    spec: &'a ModelSpec,
    map: &'a WeightMap,
    caches: CacheOptions,
    groups: RefCell<BTreeMap<Vec<u32>, Rc<Vec<Costs>>>>,
}

impl Layout {
    /// The first nodes, one a stage.
    pub(super) fn pipeline(layers: &[Range<u32>]) -> Self {
        let stage = |(node, layers): (usize, &Range<u32>)| LayoutStage { layers: layers.clone(), nodes: vec![node], shares: vec![1] };
        Self { stages: layers.iter().enumerate().map(stage).collect() }
    }

    /// All layers on these nodes.
    pub(super) fn group(n_layers: u32, nodes: Vec<usize>, shares: Vec<u32>) -> Self {
        Self { stages: vec![LayoutStage { layers: 0..n_layers, nodes, shares }] }
    }

    pub(super) fn n_nodes(&self) -> usize {
        self.stages.iter().map(|stage| stage.nodes.len()).sum()
    }

    pub(super) fn uses(&self, node: usize) -> bool {
        self.stages.iter().any(|stage| stage.nodes.contains(&node))
    }
}

impl<'a> Sizes<'a> {
    pub(super) fn new(spec: &'a ModelSpec, map: &'a WeightMap, caches: CacheOptions) -> Self {
        Self { spec, map, caches, groups: RefCell::new(BTreeMap::new()) }
    }

    /// What each rank of a group with these shares holds.
    pub(super) fn group(&self, shares: &[u32]) -> Rc<Vec<Costs>> {
        if let Some(costs) = self.groups.borrow().get(shares) {
            return Rc::clone(costs);
        }
        let costs = match shares {
            [_] => vec![Costs::new(self.spec, self.map, &self.caches)],
            _ => (0..shares.len() as u32).map(|rank| self.rank(rank, shares)).collect(),
        };
        let costs = Rc::new(costs);
        self.groups.borrow_mut().insert(shares.to_vec(), Rc::clone(&costs));
        costs
    }

    fn rank(&self, rank: u32, shares: &[u32]) -> Costs {
        match rank_model(self.spec, self.map, &TensorPlace { rank, shares: shares.to_vec() }) {
            Ok(model) => Costs::new(&model.spec, &model.weights, &self.caches),
            // The engine will say why; until then the most that it could need is counted.
            Err(_) => Costs::new(self.spec, self.map, &self.caches),
        }
    }

    /// Tokens that the caches of every rank can hold; 0 when one does not even hold its weights.
    pub(super) fn most_cache_tokens(&self, layout: &Layout, nodes: &[Candidate<'_>]) -> u64 {
        let stage = |stage: &LayoutStage| {
            let costs = self.group(&stage.shares);
            let tokens = costs.iter().zip(&stage.nodes).map(|(costs, node)| {
                let usable = nodes.get(*node).map_or(0, |candidate| candidate.node.usable_memory.0);
                most_tokens(costs, &stage.layers, usable)
            });
            tokens.min().unwrap_or(0)
        };
        layout.stages.iter().map(stage).min().unwrap_or(0)
    }

    /// The longest context up to `wished` that fits everywhere; None when not even `least` does.
    pub(super) fn longest_context(
        &self,
        layout: &Layout,
        nodes: &[Candidate<'_>],
        reservation: &CacheReservation,
        context: &Range<u32>,
    ) -> Option<u32> {
        let most = self.most_cache_tokens(layout, nodes);
        (most >= reservation.of(context.start) && most > 0).then(|| context.end.min(reservation.longest(most)))
    }
}

fn most_tokens(costs: &Costs, layers: &Range<u32>, usable: u64) -> u64 {
    let per_token = costs.cache_per_token(layers);
    match usable.checked_sub(costs.needed(layers, 0)) {
        None => 0,
        Some(_) if per_token == 0 => u64::MAX,
        Some(free) => free / per_token,
    }
}

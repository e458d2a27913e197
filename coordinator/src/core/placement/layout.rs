//! Which nodes would hold what, before it is a plan: stages of ranks, and the bytes of each.

use super::{Candidate, Reckoned, WhyNot, costs::Costs};
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    plan::ToldStage,
    spec::{ModelSpec, Part},
    tensor::{TensorPlace, rank_model},
    weights::WeightMap,
};
use std::{fmt, ops::Range, sync::Arc};

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Single,
    Pipeline,
    Tensor,
    Hybrid,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Single => "one worker",
            Kind::Pipeline => "a pipeline",
            Kind::Tensor => "a tensor group",
            Kind::Hybrid => "a pipeline of tensor groups",
        })
    }
}

/// The bytes of every rank of every group that was asked about. Splitting a model takes longer than adding up, so it is done once.
pub(super) struct Sizes<'a> {
    spec: &'a ModelSpec,
    map: &'a WeightMap,
    caches: CacheOptions,
    reckoned: &'a Reckoned,
}

/// What the ranks of a group hold, and how often they exchange.
pub(super) struct Group {
    pub(super) ranks: Vec<Costs>,
    /// Collectives of each layer.
    pub(super) sums: Vec<u32>,
    pub(super) embedding_sums: u32,
    pub(super) head_gathers: u32,
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

    /// As `--stages` takes it.
    pub(super) fn text(&self, nodes: &[Candidate<'_>]) -> String {
        let name = |place: &usize| nodes.get(*place).map(|candidate| candidate.node.name.clone()).unwrap_or_default();
        let told = |stage: &LayoutStage| {
            let ranks = stage.nodes.iter().map(name).zip(stage.shares.iter().copied()).collect();
            ToldStage { ranks, layers: stage.layers.clone() }.to_string()
        };
        self.stages.iter().map(told).collect::<Vec<_>>().join(",")
    }

    pub(super) fn kind(&self) -> Kind {
        match (self.stages.len(), self.n_nodes()) {
            (1, 1) => Kind::Single,
            (1, _) => Kind::Tensor,
            (stages, nodes) if stages == nodes => Kind::Pipeline,
            _ => Kind::Hybrid,
        }
    }

    pub(super) fn uses(&self, node: usize) -> bool {
        self.stages.iter().any(|stage| stage.nodes.contains(&node))
    }
}

impl<'a> Sizes<'a> {
    pub(super) fn new(spec: &'a ModelSpec, map: &'a WeightMap, caches: CacheOptions, reckoned: &'a Reckoned) -> Self {
        reckoned.with_caches(caches);
        Self { spec, map, caches, reckoned }
    }

    /// What each rank of a group with these shares holds.
    pub(super) fn group(&self, shares: &[u32]) -> Result<Arc<Group>, WhyNot> {
        self.ranks(shares, shares.len() as u32)
    }

    /// Of a group of `n` equal ranks only the first one, which has the most.
    pub(super) fn first_of(&self, n: usize) -> Result<Arc<Group>, WhyNot> {
        self.ranks(&vec![1; n], 1)
    }

    fn ranks(&self, shares: &[u32], wanted: u32) -> Result<Arc<Group>, WhyNot> {
        let first_only = wanted < shares.len() as u32;
        if let Some(group) = self.reckoned.group(shares, first_only) {
            return Ok(group);
        }
        let group = Arc::new(match shares {
            [_] => self.alone(),
            _ => self.split(shares, wanted)?,
        });
        self.reckoned.keep_group(shares, first_only, &group);
        Ok(group)
    }

    fn alone(&self) -> Group {
        let ranks = vec![Costs::new(self.spec, self.map, &self.caches)];
        Group { ranks, sums: vec![0; self.spec.layers.len()], embedding_sums: 0, head_gathers: 0 }
    }

    fn split(&self, shares: &[u32], wanted: u32) -> Result<Group, WhyNot> {
        let mut group = Group { ranks: Vec::new(), sums: Vec::new(), embedding_sums: 0, head_gathers: 0 };
        for rank in 0..wanted {
            let place = TensorPlace { rank, shares: shares.to_vec() };
            let model = rank_model(self.spec, self.map, &place)
                .map_err(|cause| WhyNot::Split { shares: shares.to_vec(), cause: cause.to_string() })?;
            if rank == 0 {
                let count = |part| model.n_collectives(part) as u32;
                group.sums = (0..self.spec.n_layers()).map(|layer| count(Part::Layer(layer))).collect();
                group.embedding_sums = count(Part::Embedding) + count(Part::LayerInputs);
                group.head_gathers = count(Part::Head) + if model.spec.head.may_be_tied() { count(Part::Embedding) } else { 0 };
            }
            group.ranks.push(Costs::new(&model.spec, &model.weights, &self.caches));
        }
        Ok(group)
    }

    /// Tokens that the caches of every rank can hold; 0 when one does not even hold its weights.
    pub(super) fn most_cache_tokens(&self, layout: &Layout, nodes: &[Candidate<'_>]) -> Result<u64, WhyNot> {
        let stage = |stage: &LayoutStage| -> Result<u64, WhyNot> {
            let group = self.group(&stage.shares)?;
            let tokens = group.ranks.iter().zip(&stage.nodes).map(|(costs, node)| {
                let usable = nodes.get(*node).map_or(0, |candidate| candidate.node.usable_memory.0);
                most_tokens(costs, &stage.layers, usable)
            });
            Ok(tokens.min().unwrap_or(0))
        };
        layout.stages.iter().map(stage).try_fold(u64::MAX, |least, tokens| Ok(least.min(tokens?)))
    }

    /// The longest context up to `wished` that fits everywhere; None when not even `least` does.
    pub(super) fn longest_context(
        &self,
        layout: &Layout,
        nodes: &[Candidate<'_>],
        reservation: &CacheReservation,
        context: &Range<u32>,
    ) -> Result<Option<u32>, WhyNot> {
        let most = self.most_cache_tokens(layout, nodes)?;
        Ok((most >= reservation.of(context.start) && most > 0).then(|| context.end.min(reservation.longest(most))))
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

//! How long a batch takes: the model that docs/planner.md describes.

use super::super::{
    Candidate,
    costs::Work,
    machines::Ways,
    predict::{HOP_SECONDS, READING, Step, all_sum_seconds},
};
use super::memory::RankCosts;
use mlx_cluster_common::spec::ModelSpec;
use std::ops::Range;

pub(super) struct Pace<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) nodes: &'a [Candidate<'a>],
    pub(super) ways: &'a Ways,
    /// Of a number of the activations.
    pub(super) number_bytes: f64,
    pub(super) tokens_per_row: f64,
    pub(super) accumulation: f64,
}

/// Of a micro-batch on one node, there and back.
pub(super) struct NodePace {
    /// Seconds of the layers before each layer.
    sums: Vec<f64>,
    head: f64,
}

/// A group whose ranks have a part of every matrix.
pub(super) struct TensorGroup {
    pub(super) ranks: Vec<RankCosts>,
    /// Collectives of each layer, forward.
    pub(super) sums: Vec<u32>,
    /// Of the embedding and the head.
    pub(super) end_sums: u32,
}

/// A micro-batch's time on each stage, and between them, one way.
pub(super) struct Path {
    pub(super) stages: Vec<f64>,
    pub(super) hops: Vec<f64>,
    pub(super) micro_batches: u64,
}

impl NodePace {
    pub(super) fn seconds(&self, layers: &Range<u32>) -> f64 {
        let sum = |layer: u32| self.sums.get(layer as usize).copied().unwrap_or(0.0);
        let is_last = layers.end as usize + 1 == self.sums.len();
        sum(layers.end) - sum(layers.start) + if is_last { self.head } else { 0.0 }
    }
}

impl Path {
    /// The first micro-batch goes through all stages and back; the others follow at the pace of the slowest.
    pub(super) fn seconds(&self) -> f64 {
        let slowest = self.stages.iter().chain(&self.hops).copied().fold(0.0, f64::max);
        let through = self.stages.iter().sum::<f64>() + 2.0 * self.hops.iter().sum::<f64>();
        through + self.micro_batches.saturating_sub(1) as f64 * slowest
    }
}

impl Pace<'_> {
    /// None where the node's bandwidth or its matrix products were not measured.
    pub(super) fn node(&self, rank: &RankCosts, place: usize, busy: &[usize], rows: u32) -> Option<NodePace> {
        let mut sums = vec![0.0];
        for (layer, work) in (0u32..).zip(rank.work(self.tokens_per_row)) {
            let seconds = self.work(&work, place, busy, rows)? * rank.passes(layer);
            sums.push(sums.last().copied().unwrap_or(0.0) + seconds);
        }
        let head = self.work(&rank.head_work(), place, busy, rows)? * rank.head_passes();
        Some(NodePace { sums, head })
    }

    fn work(&self, work: &Work, place: usize, busy: &[usize], rows: u32) -> Option<f64> {
        let node = self.nodes.get(place)?;
        node.matmul_rate?;
        let sharers = busy.iter().filter(|other| **other == place || self.ways.is_one_machine(place, **other)).count().max(1);
        work.seconds(node, sharers as f64, Step::training(self.tokens(rows)))
    }

    fn tokens(&self, rows: u32) -> f64 {
        f64::from(rows) * self.tokens_per_row
    }

    /// What crosses a cut, or comes back over it.
    pub(super) fn hop(&self, from: usize, to: usize, cut: u32, rows: u32) -> f64 {
        let width: f64 = self.spec.cut_tensors(cut).iter().map(|(_, width)| f64::from(*width)).sum();
        HOP_SECONDS + self.ways.between(from, to).seconds(width * self.number_bytes * self.tokens(rows))
    }

    /// For each batch: replicas add up gradients once an update.
    pub(super) fn adding_up(&self, nodes: &[usize], gradients: u64) -> f64 {
        self.ways.worst(nodes).map_or(0.0, |way| all_sum_seconds(way, nodes.len(), gradients as f64)) / self.accumulation
    }

    /// For each batch: what is trained is read and written once an update.
    pub(super) fn updating(&self, place: usize, state: u64) -> Option<f64> {
        Some(2.0 * state as f64 / (self.nodes.get(place)?.bandwidth? * READING) / self.accumulation)
    }

    /// A micro-batch through a whole model that is split: each layer waits for its slowest rank, and each pass for sums over the group.
    pub(super) fn group(&self, group: &TensorGroup, nodes: &[usize], rows: u32) -> Option<f64> {
        let paces: Option<Vec<NodePace>> =
            nodes.iter().zip(&group.ranks).map(|(place, rank)| self.node(rank, *place, nodes, rows)).collect();
        let (paces, first) = (paces?, group.ranks.first()?);
        let stream = f64::from(self.spec.hidden_size) * self.number_bytes * self.tokens(rows);
        let sum = self.ways.worst(nodes).map_or(0.0, |way| all_sum_seconds(way, nodes.len(), stream));
        let mut seconds = paces.iter().map(|pace| pace.head).fold(0.0, f64::max) + f64::from(group.end_sums) * first.head_passes() * sum;
        for (layer, n_sums) in (0u32..).zip(&group.sums) {
            let slowest = paces.iter().map(|pace| pace.sums.get(layer as usize + 1).zip(pace.sums.get(layer as usize)));
            seconds += slowest.flatten().map(|(after, before)| after - before).fold(0.0, f64::max);
            seconds += f64::from(*n_sums) * first.passes(layer) * sum;
        }
        Some(seconds)
    }
}

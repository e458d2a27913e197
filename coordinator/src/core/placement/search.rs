//! The search over order of nodes, layer ranges, groups and shares.
//!
//! For up to eight nodes it is exact, by dynamic programming over sets of nodes: the optimum of the predicted time, with ranks interpolated
//! between a whole model and an equal split. The few layouts that come out are then predicted from the ranks as they really are.

use super::{
    WhyNot,
    costs::{Costs, Work},
    layout::{Group, Layout, LayoutStage},
    predict::{Predictor, Step, all_sum_seconds},
    split,
    told::{cut_is_free, reduced},
};
use std::{collections::BTreeMap, ops::Range, sync::Arc};

/// Nodes over which the search is exact.
pub(super) const EXACT_NODES: usize = 8;
/// The largest share of a rank: finer ones rarely agree with the numbers of heads.
pub(super) const SHARES_MAX: f64 = 4.0;

/// How much of its memory each node may be filled with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fill {
    pub(super) cache_tokens: u64,
    /// Of one node that holds the whole model.
    pub(super) alone: f64,
}

pub(super) struct Search<'a> {
    pub(super) predictor: &'a Predictor<'a>,
    pub(super) n_layers: u32,
    fill: Fill,
    /// Whether a stage of several ranks may begin or end before a layer.
    pub(super) free: Vec<bool>,
    /// Bytes that cross the cut before each layer, for each token.
    cuts: Vec<f64>,
    /// Groups of equal ranks by their number; 1 is the whole model.
    equal: BTreeMap<usize, EqualGroup>,
}

/// Rank 0 of a group of equal ranks, and its bytes with the caches that are wanted, by start and end.
struct EqualGroup {
    group: Arc<Group>,
    needed: Vec<u64>,
}

/// Some nodes, and how long they take for any layers.
pub(super) struct Piece {
    /// Of the places in the list that is searched.
    pub(super) mask: usize,
    pub(super) nodes: Vec<usize>,
    pub(super) shares: Vec<u32>,
    /// Seconds of the layers before each layer.
    pub(super) sums: Vec<f64>,
    pub(super) front: f64,
    pub(super) tail: f64,
    /// For each end, the first start with which the layers fit; the end itself where none do.
    pub(super) earliest: Vec<u32>,
}

impl Piece {
    pub(super) fn seconds(&self, layers: &Range<u32>) -> f64 {
        let sum = |layer: u32| self.sums.get(layer as usize).copied().unwrap_or(0.0);
        let front = if layers.start == 0 { self.front } else { 0.0 };
        let tail = if layers.end as usize + 1 == self.sums.len() { self.tail } else { 0.0 };
        sum(layers.end) - sum(layers.start) + front + tail
    }

    pub(super) fn earliest(&self, end: u32) -> u32 {
        self.earliest.get(end as usize).copied().unwrap_or(end)
    }

    pub(super) fn is_group(&self) -> bool {
        self.nodes.len() > 1
    }

    pub(super) fn lead(&self) -> usize {
        self.mask.trailing_zeros() as usize
    }

    pub(super) fn stage(&self, layers: Range<u32>) -> LayoutStage {
        LayoutStage { layers, nodes: self.nodes.clone(), shares: self.shares.clone() }
    }

    fn all_layers(&self) -> Range<u32> {
        0..self.sums.len().saturating_sub(1) as u32
    }
}

impl<'a> Search<'a> {
    pub(super) fn new(predictor: &'a Predictor<'a>, fill: Fill, most_ranks: usize) -> Result<Self, WhyNot> {
        let n_layers = predictor.spec.n_layers();
        let mut equal = BTreeMap::new();
        for n in 1..=most_ranks.max(1) {
            let group = predictor.sizes.first_of(n)?;
            let needed = needed(group.ranks.first(), n_layers, fill.cache_tokens);
            equal.insert(n, EqualGroup { group, needed });
        }
        let free = (0..=n_layers).map(|cut| cut_is_free(predictor.spec, cut)).collect();
        let cuts = (0..=n_layers).map(|cut| predictor.cut_bytes(cut)).collect();
        Ok(Self { predictor, n_layers, fill, free, cuts, equal })
    }

    /// Until what a token leaves before the cut is at the other node.
    pub(super) fn hop(&self, from: usize, to: usize, cut: u32) -> f64 {
        self.predictor.hop_seconds(from, to, self.cuts.get(cut as usize).copied().unwrap_or(0.0))
    }

    /// Every set of these nodes as one group, and each node alone.
    pub(super) fn pieces(&self, places: &[usize], step: Step) -> Vec<Piece> {
        (1..1usize << places.len()).filter_map(|mask| self.piece(mask, &members(mask, places), step)).collect()
    }

    /// The nodes with the shares that serve them best: those that let them hold the whole model, and then the fastest.
    pub(super) fn piece(&self, mask: usize, nodes: &[usize], step: Step) -> Option<Piece> {
        let rates = |rate: &dyn Fn(&super::Candidate<'_>) -> f64| {
            proportional(nodes.iter().filter_map(|place| self.predictor.nodes.get(*place)).map(rate))
        };
        let mut shares = vec![vec![1; nodes.len()]];
        if nodes.len() > 1 {
            shares.push(rates(&|node| node.bandwidth.unwrap_or(0.0)));
            shares.push(rates(&|node| node.node.usable_memory.0 as f64));
            shares.dedup();
        }
        let key = |piece: &Piece| (piece.earliest(self.n_layers) > 0, piece.seconds(&piece.all_layers()));
        let mut best: Option<Piece> = None;
        for piece in shares.into_iter().filter_map(|shares| self.with_shares(mask, nodes, shares, step)) {
            if best.as_ref().is_none_or(|best| key(&piece) < key(best)) {
                best = Some(piece);
            }
        }
        best
    }

    fn with_shares(&self, mask: usize, nodes: &[usize], shares: Vec<u32>, step: Step) -> Option<Piece> {
        let (whole, equal) = (self.equal.get(&1)?, self.equal.get(&nodes.len())?);
        let parts = parts(&shares);
        let (whole_rank, rank) = (whole.group.ranks.first()?, equal.group.ranks.first()?);
        let seconds = |whole: Work, own: Work, step: Step| -> Option<f64> {
            let mut slowest = 0.0f64;
            for (place, part) in nodes.iter().zip(&parts) {
                let work = interpolated(whole, own, nodes.len(), *part);
                slowest = slowest.max(work.seconds(self.predictor.nodes.get(*place)?, self.predictor.sharers(*place, nodes), step)?);
            }
            Some(slowest)
        };
        let sum_seconds = self
            .predictor
            .ways
            .worst(nodes)
            .map_or(0.0, |way| all_sum_seconds(way, nodes.len(), self.predictor.stream_bytes() * step.tokens));
        let mut sums = vec![0.0];
        let mut last: Option<(Work, Work, f64)> = None;
        for ((whole, own), n_sums) in whole_rank.layer_work().iter().zip(rank.layer_work()).zip(&equal.group.sums) {
            // Most layers are like the one before.
            let computing = match last {
                Some((w, o, seconds)) if w == *whole && o == *own => seconds,
                _ => seconds(*whole, *own, step)?,
            };
            last = Some((*whole, *own, computing));
            sums.push(sums.last().copied().unwrap_or(0.0) + computing + f64::from(*n_sums) * sum_seconds);
        }
        let tail = seconds(whole_rank.head_work(), rank.head_work(), step)? + f64::from(equal.group.head_gathers) * sum_seconds;
        let front = f64::from(equal.group.embedding_sums) * sum_seconds;
        let earliest = self.earliest(nodes, &parts)?;
        Some(Piece { mask, nodes: nodes.to_vec(), shares, sums, front, tail, earliest })
    }

    /// Two pointers: what fits from a start on fits from a later one too.
    fn earliest(&self, nodes: &[usize], parts: &[f64]) -> Option<Vec<u32>> {
        let n = nodes.len();
        let (whole, equal) = (&self.equal.get(&1)?.needed, &self.equal.get(&n)?.needed);
        let width = self.n_layers as usize + 1;
        let fits = |start: u32, end: u32| {
            let at = start as usize * width + end as usize;
            let (whole, own) = (whole.get(at).copied().unwrap_or(u64::MAX) as f64, equal.get(at).copied().unwrap_or(u64::MAX) as f64);
            nodes.iter().zip(parts).all(|(place, part)| {
                let usable = self.predictor.nodes.get(*place).map_or(0, |node| node.node.usable_memory.0) as f64;
                let is_alone = n == 1 && start == 0 && end == self.n_layers;
                mixed(whole, own, n, *part) <= usable * if is_alone { self.fill.alone } else { 1.0 }
            })
        };
        let mut start = 0;
        let earliest = (0..=self.n_layers).map(|end| {
            while start < end && !fits(start, end) {
                start += 1;
            }
            start
        });
        Some(earliest.collect())
    }

    /// Good layouts over more nodes than the exact search takes: pipelines of groups of equal size along a chain of nodes in which each follows
    /// the one that it reaches best.
    pub(super) fn chained(&self, n_nodes: usize) -> Vec<Layout> {
        let chain = self.chain(n_nodes);
        let mut layouts = Vec::new();
        for size in [1, 2, 4, 8] {
            let pieces: Vec<Piece> = chain.chunks_exact(size).filter_map(|nodes| self.piece(0, nodes, Step::decode(1.0))).collect();
            for n in 1..=pieces.len().min(self.n_layers as usize) {
                // All small numbers, then steps of an eighth.
                if n > 16 && !n.is_multiple_of((n / 8).next_power_of_two()) && n != pieces.len() {
                    continue;
                }
                let load = |stage: usize, layers: Range<u32>| {
                    let piece = pieces.get(stage)?;
                    let cut = |cut: u32| !piece.is_group() || self.free.get(cut as usize).copied().unwrap_or(false);
                    let fits = piece.earliest(layers.end) <= layers.start && cut(layers.start) && cut(layers.end);
                    fits.then(|| piece.seconds(&layers))
                };
                let Some(ranges) = split::best(self.n_layers, n, load) else { continue };
                layouts.push(Layout { stages: pieces.iter().zip(ranges).map(|(piece, layers)| piece.stage(layers)).collect() });
            }
        }
        layouts
    }

    fn chain(&self, n_nodes: usize) -> Vec<usize> {
        let mut left: Vec<usize> = (0..n_nodes).collect();
        let mut chain: Vec<usize> = Vec::new();
        while !left.is_empty() {
            let far =
                |place: &usize| chain.last().map_or(0.0, |last| self.predictor.hop_seconds(*last, *place, self.predictor.stream_bytes()));
            let next = left.iter().enumerate().min_by(|(_, a), (_, b)| far(a).total_cmp(&far(b)).then(a.cmp(b))).map_or(0, |(i, _)| i);
            let place = left.remove(next);
            chain.push(place);
        }
        chain
    }
}

/// Every set of members of `of`, the empty one last.
pub(super) fn subsets(of: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(of), move |set| set.checked_sub(1).map(|less| less & of))
}

/// By the set of their nodes.
pub(super) fn by_mask(pieces: &[Piece], n_places: usize) -> Vec<Option<usize>> {
    let mut numbers = vec![None; 1 << n_places];
    for (number, piece) in pieces.iter().enumerate() {
        if let Some(entry) = numbers.get_mut(piece.mask) {
            *entry = Some(number);
        }
    }
    numbers
}

/// The nodes of a set, by the places in a list.
pub(super) fn members(mask: usize, places: &[usize]) -> Vec<usize> {
    places.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 == 1).map(|(_, place)| *place).collect()
}

fn needed(costs: Option<&Costs>, n_layers: u32, cache_tokens: u64) -> Vec<u64> {
    let starts = (0..=n_layers).flat_map(|start| (0..=n_layers).map(move |end| start..end));
    starts.map(|layers| costs.filter(|_| layers.start < layers.end).map_or(0, |costs| costs.needed(&layers, cache_tokens))).collect()
}

/// Small whole shares in proportion to something.
pub(super) fn proportional(rates: impl Iterator<Item = f64>) -> Vec<u32> {
    let rates: Vec<f64> = rates.map(|rate| rate.max(1.0)).collect();
    let most = rates.iter().copied().fold(1.0, f64::max);
    reduced(rates.iter().map(|rate| (rate / most * SHARES_MAX).round().max(1.0) as u32).collect())
}

/// Each share of the whole.
fn parts(shares: &[u32]) -> Vec<f64> {
    let all: f64 = shares.iter().map(|share| f64::from(*share)).sum();
    shares.iter().map(|share| f64::from(*share) / all.max(1.0)).collect()
}

/// What a rank has of something of which each of `n` equal ranks has `own`: what all have, and a part of the rest.
fn mixed(whole: f64, own: f64, n: usize, part: f64) -> f64 {
    if n == 1 {
        return whole;
    }
    let n = n as f64;
    let copied = ((n * own - whole) / (n - 1.0)).max(0.0);
    copied + (whole - copied) * part
}

fn interpolated(whole: Work, own: Work, n: usize, part: f64) -> Work {
    let mix = |whole, own| mixed(whole, own, n, part);
    Work {
        bytes: mix(whole.bytes, own.bytes),
        expert_bytes: mix(whole.expert_bytes, own.expert_bytes),
        chosen: whole.chosen,
        operations: mix(whole.operations, own.operations),
        cache_bytes: mix(whole.cache_bytes, own.cache_bytes),
        kernels: own.kernels,
    }
}

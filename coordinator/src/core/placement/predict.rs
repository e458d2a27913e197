//! How fast a layout will be: the model that docs/planner.md describes.

use super::{
    Candidate,
    costs::Work,
    layout::{Layout, LayoutStage, Sizes},
    machines::{Way, Ways},
};
use mlx_cluster_common::{
    prediction::{PlannedWay, Prediction, WayKind},
    spec::ModelSpec,
};

/// Between the end of one kernel and the start of the next, and its own fixed part. Fitted, see docs/planner.md.
const KERNEL_SECONDS: f64 = 9e-6;
/// Of the bandwidth of a streaming kernel, what reading weights for few tokens gets. Fitted.
pub(super) const READING: f64 = 0.8;
/// What a collective takes besides the link: the processor waits for the GPU and the GPU for the processor. Fitted.
const COLLECTIVE_SECONDS: f64 = 60e-6;
/// What a hop takes besides the link: packing, three threads that are woken. Measured on loopback.
pub(super) const HOP_SECONDS: f64 = 120e-6;
/// From a Mac's disk into arrays.
const LOAD_BYTES_PER_SECOND: f64 = 2e9;
/// A token is predicted behind so many.
const DECODE_POSITION: f64 = 1024.0;
/// A prompt is predicted in steps of so many tokens.
const PREFILL_TOKENS: f64 = 512.0;
const PREFILL_STEPS: f64 = 8.0;
/// Ids and sampling, from the last stage back to the lead.
const RESULT_BYTES: f64 = 256.0;

/// How many tokens a step has, and how far into their sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Step {
    pub(super) tokens: f64,
    position: f64,
    /// Rows that the head sees.
    rows: f64,
}

pub(super) struct Predictor<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) sizes: &'a Sizes<'a>,
    pub(super) nodes: &'a [Candidate<'a>],
    pub(super) ways: &'a Ways,
    /// Of a number of the activations.
    pub(super) number_bytes: f64,
    pub(super) requests: u32,
}

/// Of one step through one stage.
#[derive(Debug, Clone, Copy, Default)]
struct StageSeconds {
    computing: f64,
    links: f64,
}

impl StageSeconds {
    fn all(self) -> f64 {
        self.computing + self.links
    }
}

impl Step {
    pub(super) fn decode(tokens: f64) -> Self {
        Self { tokens, position: DECODE_POSITION, rows: tokens }
    }

    /// Of one pass of a micro-batch; every token has a loss.
    pub(super) fn training(tokens: f64) -> Self {
        Self { tokens, position: 0.0, rows: tokens }
    }

    fn prefill() -> Self {
        Self { tokens: PREFILL_TOKENS, position: 0.0, rows: 1.0 }
    }
}

impl Work {
    /// Roofline: reading or computing, whichever takes longer, and the start of kernels. Experts are reckoned as if drawn at random.
    /// None where the bandwidth is not known.
    pub(super) fn seconds(&self, node: &Candidate<'_>, sharers: f64, step: Step) -> Option<f64> {
        let experts = self.expert_bytes * (1.0 - (1.0 - self.chosen).powf(step.tokens));
        let read = self.bytes + experts + self.cache_bytes * step.position * step.tokens;
        let reading = read * sharers / (node.bandwidth? * READING);
        let computing = node.matmul_rate.map_or(0.0, |rate| self.operations * step.tokens * sharers / rate);
        Some(reading.max(computing) + self.kernels * KERNEL_SECONDS)
    }
}

/// One sum over a group of `n`. The ring passes each part around twice; over RDMA everybody sends to everybody at once.
pub(super) fn all_sum_seconds(way: &Way, n: usize, bytes: f64) -> f64 {
    let n = n as f64;
    let moving = if way.is_rdma() { way.seconds(bytes) } else { 2.0 * (n - 1.0) * way.seconds(bytes / n) };
    COLLECTIVE_SECONDS + moving
}

impl Predictor<'_> {
    /// None where the bandwidth of a node is not known.
    pub(super) fn predict(&self, layout: &Layout) -> Option<Prediction> {
        let one = self.seconds(layout, Step::decode(1.0), false)?;
        let hops = self.hops(layout, 1.0);
        let ways: Vec<PlannedWay> = hops.into_iter().chain(self.groups(layout)).collect();
        let hopping: f64 = ways.iter().filter(|way| way.kind == WayKind::Hop).map(|way| way.seconds).sum();
        let (computing, sums): (f64, f64) = one.iter().fold((0.0, 0.0), |(a, b), stage| (a + stage.computing, b + stage.links));
        let token = computing + sums + hopping;
        Some(Prediction {
            load_seconds: self.load_seconds(layout),
            prefill_tokens_per_second: self.prefill(layout),
            decode_tokens_per_second: 1.0 / token.max(1e-9),
            decode_tokens_per_second_of_many: self.many(layout)?,
            requests: self.requests,
            links_share: (sums + hopping) / token.max(1e-9),
            ways,
        })
    }

    /// By stage. `all_at_once`: every stage works at the same time, so nodes on one machine share its memory all the while.
    fn seconds(&self, layout: &Layout, step: Step, all_at_once: bool) -> Option<Vec<StageSeconds>> {
        let all: Vec<usize> = layout.stages.iter().flat_map(|stage| stage.nodes.iter().copied()).collect();
        layout.stages.iter().map(|stage| self.stage(stage, step, if all_at_once { &all } else { &stage.nodes })).collect()
    }

    fn stage(&self, stage: &LayoutStage, step: Step, busy: &[usize]) -> Option<StageSeconds> {
        let group = self.sizes.group(&stage.shares).ok()?;
        let is_last = stage.layers.end == self.spec.n_layers();
        let mut computing = 0.0;
        for layer in stage.layers.clone() {
            computing += self.slowest(stage, busy, step, |rank| group.ranks.get(rank)?.layer_work().get(layer as usize).copied())?;
        }
        if is_last {
            let rows = Step { tokens: step.rows, ..step };
            computing += self.slowest(stage, busy, rows, |rank| Some(group.ranks.get(rank)?.head_work()))?;
        }
        let sums: u32 = group.sums.get(stage.layers.start as usize..stage.layers.end as usize).unwrap_or_default().iter().sum();
        let sums = sums + if stage.layers.start == 0 { group.embedding_sums } else { 0 };
        let links = self.ways.worst(&stage.nodes).map_or(0.0, |way| {
            let n = stage.nodes.len();
            let heads = if is_last { f64::from(group.head_gathers) } else { 0.0 };
            f64::from(sums) * all_sum_seconds(way, n, self.stream_bytes() * step.tokens)
                + heads * all_sum_seconds(way, n, f64::from(self.spec.vocab_size) * self.number_bytes * step.rows)
        });
        Some(StageSeconds { computing, links })
    }

    /// Ranks wait for each other at every sum, so the slowest one counts, layer by layer.
    fn slowest(&self, stage: &LayoutStage, busy: &[usize], step: Step, work: impl Fn(usize) -> Option<Work>) -> Option<f64> {
        let mut slowest = 0.0f64;
        for (rank, place) in stage.nodes.iter().enumerate() {
            let node = self.nodes.get(*place)?;
            slowest = slowest.max(work(rank)?.seconds(node, self.sharers(*place, busy), step)?);
        }
        Some(slowest)
    }

    /// How many of these share the memory of one, itself included.
    pub(super) fn sharers(&self, place: usize, busy: &[usize]) -> f64 {
        busy.iter().filter(|other| **other == place || self.ways.is_one_machine(place, **other)).count().max(1) as f64
    }

    pub(super) fn stream_bytes(&self) -> f64 {
        f64::from(self.spec.hidden_size) * self.number_bytes
    }

    /// What crosses the cut before a layer, for each token.
    pub(super) fn cut_bytes(&self, cut: u32) -> f64 {
        self.spec.cut_tensors(cut).iter().map(|(_, width)| f64::from(*width)).sum::<f64>() * self.number_bytes
    }

    pub(super) fn hop_seconds(&self, from: usize, to: usize, bytes: f64) -> f64 {
        HOP_SECONDS + self.ways.between(from, to).seconds(bytes)
    }

    pub(super) fn back_seconds(&self, from: usize, to: usize) -> f64 {
        self.hop_seconds(from, to, RESULT_BYTES)
    }

    /// From each stage to the next, and from the last back to the lead.
    fn hops(&self, layout: &Layout, tokens: f64) -> Vec<PlannedWay> {
        let leads: Vec<usize> = layout.stages.iter().filter_map(|stage| stage.nodes.first().copied()).collect();
        let (Some(lead), Some(last)) = (leads.first(), leads.last()) else { return Vec::new() };
        if leads.len() < 2 {
            return Vec::new();
        }
        let forward = layout.stages.iter().skip(1).zip(leads.windows(2)).filter_map(|(stage, pair)| match pair {
            [from, to] => Some((*from, *to, self.cut_bytes(stage.layers.start) * tokens)),
            _ => None,
        });
        let hops = forward.chain([(*last, *lead, RESULT_BYTES * tokens)]);
        hops.filter_map(|(from, to, bytes)| self.way(from, to, WayKind::Hop, bytes, self.hop_seconds(from, to, bytes))).collect()
    }

    fn groups(&self, layout: &Layout) -> Vec<PlannedWay> {
        let group = |stage: &LayoutStage| {
            let (from, to) = self.slowest_pair(&stage.nodes)?;
            let seconds = self.stage(stage, Step::decode(1.0), &stage.nodes)?.links;
            self.way(from, to, WayKind::Group, self.stream_bytes(), seconds)
        };
        layout.stages.iter().filter_map(group).collect()
    }

    fn slowest_pair(&self, nodes: &[usize]) -> Option<(usize, usize)> {
        let worst = self.ways.worst(nodes)?;
        let pairs = nodes.iter().enumerate().flat_map(|(i, from)| nodes.iter().skip(i + 1).map(move |to| (*from, *to)));
        pairs.into_iter().find(|(from, to)| self.ways.between(*from, *to) == worst)
    }

    fn way(&self, from: usize, to: usize, kind: WayKind, bytes: f64, seconds: f64) -> Option<PlannedWay> {
        let way = self.ways.between(from, to);
        let (from, to) = (self.nodes.get(from)?.node, self.nodes.get(to)?.node);
        Some(PlannedWay {
            from: from.id.clone(),
            from_name: from.name.clone(),
            to: to.id.clone(),
            to_name: to.name.clone(),
            medium: way.medium,
            address: way.address.clone(),
            kind,
            bytes: bytes as u64,
            seconds,
        })
    }

    /// Sequences are dealt into as many groups as there are stages. A group comes around again when the slowest stage has served all groups,
    /// or when it has been through all stages, whichever takes longer.
    fn many(&self, layout: &Layout) -> Option<f64> {
        let requests = f64::from(self.requests.max(1));
        let groups = requests.min(layout.stages.len() as f64).max(1.0);
        let tokens = (requests / groups).ceil();
        let stages = self.seconds(layout, Step::decode(tokens), true)?;
        let slowest = stages.iter().map(|stage| stage.all()).fold(0.0, f64::max);
        let hops: f64 = self.hops(layout, tokens).iter().map(|hop| hop.seconds).sum();
        let around = stages.iter().map(|stage| stage.all()).sum::<f64>() + hops;
        Some(requests / (groups * slowest).max(around).max(1e-9))
    }

    /// Parts of a prompt follow each other through the stages.
    fn prefill(&self, layout: &Layout) -> Option<f64> {
        if layout
            .stages
            .iter()
            .flat_map(|stage| &stage.nodes)
            .any(|place| self.nodes.get(*place).is_none_or(|node| node.matmul_rate.is_none()))
        {
            return None;
        }
        let stages = self.seconds(layout, Step::prefill(), true)?;
        let hops: Vec<f64> = self.hops(layout, PREFILL_TOKENS).iter().map(|hop| hop.seconds).collect();
        let slowest = stages.iter().map(|stage| stage.all()).chain(hops.iter().copied()).fold(0.0, f64::max);
        let first: f64 = stages.iter().map(|stage| stage.all()).chain(hops).sum();
        Some(PREFILL_STEPS * PREFILL_TOKENS / (first + (PREFILL_STEPS - 1.0) * slowest).max(1e-9))
    }

    fn load_seconds(&self, layout: &Layout) -> f64 {
        let stage = |stage: &LayoutStage| {
            let group = self.sizes.group(&stage.shares).ok();
            let bytes = group.iter().flat_map(|group| group.ranks.iter().map(|costs| costs.weights(&stage.layers))).max();
            bytes.unwrap_or(0) as f64 / LOAD_BYTES_PER_SECOND
        };
        layout.stages.iter().map(stage).fold(0.0, f64::max)
    }
}

//! Layouts that hold a training job: pipelines, replicas, replicas of pipelines, tensor groups.

use super::super::{
    Candidate, WhyNot,
    layout::{Layout, LayoutStage},
    split,
    told::reduced,
};
use super::{
    TrainingOptions,
    memory::{Micro, Model, RankCosts},
    pace::{NodePace, Pace, Path, TensorGroup},
};
use mlx_cluster_common::{
    plan::{Rank, Stage},
    spec::{ModelSpec, Part},
    tensor::{TensorPlace, rank_model},
    training::{MICRO_TOKENS_MIN, PIECE_TOKENS_MIN, Parallel},
    units::Bytes,
    weights::WeightMap,
};
use std::{collections::BTreeMap, ops::Range};

/// With more, the last bit of waiting is not worth the smaller products.
const MICRO_BATCHES_A_STAGE: u32 = 4;
/// With every node filled less than this, time decides about the cuts; else memory may.
const ROOMY: f64 = 0.95;

/// A layout that fits, and what it takes.
pub(super) struct Trial {
    pub(super) layout: Layout,
    pub(super) parallel: Parallel,
    pub(super) micro_batch_rows: u32,
    pub(super) stages: Vec<Stage>,
    /// Of a batch; None where a node's speed is not known.
    pub(super) seconds: Option<f64>,
    /// Bytes that the replicas of a stage add up.
    pub(super) gradients: u64,
}

/// A replica's node on one stage.
struct Seat<'a> {
    place: usize,
    candidate: &'a Candidate<'a>,
    rows: u32,
    micro_batches: u64,
    micro: Micro,
    pace: Option<NodePace>,
}

pub(super) struct Layouts<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) map: &'a WeightMap,
    pub(super) options: &'a TrainingOptions,
    /// Of the whole model.
    pub(super) whole: &'a RankCosts,
    pub(super) pace: &'a Pace<'a>,
    pub(super) nodes: &'a [Candidate<'a>],
    /// By shares.
    groups: BTreeMap<Vec<u32>, TensorGroup>,
}

impl<'a> Layouts<'a> {
    pub(super) fn new(
        spec: &'a ModelSpec,
        map: &'a WeightMap,
        options: &'a TrainingOptions,
        whole: &'a RankCosts,
        pace: &'a Pace<'a>,
    ) -> Self {
        Self { spec, map, options, whole, pace, nodes: pace.nodes, groups: BTreeMap::new() }
    }

    /// `places.len() / n_stages` replicas of a pipeline over these nodes, the most capable on the first stage; None where that does not fit.
    /// `cuts`: the layers of each stage as told.
    pub(super) fn grid(&self, places: &[usize], n_stages: usize, cuts: Option<&[Range<u32>]>) -> Option<Trial> {
        let n_replicas = places.len().checked_div(n_stages)?;
        if n_stages > 1 && self.shares_embedding() {
            return None;
        }
        if n_replicas == 0 || n_replicas * n_stages != places.len() || n_replicas > self.options.batch_size as usize {
            return None;
        }
        let stages: Vec<Vec<usize>> = places.chunks(n_replicas).map(|stage| self.fastest_first(stage)).collect();
        let rows = deal(self.options.batch_size, &self.speeds(&stages));
        let most = rows.iter().copied().max()?;
        // A replica may get all of a small batch.
        let wished = if n_stages > 1 { self.micro_rows(most, n_stages as u32) } else { most.max(self.piece_rows()) };
        halves(wished).find_map(|micro_rows| self.seated(&stages, &rows, micro_rows, cuts))
    }

    /// Whether the model has to be on one stage, for its embedding is trained and is the head too.
    pub(super) fn shares_embedding(&self) -> bool {
        self.options.role.trains_tied_embedding(self.spec, self.map)
    }

    /// Rows of a micro-batch of a pipeline, of so many in a batch. While its first one goes to the last stage and the last one comes back, stages
    /// wait: in all for the time of `stages - 1` micro-batches.
    fn micro_rows(&self, rows: u32, stages: u32) -> u32 {
        let whole = self.piece_rows();
        if rows <= whole {
            return whole;
        }
        let least = MICRO_TOKENS_MIN.div_ceil(self.options.tokens_per_row().max(1));
        rows.div_ceil(MICRO_BATCHES_A_STAGE * stages).max(least).min(rows)
    }

    /// Rows that are not cut into smaller pieces, as far as a batch has them: a replica may get all of a small batch.
    fn piece_rows(&self) -> u32 {
        PIECE_TOKENS_MIN.div_ceil(self.options.tokens_per_row().max(1)).min(self.options.batch_size)
    }

    fn rate(&self, place: usize) -> Option<f64> {
        self.nodes.get(place)?.matmul_rate
    }

    /// So that the first ranks of all stages are one replica, and so on.
    fn fastest_first(&self, stage: &[usize]) -> Vec<usize> {
        let mut stage = stage.to_vec();
        stage.sort_by(|a, b| self.rate(*b).unwrap_or(0.0).total_cmp(&self.rate(*a).unwrap_or(0.0)).then(a.cmp(b)));
        stage
    }

    /// Of each replica that of its slowest node; all the same where one is not known.
    fn speeds(&self, stages: &[Vec<usize>]) -> Vec<f64> {
        let n_replicas = stages.first().map_or(0, Vec::len);
        let speed = |replica: usize| {
            let rates: Option<Vec<f64>> = stages.iter().map(|stage| self.rate(*stage.get(replica)?)).collect();
            rates.map(|rates| rates.into_iter().fold(f64::INFINITY, f64::min))
        };
        (0..n_replicas).map(speed).collect::<Option<Vec<f64>>>().unwrap_or_else(|| vec![1.0; n_replicas])
    }

    fn seats(&self, stages: &[Vec<usize>], rows: &[u32], micro_rows: u32) -> Option<Vec<Vec<Seat<'a>>>> {
        let busy: Vec<usize> = stages.iter().flatten().copied().collect();
        let tokens = self.options.tokens_per_row();
        let seat = |place: usize, rows: u32| {
            let rows = rows.max(self.piece_rows());
            let own = micro_rows.min(rows).max(1);
            Some(Seat {
                place,
                candidate: self.nodes.get(place)?,
                rows: own,
                micro_batches: u64::from(rows.div_ceil(own)),
                micro: self.whole.micro(own, tokens),
                pace: self.pace.node(self.whole, place, &busy, own),
            })
        };
        stages.iter().map(|stage| stage.iter().zip(rows).map(|(place, rows)| seat(*place, *rows)).collect()).collect()
    }

    fn seated(&self, stages: &[Vec<usize>], rows: &[u32], micro_rows: u32, cuts: Option<&[Range<u32>]>) -> Option<Trial> {
        let seats = self.seats(stages, rows, micro_rows)?;
        let cuts = match cuts {
            Some(cuts) => cuts.to_vec(),
            None => self.cuts(&seats)?,
        };
        let shares = reduced(rows.to_vec());
        let n_stages = seats.len();
        let mut layout = Layout { stages: Vec::new() };
        let mut planned = Vec::new();
        for ((number, seats), layers) in seats.iter().enumerate().zip(&cuts) {
            let rank = |(seat, share): (&Seat<'_>, &u32)| {
                let rank = rank(self.whole, seat.candidate, layers, &seat.micro, seat.in_flight(n_stages - number), *share);
                (rank.needed() <= rank.usable).then_some(rank)
            };
            let ranks: Option<Vec<Rank>> = seats.iter().zip(&shares).map(rank).collect();
            planned.push(Stage { layers: layers.clone(), ranks: ranks? });
            let nodes = seats.iter().map(|seat| seat.place).collect();
            layout.stages.push(LayoutStage { layers: layers.clone(), nodes, shares: shares.clone() });
        }
        Some(Trial {
            seconds: self.seconds(&seats, &layout),
            layout,
            parallel: Parallel::Data,
            micro_batch_rows: micro_rows.min(rows.iter().copied().max()?.max(self.piece_rows())),
            stages: planned,
            gradients: cuts.iter().map(|layers| self.whole.gradients(layers)).max().unwrap_or(0),
        })
    }

    /// So that the slowest stage is fastest; where speeds are not known or memory is scarce, so that the fullest node is least full.
    fn cuts(&self, seats: &[Vec<Seat<'_>>]) -> Option<Vec<Range<u32>>> {
        let (n_stages, n_layers) = (seats.len(), self.spec.n_layers());
        let filled = |stage: usize, layers: &Range<u32>| {
            let fill = |seat: &Seat<'_>| {
                let needed = self.whole.needed(layers, &seat.micro, seat.in_flight(n_stages - stage));
                needed as f64 / seat.candidate.node.usable_memory.0.max(1) as f64
            };
            Some(seats.get(stage)?.iter().map(fill).fold(0.0, f64::max)).filter(|filled| *filled <= 1.0)
        };
        let seconds = |stage: usize, layers: Range<u32>| {
            filled(stage, &layers).filter(|filled| n_stages == 1 || *filled <= ROOMY)?;
            let batch = |seat: &Seat<'_>| Some(seat.pace.as_ref()?.seconds(&layers) * seat.micro_batches as f64);
            seats.get(stage)?.iter().map(batch).try_fold(0.0, |most: f64, seconds| Some(most.max(seconds?)))
        };
        let are_known = seats.iter().flatten().all(|seat| seat.pace.is_some());
        let by_time = are_known.then(|| split::best(n_layers, n_stages, seconds)).flatten();
        by_time.or_else(|| split::best(n_layers, n_stages, |stage, layers| filled(stage, &layers)))
    }

    fn seconds(&self, seats: &[Vec<Seat<'_>>], layout: &Layout) -> Option<f64> {
        let n_replicas = seats.first().map_or(0, Vec::len);
        let replica = |rank: usize| {
            let own: Option<Vec<&Seat<'_>>> = seats.iter().map(|stage| stage.get(rank)).collect();
            let own = own?;
            let layers = || layout.stages.iter().map(|stage| &stage.layers);
            let stages: Option<Vec<f64>> =
                own.iter().zip(layers()).map(|(seat, layers)| Some(seat.pace.as_ref()?.seconds(layers))).collect();
            let hop = |(pair, layers): (&[&Seat<'_>], &Range<u32>)| match pair {
                [from, to] => self.pace.hop(from.place, to.place, layers.start, from.rows),
                _ => 0.0,
            };
            let hops = own.windows(2).zip(layers().skip(1)).map(hop).collect();
            Some(Path { stages: stages?, hops, micro_batches: own.first()?.micro_batches }.seconds())
        };
        let slowest = (0..n_replicas).map(replica).try_fold(0.0, |most: f64, seconds| Some(most.max(seconds?)))?;
        let mut after = 0.0f64;
        for stage in &layout.stages {
            let adding = self.pace.adding_up(&stage.nodes, self.whole.gradients(&stage.layers));
            for place in &stage.nodes {
                after = after.max(adding + self.pace.updating(*place, self.whole.state(&stage.layers))?);
            }
        }
        Some(slowest + after)
    }

    /// One stage over these nodes, whose matrices are split in these shares; None where that does not fit.
    pub(super) fn tensor(&mut self, places: &[usize], shares: &[u32]) -> Result<Option<Trial>, WhyNot> {
        let shares = reduced(shares.to_vec());
        if !self.groups.contains_key(&shares) {
            let group = self.split(&shares)?;
            self.groups.insert(shares.clone(), group);
        }
        let Some(group) = self.groups.get(&shares) else { return Ok(None) };
        Ok(halves(self.options.batch_size).find_map(|rows| self.in_parts(group, places, &shares, rows)))
    }

    fn split(&self, shares: &[u32]) -> Result<TensorGroup, WhyNot> {
        let mut group = TensorGroup { ranks: Vec::new(), sums: Vec::new(), end_sums: 0 };
        for rank in 0..shares.len() as u32 {
            let place = TensorPlace { rank, shares: shares.to_vec() };
            let model = rank_model(self.spec, self.map, &place)
                .map_err(|cause| WhyNot::Split { shares: shares.to_vec(), cause: cause.to_string() })?;
            if rank == 0 {
                let count = |part| model.n_collectives(part) as u32;
                group.sums = (0..self.spec.n_layers()).map(|layer| count(Part::Layer(layer))).collect();
                group.end_sums = count(Part::Embedding) + count(Part::LayerInputs) + count(Part::Head);
            }
            let (own, whole) = (Model { spec: &model.spec, map: &model.weights }, Model { spec: self.spec, map: self.map });
            group.ranks.push(RankCosts::new(own, whole, &self.options.role));
        }
        Ok(group)
    }

    fn in_parts(&self, group: &TensorGroup, places: &[usize], shares: &[u32], rows: u32) -> Option<Trial> {
        let layers = 0..self.spec.n_layers();
        let mut ranks = Vec::new();
        for ((costs, place), share) in group.ranks.iter().zip(places).zip(shares) {
            let micro = costs.micro(rows, self.options.tokens_per_row());
            let rank = rank(costs, self.nodes.get(*place)?, &layers, &micro, 1, *share);
            ranks.push((rank.needed() <= rank.usable).then_some(rank)?);
        }
        let micro_batches = f64::from(self.options.batch_size.div_ceil(rows));
        let updating = || -> Option<f64> {
            let each = group.ranks.iter().zip(places).map(|(costs, place)| self.pace.updating(*place, costs.state(&layers)));
            each.into_iter().try_fold(0.0, |most: f64, seconds| Some(most.max(seconds?)))
        };
        let seconds = self.pace.group(group, places, rows).zip(updating()).map(|(each, updating)| each * micro_batches + updating);
        Some(Trial {
            layout: Layout::group(layers.end, places.to_vec(), shares.to_vec()),
            parallel: Parallel::Tensor,
            micro_batch_rows: rows,
            stages: vec![Stage { layers, ranks }],
            seconds,
            gradients: 0,
        })
    }
}

impl Seat<'_> {
    fn in_flight(&self, stages_to_come: usize) -> u64 {
        in_flight(stages_to_come, self.micro_batches)
    }
}

/// Of so many micro-batches those that a stage keeps, with so many stages from it to the end: the last one goes back at once, others run ahead by
/// one more than there are stages after them.
pub(super) fn in_flight(stages_to_come: usize, micro_batches: u64) -> u64 {
    let most = if stages_to_come > 1 { stages_to_come as u64 + 1 } else { 1 };
    micro_batches.clamp(1, most)
}

fn rank(costs: &RankCosts, candidate: &Candidate<'_>, layers: &Range<u32>, micro: &Micro, in_flight: u64, share: u32) -> Rank {
    Rank {
        node: candidate.node.id.clone(),
        node_name: candidate.node.name.clone(),
        share,
        weights: Bytes(costs.weights(layers)),
        cache: Bytes(costs.state(layers)),
        working: Bytes(costs.working(layers, micro, in_flight)),
        usable: candidate.node.usable_memory,
    }
}

/// A number, its half, and so on down to 1.
fn halves(from: u32) -> impl Iterator<Item = u32> {
    std::iter::successors(Some(from.max(1)), |rows| (*rows > 1).then(|| rows.div_ceil(2)))
}

/// Rows for each replica, at least one, so that all are done at about the same time. There are no more replicas than rows.
fn deal(rows: u32, speeds: &[f64]) -> Vec<u32> {
    let all: f64 = speeds.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let spare = f64::from(rows.saturating_sub(speeds.len() as u32));
    let mut dealt: Vec<u32> = speeds.iter().map(|speed| 1 + (spare * speed / all) as u32).collect();
    let sum = dealt.iter().map(|own| u64::from(*own)).sum::<u64>();
    for _ in sum..u64::from(rows) {
        let done = |own: &u32, speed: &f64| f64::from(*own + 1) / speed;
        let next = dealt.iter().zip(speeds).enumerate().min_by(|(_, (a, s)), (_, (b, t))| done(a, s).total_cmp(&done(b, t)));
        let next = next.map_or(0, |(rank, _)| rank);
        if let Some(own) = dealt.get_mut(next) {
            *own += 1;
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_where_they_are_done_first() {
        assert_eq!(deal(10, &[3.0, 2.0]), [6, 4]);
        assert_eq!(deal(4, &[3.0, 1.0]), [3, 1]);
        assert_eq!(deal(3, &[1.0, 1.0]), [2, 1]);
        assert_eq!(deal(2, &[1e12, 1.0]), [1, 1], "each has one");
        assert_eq!(deal(100, &[99.0, 1.0]), [99, 1]);
        assert_eq!(deal(u32::MAX, &[1.0, 2.0, 3.0]).iter().map(|rows| u64::from(*rows)).sum::<u64>(), u64::from(u32::MAX));
    }

    #[test]
    fn memory_is_tried_with_half_the_rows() {
        assert_eq!(halves(6).collect::<Vec<_>>(), [6, 3, 2, 1]);
        assert_eq!(halves(0).collect::<Vec<_>>(), [1]);
    }
}

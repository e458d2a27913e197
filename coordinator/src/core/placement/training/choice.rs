//! The choice among layouts by the time that a batch is predicted to take, and why it came out so.

use super::super::{WhyNot, layout::Layout, search::proportional};
use super::{Planner, Trial, prefix};
use mlx_cluster_common::{prediction::Alternative, training::Parallel, units::Bytes};
use std::{collections::BTreeMap, fmt};

/// Up to so many nodes every set of them is tried; of more the most capable ones, and each alone.
const ALL_SETS_NODES: usize = 5;
/// A layout over more workers has to be so much faster.
const WORTH_IT: f64 = 1.05;

pub(super) struct Choice {
    pub(super) trial: Trial,
    pub(super) way: Way,
    pub(super) alternatives: Vec<Alternative>,
}

/// How a layout was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Told,
    Asked,
    Fastest,
    /// Speeds were not known.
    Fewest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Single,
    Pipeline,
    Replicas,
    Pipelines,
    Tensor,
}

impl Kind {
    fn of(layout: &Layout, parallel: Parallel) -> Self {
        match (layout.stages.len(), layout.n_nodes(), parallel) {
            (1, 1, _) => Kind::Single,
            (_, _, Parallel::Tensor) => Kind::Tensor,
            (1, _, Parallel::Data) => Kind::Replicas,
            (stages, nodes, _) if stages == nodes => Kind::Pipeline,
            _ => Kind::Pipelines,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Single => "one worker",
            Kind::Pipeline => "a pipeline",
            Kind::Replicas => "replicas",
            Kind::Pipelines => "replicas of a pipeline",
            Kind::Tensor => "a tensor group",
        })
    }
}

impl Choice {
    pub(super) fn forced(trial: Trial, way: Way) -> Self {
        Self { trial, way, alternatives: Vec::new() }
    }
}

impl Planner<'_> {
    /// As few workers as get within a few per cent of the fastest; where speeds are not known, as few as hold it.
    pub(super) fn fastest(&mut self) -> Result<Option<Choice>, WhyNot> {
        let mut trials = Vec::new();
        for places in self.sets() {
            self.try_all(&places, &mut trials)?;
        }
        let are_known = trials.iter().all(|trial| trial.seconds.is_some());
        let seconds = |trial: &Trial| trial.seconds.filter(|_| are_known).unwrap_or(0.0);
        let best = trials.iter().map(seconds).fold(f64::INFINITY, f64::min);
        let key = |trial: &Trial| (trial.layout.n_nodes(), seconds(trial), Kind::of(&trial.layout, trial.parallel));
        let good = trials.iter().enumerate().filter(|(_, trial)| seconds(trial) <= best * WORTH_IT);
        let compared = |a: &Trial, b: &Trial| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal);
        let Some((chosen, _)) = good.min_by(|(_, a), (_, b)| compared(a, b)) else { return Ok(None) };
        let way = if are_known { Way::Fastest } else { Way::Fewest };
        let trial = trials.swap_remove(chosen);
        let alternatives = if are_known { self.alternatives(&trials, &trial) } else { Vec::new() };
        Ok(Some(Choice { trial, way, alternatives }))
    }

    /// Fewest nodes first, of these the most capable.
    fn sets(&self) -> Vec<Vec<usize>> {
        let n = self.nodes().len();
        let least = self.min_workers();
        let mut sets: Vec<Vec<usize>> = match n <= ALL_SETS_NODES {
            true => (1..1usize << n).map(|mask| (0..n).filter(|place| mask >> place & 1 == 1).collect()).collect(),
            false => (0..n).map(|place| vec![place]).chain((2..=n).map(prefix)).collect(),
        };
        sets.retain(|set| set.len() >= least);
        sets.sort_by_key(Vec::len);
        sets
    }

    fn try_all(&mut self, places: &[usize], trials: &mut Vec<Trial>) -> Result<(), WhyNot> {
        let (n, n_layers) = (places.len(), self.layouts.spec.n_layers() as usize);
        let stages = (1..=n.min(n_layers)).filter(|stages| n.is_multiple_of(*stages));
        trials.extend(stages.filter_map(|stages| self.layouts.grid(places, stages, None)));
        if n > 1 {
            trials.extend(self.group(places)?);
        }
        Ok(())
    }

    /// One tensor group: in equal parts or in proportion to speed or memory, whichever is fastest; where that is not known, the first that fits.
    pub(super) fn group(&mut self, places: &[usize]) -> Result<Option<Trial>, WhyNot> {
        let candidates = || places.iter().filter_map(|place| self.nodes().get(*place));
        let speeds = proportional(candidates().map(|node| node.matmul_rate.unwrap_or(0.0)));
        let memories = proportional(candidates().map(|node| node.node.usable_memory.0 as f64));
        let mut best: Option<Trial> = None;
        for shares in [vec![1; places.len()], speeds, memories] {
            let Some(trial) = self.layouts.tensor(places, &shares)? else { continue };
            let is_faster = |best: &Trial| trial.seconds.zip(best.seconds).is_some_and(|(new, old)| new < old);
            if best.as_ref().is_none_or(is_faster) {
                best = Some(trial);
            }
        }
        Ok(best)
    }

    /// The best of each kind but the chosen one's, and why it lost.
    fn alternatives(&self, trials: &[Trial], taken: &Trial) -> Vec<Alternative> {
        let own = Kind::of(&taken.layout, taken.parallel);
        let mut best: BTreeMap<Kind, &Trial> = BTreeMap::new();
        for trial in trials {
            let known = best.entry(Kind::of(&trial.layout, trial.parallel)).or_insert(trial);
            if trial.seconds < known.seconds {
                *known = trial;
            }
        }
        let alternative = |kind: Kind| {
            let (layout, reason) = match best.get(&kind) {
                _ if kind == own => return None,
                Some(trial) => (format!("{kind} {}", trial.layout.text(self.nodes())), lost(trial, taken)?),
                None => (kind.to_string(), self.why_none(kind)?),
            };
            Some(Alternative { layout, decode_tokens_per_second: None, decode_tokens_per_second_of_many: None, reason })
        };
        [Kind::Single, Kind::Pipeline, Kind::Replicas, Kind::Pipelines, Kind::Tensor].into_iter().filter_map(alternative).collect()
    }

    /// None for what was not asked for, or takes more workers than there are.
    fn why_none(&self, kind: Kind) -> Option<String> {
        let (n, rows) = (self.nodes().len(), self.options().batch_size);
        let (whole, all) = (self.layouts.whole, 0..self.layouts.spec.n_layers());
        let alone = Bytes(whole.needed(&all, &whole.micro(1, self.options().tokens_per_row()), 1));
        let alone = || format!("does not fit: one row through the whole model takes {alone}");
        match kind {
            Kind::Single if self.min_workers() > 1 => None,
            Kind::Single => Some(alone()),
            _ if n < 2 => None,
            Kind::Pipeline if self.layouts.shares_embedding() => Some("factors of the embedding are the head's too".to_owned()),
            Kind::Pipeline => (all.end > 1).then(|| "does not fit".to_owned()),
            Kind::Replicas if rows < 2 => Some("a batch of one row is for one replica".to_owned()),
            Kind::Replicas => Some(alone()),
            Kind::Pipelines => None,
            Kind::Tensor => Some("does not fit".to_owned()),
        }
    }

    pub(super) fn why(&self, trial: &Trial, way: Way) -> String {
        let kind = Kind::of(&trial.layout, trial.parallel);
        let n = trial.layout.n_nodes();
        let over = if n == 1 { kind.to_string() } else { format!("{kind} over {n} workers") };
        let cuts = match trial.seconds {
            _ if trial.layout.stages.len() < 2 => "",
            Some(_) => "; layers balanced by predicted time, as far as memory allows",
            None => "; layers in proportion to usable memory",
        };
        let mut why = match way {
            Way::Told => format!("{over}, layers split as told"),
            Way::Asked => format!("{over}, as asked{cuts}"),
            Way::Fastest => format!("{over}: predicted to be fastest{cuts}"),
            Way::Fewest => format!("{over}: as few workers as hold it, since not all speeds were measured{cuts}"),
        };
        let places = (0..).zip(self.nodes());
        let spare: Vec<_> = places.filter(|(place, _)| !trial.layout.uses(*place)).map(|(_, node)| node.node.name.as_str()).collect();
        if !spare.is_empty() {
            why += &format!("; not used: {}", spare.join(", "));
        }
        let used: Vec<usize> = trial.layout.stages.iter().flat_map(|stage| stage.nodes.iter().copied()).collect();
        let mut pairs = used.iter().enumerate().flat_map(|(i, from)| used.iter().skip(i + 1).map(move |to| (*from, *to)));
        if trial.seconds.is_some() && pairs.any(|(from, to)| self.layouts.pace.ways.between(from, to).address.is_none()) {
            why += "; links that were not measured count as 1 Gb/s and 0.5 ms there and back";
        }
        why
    }
}

fn lost(trial: &Trial, taken: &Trial) -> Option<String> {
    let (theirs, ours) = (trial.seconds?, taken.seconds?);
    let (n_theirs, n_ours) = (trial.layout.n_nodes(), taken.layout.n_nodes());
    Some(match theirs < ours {
        true => {
            format!("{theirs:.2} s a batch, only {:.0} % less, with {n_theirs} workers instead of {n_ours}", 100.0 * (1.0 - theirs / ours))
        }
        false => format!("{theirs:.2} s a batch, {:.0} % more", 100.0 * (theirs / ours.max(1e-9) - 1.0)),
    })
}

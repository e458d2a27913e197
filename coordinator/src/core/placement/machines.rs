//! What machines and the ways between them can do: measured, averaged over equals, or assumed.

use super::Candidate;
use mlx_cluster_common::{
    engine::NodeFacts,
    links::{self, LinkFacts, Medium, TYPICAL_BYTES},
};
use std::collections::BTreeMap;

/// Between nodes that nobody measured: gigabit Ethernet.
pub(super) const ASSUMED_BYTES_PER_SECOND: f64 = 125e6;
pub(super) const ASSUMED_ROUND_TRIP_SECONDS: f64 = 0.5e-3;
/// TCP through Thunderbolt takes some 100 microseconds there and back; what is below this is RDMA.
const RDMA_ROUND_TRIP_SECONDS: f64 = 60e-6;

/// The best way from one node to another.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Way {
    /// Of a message of a few bytes, one way.
    pub(super) latency: f64,
    pub(super) bytes_per_second: f64,
    pub(super) medium: Medium,
    /// None where it is assumed.
    pub(super) address: Option<String>,
}

/// By places in the list of candidates.
pub(super) struct Ways {
    ways: BTreeMap<(usize, usize), Way>,
    assumed: Way,
}

impl Way {
    fn new(link: &LinkFacts) -> Self {
        Self {
            latency: link.round_trip_seconds / 2.0,
            bytes_per_second: link.bytes_per_second,
            medium: link.medium,
            address: Some(link.address.clone()),
        }
    }

    pub(super) fn seconds(&self, bytes: f64) -> f64 {
        self.latency + bytes / self.bytes_per_second
    }

    pub(super) fn is_rdma(&self) -> bool {
        self.medium == Medium::Thunderbolt && self.latency * 2.0 < RDMA_ROUND_TRIP_SECONDS
    }

    /// A worse one for every use; both may be pieces of a ring.
    pub(super) fn worse<'a>(&'a self, other: &'a Way) -> &'a Way {
        if other.seconds(TYPICAL_BYTES as f64) > self.seconds(TYPICAL_BYTES as f64) { other } else { self }
    }
}

impl Ways {
    pub(super) fn new(nodes: &[Candidate<'_>], links: &[LinkFacts]) -> Self {
        let place: BTreeMap<_, _> = nodes.iter().enumerate().map(|(place, candidate)| (&candidate.node.id, place)).collect();
        let mut between: BTreeMap<(usize, usize), Vec<LinkFacts>> = BTreeMap::new();
        for link in links.iter().filter(|link| is_sane(link)) {
            if let (Some(from), Some(to)) = (place.get(&link.from), place.get(&link.to)) {
                between.entry((*from, *to)).or_default().push(link.clone());
            }
        }
        let best = |(pair, links): (&(usize, usize), &Vec<LinkFacts>)| {
            links::best_first(links, &links.first()?.from, &links.first()?.to).first().map(|link| (*pair, Way::new(link)))
        };
        let ways = between.iter().filter_map(best).collect();
        let assumed = Way {
            latency: ASSUMED_ROUND_TRIP_SECONDS / 2.0,
            bytes_per_second: ASSUMED_BYTES_PER_SECOND,
            medium: Medium::Unknown,
            address: None,
        };
        Self { ways, assumed }
    }

    /// As measured from the first, or from the second, or assumed.
    pub(super) fn between(&self, from: usize, to: usize) -> &Way {
        self.ways.get(&(from, to)).or_else(|| self.ways.get(&(to, from))).unwrap_or(&self.assumed)
    }

    /// The worst of the ways between these, which sets the pace of their collectives; None for one node.
    pub(super) fn worst(&self, nodes: &[usize]) -> Option<&Way> {
        let pairs = nodes.iter().enumerate().flat_map(|(i, from)| nodes.iter().skip(i + 1).map(move |to| (*from, *to)));
        pairs.map(|(from, to)| self.between(from, to)).reduce(Way::worse)
    }

    /// Whether both share one memory.
    pub(super) fn is_one_machine(&self, a: usize, b: usize) -> bool {
        self.between(a, b).medium == Medium::Loopback
    }
}

/// The mean over machines of this kind, so that noise in the measurement does not tell equals apart. None unless all were measured.
pub(super) fn mean_over_equals(node: &NodeFacts, nodes: &[NodeFacts], rate: impl Fn(&NodeFacts) -> f64) -> Option<f64> {
    let kind = |node: &NodeFacts| (node.os.clone(), node.chip.clone(), node.total_memory);
    let mut measured: Vec<f64> = nodes.iter().filter(|other| kind(other) == kind(node)).map(rate).collect();
    // The order of the nodes must not show in the last digit of the sum.
    measured.sort_by(f64::total_cmp);
    let all_known = measured.iter().all(|rate| rate.is_finite() && *rate > 0.0);
    all_known.then(|| measured.iter().sum::<f64>() / measured.len() as f64)
}

fn is_sane(link: &LinkFacts) -> bool {
    let LinkFacts { round_trip_seconds, bytes_per_second, .. } = link;
    round_trip_seconds.is_finite() && *round_trip_seconds >= 0.0 && bytes_per_second.is_finite() && *bytes_per_second > 0.0
}

//! What lies between nodes, as measured.

use crate::ids::NodeId;
use serde::{Deserialize, Serialize};

/// One way from a node to another, measured from the first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LinkFacts {
    pub from: NodeId,
    pub to: NodeId,
    /// The interface that the first node sends through, as its system calls it; empty where unknown.
    pub interface: String,
    pub medium: Medium,
    /// The host of the second node that was reached, without a port.
    pub address: String,
    /// Of a message of a few bytes there and back, the median.
    pub round_trip_seconds: f64,
    /// Of a large message, one way.
    pub bytes_per_second: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Medium {
    Thunderbolt,
    Ethernet,
    #[serde(rename = "wifi")]
    WiFi,
    Loopback,
    #[default]
    Unknown,
}

/// The message that ways are compared by, when its size is not known: activations of some tokens.
pub const TYPICAL_BYTES: u64 = 64 << 10;

impl Medium {
    fn is_cable(self) -> bool {
        matches!(self, Medium::Thunderbolt | Medium::Ethernet | Medium::Loopback)
    }
}

impl std::fmt::Display for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Medium::Thunderbolt => "Thunderbolt",
            Medium::Ethernet => "Ethernet",
            Medium::WiFi => "Wi-Fi",
            Medium::Loopback => "loopback",
            Medium::Unknown => "unknown",
        })
    }
}

impl LinkFacts {
    /// Time for a message of so many bytes, one way.
    pub fn seconds(&self, bytes: u64) -> f64 {
        self.round_trip_seconds / 2.0 + bytes as f64 / self.bytes_per_second.max(1.0)
    }
}

/// The measured ways from one node to another, best first: by the time for a typical message, but never Wi-Fi before a cable that
/// answers sooner, since its throughput changes from moment to moment.
pub fn best_first<'a>(links: &'a [LinkFacts], from: &NodeId, to: &NodeId) -> Vec<&'a LinkFacts> {
    let mut ways: Vec<_> = links.iter().filter(|link| link.from == *from && link.to == *to).collect();
    let cable = ways.iter().filter(|link| link.medium.is_cable()).map(|link| link.round_trip_seconds).min_by(f64::total_cmp);
    let is_beaten = |link: &LinkFacts| link.medium == Medium::WiFi && cable.is_some_and(|cable| cable <= link.round_trip_seconds);
    ways.sort_by(|a, b| {
        let time = || a.seconds(TYPICAL_BYTES).total_cmp(&b.seconds(TYPICAL_BYTES));
        is_beaten(a).cmp(&is_beaten(b)).then_with(time).then_with(|| a.address.cmp(&b.address))
    });
    ways
}

/// The way that is taken from one node to another; None where none was measured.
pub fn best<'a>(links: &'a [LinkFacts], from: &NodeId, to: &NodeId) -> Option<&'a LinkFacts> {
    best_first(links, from, to).into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(address: &str, medium: Medium, round_trip_ms: f64, megabits_per_second: f64) -> LinkFacts {
        LinkFacts {
            from: "a".into(),
            to: "b".into(),
            interface: "if0".into(),
            medium,
            address: address.into(),
            round_trip_seconds: round_trip_ms / 1e3,
            bytes_per_second: megabits_per_second * 1e6 / 8.0,
        }
    }

    fn order(ways: &[LinkFacts]) -> Vec<&str> {
        best_first(ways, &"a".into(), &"b".into()).into_iter().map(|link| link.address.as_str()).collect()
    }

    #[test]
    fn time_is_latency_and_transfer() {
        let link = way("x", Medium::Ethernet, 2.0, 800.0);
        assert!((link.seconds(0) - 0.001).abs() < 1e-12 && (link.seconds(1_000_000) - 0.011).abs() < 1e-12);
    }

    #[test]
    fn the_way_with_the_least_time_comes_first() {
        let slow = way("slow", Medium::Ethernet, 0.2, 50.0);
        let fast = way("fast", Medium::Ethernet, 0.3, 1000.0);
        let bolt = way("bolt", Medium::Thunderbolt, 0.4, 20_000.0);
        assert_eq!(order(&[slow.clone(), fast.clone(), bolt.clone()]), ["bolt", "fast", "slow"]);
        let back = LinkFacts { from: "b".into(), to: "a".into(), ..bolt };
        let ways = [slow, back, fast];
        assert_eq!(order(&ways), ["fast", "slow"], "the other direction is not ours");
        assert_eq!(best(&ways, &"a".into(), &"c".into()), None);
    }

    #[test]
    fn wifi_never_goes_before_a_cable_that_answers_sooner() {
        let (air, cable) = (way("air", Medium::WiFi, 2.0, 900.0), way("cable", Medium::Ethernet, 0.3, 100.0));
        assert!(air.seconds(TYPICAL_BYTES) < cable.seconds(TYPICAL_BYTES));
        assert_eq!(order(&[air.clone(), cable.clone()]), ["cable", "air"]);
        let far = way("far", Medium::Ethernet, 30.0, 10.0);
        assert_eq!(order(&[far.clone(), air.clone()]), ["air", "far"], "a cable that answers later is no reason");
        assert_eq!(order(&[far, air, cable]), ["cable", "far", "air"]);
    }
}

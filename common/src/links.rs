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
    WiFi,
    Loopback,
    #[default]
    Unknown,
}

impl LinkFacts {
    /// Time for a message of so many bytes, one way.
    pub fn seconds(&self, bytes: u64) -> f64 {
        self.round_trip_seconds / 2.0 + bytes as f64 / self.bytes_per_second.max(1.0)
    }
}

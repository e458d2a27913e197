//! How fast a plan will be, as far as can be said before anything runs; and what else was thought of.

use crate::{ids::NodeId, links::Medium};
use serde::{Deserialize, Serialize};
use std::fmt;

/// See docs/planner.md for the model behind the numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// From local disks.
    pub load_seconds: f64,
    /// Of one long prompt; None where matrix products were not measured.
    pub prefill_tokens_per_second: Option<f64>,
    /// Of one request.
    pub decode_tokens_per_second: f64,
    /// Of `requests` at once, all together.
    pub decode_tokens_per_second_of_many: f64,
    pub requests: u32,
    /// Of the time of a token of one request: what passes while something is on its way between nodes.
    pub links_share: f64,
    pub ways: Vec<PlannedWay>,
}

/// A use of the way between two nodes, at decode of one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedWay {
    pub from: NodeId,
    pub from_name: String,
    pub to: NodeId,
    pub to_name: String,
    pub medium: Medium,
    /// Of the second node; None where nobody measured the way and a usual one is assumed.
    pub address: Option<String>,
    pub kind: WayKind,
    /// For each token.
    pub bytes: u64,
    /// For each token.
    pub seconds: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WayKind {
    /// From a stage to the next, or from the last back to the lead.
    Hop,
    /// The slowest way of a tensor-parallel group, which all of its collectives wait for.
    Group,
}

/// A layout that was not taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// As `--stages` takes it.
    pub layout: String,
    pub decode_tokens_per_second: Option<f64>,
    pub decode_tokens_per_second_of_many: Option<f64>,
    /// Why it lost.
    pub reason: String,
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "predicted: {:.1} tokens/s for one request, {:.1} for {} together",
            self.decode_tokens_per_second, self.decode_tokens_per_second_of_many, self.requests
        )?;
        if let Some(prefill) = self.prefill_tokens_per_second {
            write!(f, ", prompts at {prefill:.0} tokens/s")?;
        }
        write!(f, ", loads in {:.0} s from disk; links take {:.0} % of a token", self.load_seconds, 100.0 * self.links_share)?;
        for way in &self.ways {
            let kind = if way.kind == WayKind::Hop { "hop" } else { "sums" };
            write!(f, "\n  {kind} {} > {}: {:.0} us a token, {} ", way.from_name, way.to_name, 1e6 * way.seconds, way.medium)?;
            match &way.address {
                Some(address) => write!(f, "to {address}")?,
                None => write!(f, "link not measured, 1 Gb/s and 0.5 ms there and back assumed")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Alternative {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.layout)?;
        if let (Some(one), Some(many)) = (self.decode_tokens_per_second, self.decode_tokens_per_second_of_many) {
            write!(f, "{one:.1} tokens/s, {many:.1} for many; ")?;
        }
        f.write_str(&self.reason)
    }
}

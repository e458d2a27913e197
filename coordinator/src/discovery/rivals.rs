//! Two coordinators of one cluster name: finding out whether the other one lives, and which of them has to go.

use super::printable;
use mlx_cluster_common::ids::NodeId;
use mlx_cluster_proto::{
    net,
    wire::{self, Hello, cluster_client::ClusterClient},
};
use std::time::Duration;

const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// Who came first: by the clocks of the two machines, then by id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Unix milliseconds at the start. Clocks differ; the worst that a wrong one does is that the other coordinator gives way.
    pub started_ms: u64,
    pub id: NodeId,
}

/// Another coordinator of our cluster, as it announced itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rival {
    pub rank: Rank,
    pub name: String,
    pub addresses: Vec<String>,
}

/// Whether we have to go. A coordinator that holds workers stays; else the one that came first.
pub fn gives_way(ours: &Rank, theirs: &Rank, holds_workers: bool) -> bool {
    !holds_workers && theirs < ours
}

/// Asks whether a coordinator with this id answers there, now. A record of one that was killed outlives it by minutes.
pub async fn lives(rival: &Rival, hello: &Hello) -> bool {
    let Ok(channel) = net::connect(&rival.name, &rival.addresses).await else { return false };
    let request = wire::JoinRequest { hello: Some(hello.clone()), addresses: Vec::new() };
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, ClusterClient::new(channel).join(request)).await;
    let reply = answer.ok().and_then(Result::ok).and_then(|reply| reply.into_inner().hello);
    reply.is_some_and(|theirs| theirs.node == rival.rank.id.0 && theirs.cluster == hello.cluster)
}

impl Rival {
    /// For messages.
    pub fn place(&self) -> String {
        let address = self.addresses.first().map(String::as_str).unwrap_or("an unknown address");
        format!("{} at {address}", printable(&self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_one_without_workers_goes() {
        let rank = |started_ms, id: &str| Rank { started_ms, id: id.into() };
        assert!(gives_way(&rank(2, "a"), &rank(1, "b"), false));
        assert!(!gives_way(&rank(1, "b"), &rank(2, "a"), false));
        assert!(!gives_way(&rank(2, "a"), &rank(1, "b"), true));
        assert!(gives_way(&rank(1, "b"), &rank(1, "a"), false) && !gives_way(&rank(1, "a"), &rank(1, "b"), false));
    }
}

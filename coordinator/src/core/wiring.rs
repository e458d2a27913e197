//! Whom each engine of a deployment has to reach.

use super::{addresses, deployment::Deployment, members::Members};
use mlx_cluster_common::{
    engine::{EngineSpec, GroupLink, Link, Peer},
    ids::Epoch,
    links::LinkFacts,
};
use std::{net::SocketAddrV4, ops::Range};

/// An engine that serves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Serving {
    pub(super) port: u32,
    pub(super) group_port: u32,
    pub(super) incarnation: u64,
}

/// Who has to reach whom.
pub(super) struct Wiring<'a> {
    pub(super) deployment: &'a Deployment,
    pub(super) members: &'a Members,
    pub(super) serving: &'a [Serving],
    pub(super) links: Vec<LinkFacts>,
}

impl Wiring<'_> {
    pub(super) fn link(&self, engine: u32, epoch: Epoch) -> Option<Link> {
        let spec = self.deployment.engines.get(engine as usize)?;
        let first = engine - spec.place.rank;
        let stage = first..first + spec.place.ranks() as u32;
        let next = match self.next(spec, &stage) {
            Some(next) => Some(self.peer(engine, next)?),
            None => None,
        };
        let hands_on = spec.training.is_none() && spec.place.rank == 0;
        let ranks = stage.clone().skip(1).filter(|_| hands_on).map(|rank| self.peer(engine, rank)).collect::<Option<_>>()?;
        let group = if spec.place.is_alone() { None } else { Some(self.group(stage)?) };
        Some(Link { epoch, next, ranks, group })
    }

    /// The number of the engine that gets what this one makes of its steps; `stage` are the engines of its own stage.
    fn next(&self, spec: &EngineSpec, stage: &Range<u32>) -> Option<u32> {
        if spec.training.is_none() {
            let sends = spec.place.rank == 0 && spec.n_stages > 1;
            return sends.then_some(if spec.is_last() { 0 } else { stage.end });
        }
        let following = self.deployment.engines.get(stage.end as usize)?;
        // Each rank to its like: replicas are pipelines of their own, and the ranks of a tensor-parallel stage all hold the whole activations.
        Some(stage.end + spec.place.rank % following.place.ranks() as u32)
    }

    fn peer(&self, from: u32, to: u32) -> Option<Peer> {
        let port = self.serving.get(to as usize)?.port;
        let member = self.members.get(&self.deployment.rank(to)?.node)?;
        let (node, name) = (member.facts.id.clone(), member.facts.name.clone());
        Some(Peer { node, name, addresses: self.addresses(from, to, port)? })
    }

    /// In MLX's ring each rank connects to the one after it.
    fn group(&self, group: Range<u32>) -> Option<GroupLink> {
        let n = group.end - group.start;
        let mut link = GroupLink { addresses: Vec::new(), names: Vec::new(), incarnations: Vec::new() };
        for rank in 0..n {
            let (before, own) = (group.start + (rank + n - 1) % n, group.start + rank);
            let serving = self.serving.get(own as usize)?;
            let addresses = self.addresses(before, own, serving.group_port)?;
            // MLX's ring knows IPv4 alone.
            let best = addresses.iter().find(|address| address.parse::<SocketAddrV4>().is_ok()).or(addresses.first());
            link.addresses.push(best?.clone());
            link.names.push(self.deployment.name(own));
            link.incarnations.push(serving.incarnation);
        }
        Some(link)
    }

    /// Best first.
    fn addresses(&self, from: u32, to: u32, port: u32) -> Option<Vec<String>> {
        let member = |engine: u32| self.members.get(&self.deployment.rank(engine)?.node);
        let (from, to) = (member(from)?, member(to)?);
        Some(addresses::between(&from.facts, &to.facts, &to.reached, port, &self.links))
    }
}

//! The workers: who is connected, what they measured, what they were told to run and what they do run.

use super::{Now, addresses, event::Snapshot};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, NodeFacts, Peer},
    ids::{EngineId, NodeId},
    links::LinkFacts,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// A worker whose stream is gone for longer than this is lost.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// A lost worker is shown for so long.
const REMEMBERED: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Presence {
    Connected,
    Gone { since: Now, cause: String },
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) facts: NodeFacts,
    pub(super) reached: String,
    pub(super) presence: Presence,
    pub(super) engines: BTreeMap<EngineId, EngineState>,
    links: Vec<LinkFacts>,
    observed_version: u64,
    /// Never 0: that would leave a worker with what an earlier coordinator wanted.
    desired_version: u64,
    desired: Desired,
    /// It came, and was not told yet what is wanted.
    is_new: bool,
}

/// What one worker shall do.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Desired {
    pub(super) engines: Vec<EngineSpec>,
    /// Whom it shall measure the ways to.
    pub(super) neighbours: Vec<Peer>,
}

impl Member {
    pub(super) fn is_connected(&self) -> bool {
        self.presence == Presence::Connected
    }

    /// Why it counts as lost, if it does.
    pub(super) fn lost(&self, now: Now) -> Option<&str> {
        match &self.presence {
            Presence::Gone { since, cause } if now >= *since + GRACE => Some(cause),
            _ => None,
        }
    }

    pub(super) fn gone_since(&self) -> Option<Now> {
        match self.presence {
            Presence::Connected => None,
            Presence::Gone { since, .. } => Some(since),
        }
    }

    /// Whether it said that nothing runs any more, or cannot say anything.
    fn has_stopped(&self) -> bool {
        !self.is_connected() || (self.is_told() && self.engines.is_empty())
    }

    /// Whether what it said last is about what is wanted now.
    fn is_told(&self) -> bool {
        self.observed_version >= self.desired_version
    }

    /// Whether it said that this engine, which is not wanted any more, is gone, or cannot say anything.
    pub(super) fn is_rid_of(&self, engine: &EngineId) -> bool {
        !self.is_connected() || (self.is_told() && !self.engines.contains_key(engine))
    }
}

#[derive(Debug, Default)]
pub(super) struct Members {
    all: BTreeMap<NodeId, Member>,
    /// Rises with every change of the wanted state of any worker.
    version: u64,
    /// Rises whenever a worker comes or goes.
    pub(super) generation: u64,
    /// When a worker came last.
    pub(super) last_up: Now,
}

/// The wanted state of one worker, to be sent.
#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    pub(super) node: NodeId,
    pub(super) version: u64,
    pub(super) desired: Desired,
}

impl Members {
    /// A worker's stream stands; [`want`](Self::want) says what it shall be told.
    pub(super) fn up(&mut self, facts: NodeFacts, reached: String, now: Now) {
        self.generation += 1;
        self.last_up = now;
        let node = facts.id.clone();
        let (desired_version, desired) = self.all.remove(&node).map(|old| (old.desired_version, old.desired)).unwrap_or_default();
        let member = Member {
            facts,
            reached,
            presence: Presence::Connected,
            engines: BTreeMap::new(),
            links: Vec::new(),
            observed_version: 0,
            desired_version,
            desired,
            is_new: true,
        };
        self.all.insert(node, member);
    }

    pub(super) fn observed(&mut self, node: &NodeId, snapshot: Snapshot) {
        if let Some(member) = self.all.get_mut(node) {
            member.observed_version = snapshot.version;
            member.engines = snapshot.engines.into_iter().map(|status| (status.id, status.state)).collect();
            member.links = snapshot.links;
        }
    }

    /// Where a worker is now; true when that is news.
    pub(super) fn moved(&mut self, node: &NodeId, addresses: Vec<String>) -> bool {
        let member = self.all.get_mut(node).filter(|member| member.facts.addresses != addresses);
        member.map(|member| member.facts.addresses = addresses).is_some()
    }

    pub(super) fn down(&mut self, node: &NodeId, cause: String, now: Now) {
        if let Some(member) = self.all.get_mut(node).filter(|member| member.is_connected()) {
            member.presence = Presence::Gone { since: now, cause };
            self.generation += 1;
        }
    }

    /// Forgets who is gone for long and not `needed`.
    pub(super) fn forget(&mut self, now: Now, needed: impl Fn(&NodeId) -> bool) {
        self.all.retain(|node, member| match &member.presence {
            Presence::Connected => true,
            Presence::Gone { since, .. } => now < *since + REMEMBERED || needed(node),
        });
    }

    /// What changes when each worker shall run what `engines_of` says and nothing else, and measure the ways to all others.
    pub(super) fn want(&mut self, engines_of: impl Fn(&NodeId) -> Vec<EngineSpec>) -> Vec<Wanted> {
        let wanted: Vec<_> = self.all.iter().map(|(node, member)| self.desired(member, engines_of(node))).collect();
        let mut changed = Vec::new();
        for ((node, member), desired) in self.all.iter_mut().zip(wanted) {
            if desired != member.desired || member.desired_version == 0 {
                self.version += 1;
                (member.desired_version, member.desired) = (self.version, desired);
            } else if !member.is_new {
                continue;
            }
            member.is_new = false;
            changed.push(Wanted { node: node.clone(), version: member.desired_version, desired: member.desired.clone() });
        }
        changed
    }

    fn desired(&self, member: &Member, engines: Vec<EngineSpec>) -> Desired {
        let others = self.connected().filter(|other| other.facts.id != member.facts.id);
        let neighbours = others.map(|other| Peer {
            node: other.facts.id.clone(),
            name: other.facts.name.clone(),
            addresses: addresses::to_measure(&member.facts, &other.facts, &other.reached),
        });
        Desired { neighbours: neighbours.collect(), engines }
    }

    /// What was measured between workers that are there.
    pub(super) fn links(&self) -> Vec<LinkFacts> {
        let is_there = |node: &NodeId| self.get(node).is_some_and(Member::is_connected);
        self.connected().flat_map(|member| &member.links).filter(|link| is_there(&link.to)).cloned().collect()
    }

    /// Whether a way is known from each worker that is there to each other one.
    pub(super) fn all_measured(&self) -> bool {
        let (there, links) = (self.connected().count(), self.links());
        let pairs: BTreeSet<_> = links.iter().filter(|link| link.from != link.to).map(|link| (&link.from, &link.to)).collect();
        pairs.len() == there * there.saturating_sub(1)
    }

    pub(super) fn get(&self, node: &NodeId) -> Option<&Member> {
        self.all.get(node)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Member> {
        self.all.values()
    }

    pub(super) fn connected(&self) -> impl Iterator<Item = &Member> {
        self.iter().filter(|member| member.is_connected())
    }

    pub(super) fn all_stopped(&self) -> bool {
        self.iter().all(Member::has_stopped)
    }

    /// When the next worker that is gone counts as lost.
    pub(super) fn next_loss(&self, now: Now) -> Option<Now> {
        let losses = self.iter().filter_map(|member| match &member.presence {
            Presence::Gone { since, .. } => Some(*since + GRACE),
            Presence::Connected => None,
        });
        losses.filter(|at| *at > now).min()
    }
}

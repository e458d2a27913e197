//! The workers: who is connected, what they measured, what they were told to run and what they do run.

use super::Now;
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, EngineStatus, NodeFacts},
    ids::{EngineId, NodeId},
};
use std::{collections::BTreeMap, time::Duration};

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
    observed_version: u64,
    desired_version: u64,
    desired: Vec<EngineSpec>,
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

    /// Whether it said that nothing runs any more, or cannot say anything.
    fn has_stopped(&self) -> bool {
        !self.is_connected() || (self.observed_version >= self.desired_version && self.engines.is_empty())
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
    pub(super) engines: Vec<EngineSpec>,
}

impl Members {
    /// A worker's stream stands; answers with what it shall run.
    pub(super) fn up(&mut self, facts: NodeFacts, reached: String, now: Now) -> Wanted {
        self.generation += 1;
        self.last_up = now;
        let node = facts.id.clone();
        let old = self.all.remove(&node);
        // Never version 0: that would leave a worker with what an earlier coordinator wanted.
        let (desired_version, desired) = old.map(|old| (old.desired_version, old.desired)).unwrap_or_else(|| {
            self.version += 1;
            (self.version, Vec::new())
        });
        let wanted = Wanted { node: node.clone(), version: desired_version, engines: desired.clone() };
        let engines = BTreeMap::new();
        let member = Member { facts, reached, presence: Presence::Connected, engines, observed_version: 0, desired_version, desired };
        self.all.insert(node, member);
        wanted
    }

    pub(super) fn observed(&mut self, node: &NodeId, version: u64, engines: Vec<EngineStatus>) {
        if let Some(member) = self.all.get_mut(node) {
            member.observed_version = version;
            member.engines = engines.into_iter().map(|status| (status.id, status.state)).collect();
        }
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

    /// What changes when each worker shall run what `engine_of` says and nothing else.
    pub(super) fn want(&mut self, engine_of: impl Fn(&NodeId) -> Option<EngineSpec>) -> Vec<Wanted> {
        let mut changed = Vec::new();
        for (node, member) in &mut self.all {
            let engines: Vec<_> = engine_of(node).into_iter().collect();
            if engines != member.desired {
                self.version += 1;
                (member.desired_version, member.desired) = (self.version, engines.clone());
                changed.push(Wanted { node: node.clone(), version: self.version, engines });
            }
        }
        changed
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

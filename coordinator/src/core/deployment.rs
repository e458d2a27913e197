//! A plan that the workers were told to carry out: its engines, what state they are in, which of them are linked.

use super::{Now, addresses, event::ServedFacts, members::Members};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, Link, Peer},
    ids::{EngineId, Epoch, NodeId},
    plan::{Plan, Stage},
};
use std::collections::BTreeMap;

/// Who is at fault, by name, and what happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blame {
    pub(super) worker: String,
    pub(super) message: String,
}

impl std::fmt::Display for Blame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "worker {}: {}", self.worker, self.message)
    }
}

#[derive(Debug)]
pub(super) struct Deployment {
    pub(super) plan: Plan,
    engines: Vec<EngineSpec>,
    /// The process of each stage that is linked in the current epoch.
    linked: Vec<u64>,
    /// Failures of each stage's engine since all worked together.
    failures: BTreeMap<u32, u32>,
    /// Attempts to link since all worked together.
    pub(super) link_failures: u32,
}

/// Where an engine that failed stands.
pub(super) struct Failure<'a> {
    pub(super) worker: &'a str,
    pub(super) cause: &'a str,
    pub(super) output: &'a [String],
    pub(super) hopeless: bool,
    pub(super) count: u32,
}

impl Deployment {
    /// `generation` makes the engines' ids new, so that workers replace what they run.
    pub(super) fn new(plan: Plan, model: &ServedFacts, run: &str, generation: u64) -> Self {
        let n_stages = plan.stages.len() as u32;
        let engine = |(stage, of): (u32, &Stage)| EngineSpec {
            id: EngineId(format!("{run}-{generation}-{stage}")),
            model: model.source.clone(),
            fingerprint: model.fingerprint,
            stage,
            n_stages,
            layers: of.layers.clone(),
            context_tokens: plan.context_tokens,
            cache_tokens: plan.cache_tokens,
            memory: of.needed(),
            caches: plan.caches,
            reservation: plan.reservation,
        };
        let engines = (0..n_stages).zip(&plan.stages).map(engine).collect();
        Self { plan, engines, linked: Vec::new(), failures: BTreeMap::new(), link_failures: 0 }
    }

    pub(super) fn engine_on(&self, node: &NodeId) -> Option<&EngineSpec> {
        let stage = self.plan.stages.iter().position(|stage| stage.node == *node)?;
        self.engines.get(stage)
    }

    pub(super) fn is_on(&self, node: &NodeId) -> bool {
        self.engine_on(node).is_some()
    }

    pub(super) fn lead_name(&self) -> String {
        self.stage_name(0)
    }

    /// Whom an engine means, that knows its neighbours by id, by name or by their place in the chain.
    pub(super) fn named(&self, node: &str) -> Option<String> {
        let place = if node == "the last stage" { self.plan.stages.last() } else { None };
        let known = self.plan.stages.iter().find(|stage| stage.node.0 == node || stage.node_name == node);
        place.or(known).map(|stage| stage.node_name.clone())
    }

    pub(super) fn stage_name(&self, stage: u32) -> String {
        self.plan.stages.get(stage as usize).map(|stage| stage.node_name.clone()).unwrap_or_default()
    }

    fn state<'a>(&self, members: &'a Members, stage: u32) -> Option<&'a EngineState> {
        let node = &self.plan.stages.get(stage as usize)?.node;
        members.get(node)?.engines.get(&self.engines.get(stage as usize)?.id)
    }

    /// Port and process of a stage's engine, when it serves and its worker is there to say so.
    fn serving(&self, members: &Members, stage: u32) -> Option<(u32, u64)> {
        match self.state(members, stage)? {
            EngineState::Ready { port, incarnation, .. } if self.node_connected(members, stage) => Some((*port, *incarnation)),
            _ => None,
        }
    }

    fn stages(&self) -> std::ops::Range<u32> {
        0..self.engines.len() as u32
    }

    /// The first stage whose engine does not serve yet.
    pub(super) fn first_not_ready(&self, members: &Members) -> Option<u32> {
        self.stages().find(|stage| self.serving(members, *stage).is_none())
    }

    pub(super) fn all_connected(&self, members: &Members) -> bool {
        self.plan.stages.iter().all(|stage| members.get(&stage.node).is_some_and(|member| member.is_connected()))
    }

    /// A worker of the plan that is lost.
    pub(super) fn lost(&self, members: &Members, now: Now) -> Option<Blame> {
        self.plan.stages.iter().find_map(|stage| {
            let cause = match members.get(&stage.node) {
                Some(member) => member.lost(now)?.to_owned(),
                None => "it is gone".to_owned(),
            };
            Some(Blame { worker: stage.node_name.clone(), message: format!("connection lost: {cause}") })
        })
    }

    /// A worker of the plan that is gone just now.
    pub(super) fn gone(&self, members: &Members) -> Option<Blame> {
        self.lost(members, Now::MAX)
    }

    /// The engine that is not the one that was linked any more.
    pub(super) fn replaced(&self, members: &Members) -> Option<Blame> {
        self.stages().zip(&self.linked).find_map(|(stage, linked)| {
            let message = match self.state(members, stage) {
                Some(EngineState::Ready { incarnation, .. }) if incarnation == linked => return None,
                Some(EngineState::Failed { cause, .. }) => cause.clone(),
                // The worker is gone: it tells about its engines when it is back.
                None if !self.node_connected(members, stage) => return None,
                _ => "its engine was started again".to_owned(),
            };
            Some(Blame { worker: self.stage_name(stage), message })
        })
    }

    fn node_connected(&self, members: &Members, stage: u32) -> bool {
        let node = self.plan.stages.get(stage as usize).map(|stage| &stage.node);
        node.and_then(|node| members.get(node)).is_some_and(|member| member.is_connected())
    }

    /// Notes the state of an engine before it is replaced by a newer one; true when something moved.
    pub(super) fn note(&mut self, node: &NodeId, old: Option<&EngineState>, new: Option<&EngineState>) -> bool {
        let Some(stage) = self.engine_on(node).map(|engine| engine.stage) else { return false };
        let failed = |state: Option<&EngineState>| matches!(state, Some(EngineState::Failed { .. }));
        if failed(new) && !failed(old) {
            *self.failures.entry(stage).or_default() += 1;
        }
        old != new
    }

    /// The first engine that failed.
    pub(super) fn failure<'a>(&'a self, members: &'a Members) -> Option<Failure<'a>> {
        self.stages().find_map(|stage| match self.state(members, stage)? {
            EngineState::Failed { cause, output, retry_in_ms } => Some(Failure {
                worker: self.plan.stages.get(stage as usize).map_or("", |stage| &stage.node_name),
                cause,
                output,
                hopeless: retry_in_ms.is_none(),
                count: self.failures.get(&stage).copied().unwrap_or(0),
            }),
            _ => None,
        })
    }

    /// All worked together: earlier failures do not count any more.
    pub(super) fn forgive(&mut self) {
        self.failures.clear();
        self.link_failures = 0;
    }

    /// What to tell each engine so that they form a chain in this epoch; None unless all serve.
    pub(super) fn link(&mut self, members: &Members, epoch: Epoch) -> Option<Vec<(u32, Vec<String>, Link)>> {
        let serving = self.stages().map(|stage| self.serving(members, stage)).collect::<Option<Vec<_>>>()?;
        let of = |stage: usize| {
            let node = &self.plan.stages.get(stage)?.node;
            Some((members.get(node)?, serving.get(stage)?.0))
        };
        let n = serving.len();
        let mut links = Vec::with_capacity(n);
        for stage in 0..n {
            let (member, port) = of(stage)?;
            let (next, next_port) = of((stage + 1) % n)?;
            let next = (n > 1).then(|| Peer {
                node: next.facts.id.clone(),
                name: next.facts.name.clone(),
                addresses: addresses::between(&member.facts, &next.facts, &next.reached, next_port),
            });
            let addresses = addresses::from_coordinator(&member.reached, &member.facts, port);
            links.push((stage as u32, addresses, Link { epoch, next }));
        }
        self.linked = serving.into_iter().map(|(_, incarnation)| incarnation).collect();
        Some(links)
    }

    /// Where the lead is reached.
    pub(super) fn lead_addresses(&self, members: &Members) -> Option<Vec<String>> {
        let member = members.get(&self.plan.stages.first()?.node)?;
        let (port, _) = self.serving(members, 0)?;
        Some(addresses::from_coordinator(&member.reached, &member.facts, port))
    }
}

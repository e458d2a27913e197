//! A plan that the workers were told to carry out: its engines, what state they are in, which of them are linked.

use super::{
    Now, addresses,
    event::EngineAt,
    instance::{GROUP_LINK_TIMEOUT, LINK_TIMEOUT},
    members::{Member, Members},
    settings::{InstanceSettings, Kind},
    wiring::{Serving, Wiring},
};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, Link, WeightPeer},
    ids::{EngineId, Epoch, NodeId},
    plan::{Plan, Rank},
    tensor::TensorPlace,
    training::TrainingRole,
};
use std::{collections::BTreeMap, time::Duration};

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
    /// One for each of [`Plan::ranks`], in that order: an engine's number is its place here.
    pub(super) engines: Vec<EngineSpec>,
    /// The process of each engine that is linked in the current epoch.
    linked: Vec<u64>,
    /// Of those, the ones that ended since, and how.
    ends: BTreeMap<u32, End>,
    /// Failures of each engine since all worked together.
    failures: BTreeMap<u32, u32>,
    /// Attempts to link since all worked together.
    pub(super) link_failures: u32,
}

/// How an engine ended.
#[derive(Debug)]
struct End {
    cause: String,
    /// The worker whose engine it lost: a rank cannot go on without the others of its group.
    lost: Option<String>,
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
    /// `run` makes the engines' ids new, so that workers replace what they run.
    pub(super) fn new(plan: Plan, kind: &Kind, settings: &InstanceSettings, run: &str) -> Self {
        let model = kind.model();
        let n_stages = plan.stages.len() as u32;
        let parallel = plan.training.as_ref().map(|training| training.parallel);
        let mut engines = Vec::new();
        for (number, stage) in (0..).zip(&plan.stages) {
            for (rank, of) in (0..).zip(&stage.ranks) {
                engines.push(EngineSpec {
                    id: EngineId(format!("{run}-{number}-{rank}")),
                    model: model.source.clone(),
                    fingerprint: model.fingerprint,
                    stage: number,
                    n_stages,
                    layers: stage.layers.clone(),
                    place: TensorPlace { rank, shares: stage.shares() },
                    collective: settings.collective,
                    context_tokens: plan.context_tokens,
                    cache_tokens: plan.cache_tokens,
                    memory: of.needed(),
                    caches: plan.caches,
                    reservation: plan.reservation,
                    sequences: plan.sequences,
                    weight_peers: Vec::new(),
                    training: kind.role().map(|role| TrainingRole { parallel: parallel.unwrap_or(role.parallel), ..role.clone() }),
                });
            }
        }
        Self { plan, engines, linked: Vec::new(), ends: BTreeMap::new(), failures: BTreeMap::new(), link_failures: 0 }
    }

    /// Tells each engine's worker who else may have tensors of the model: first the workers of the plan, engine by engine, then the others.
    pub(super) fn with_weight_peers(mut self, members: &Members) -> Self {
        let layers = self.plan.stages.iter().flat_map(|stage| stage.ranks.iter().map(|rank| (&rank.node, stage.layers.clone())));
        let planned: Vec<_> = layers.filter_map(|(node, layers)| Some((members.get(node)?, layers))).collect();
        let others = members.connected().filter(|member| !self.is_on(&member.facts.id)).map(|member| (member, 0..0));
        let all: Vec<_> = planned.iter().cloned().chain(others).collect();
        let links = members.links();
        let peers_of = |from: &Member| {
            let peer = |(to, layers): &(&Member, std::ops::Range<u32>)| WeightPeer {
                node: to.facts.id.clone(),
                name: to.facts.name.clone(),
                addresses: addresses::of_worker(&from.facts, &to.facts, &to.reached, &links),
                layers: layers.clone(),
            };
            all.iter().map(peer).collect::<Vec<_>>()
        };
        let peers: Vec<_> = self.plan.ranks().map(|rank| members.get(&rank.node).map(peers_of).unwrap_or_default()).collect();
        for (engine, peers) in self.engines.iter_mut().zip(peers) {
            engine.weight_peers = peers;
        }
        self
    }

    pub(super) fn rank(&self, engine: u32) -> Option<&Rank> {
        self.plan.ranks().nth(engine as usize)
    }

    pub(super) fn engine_on(&self, node: &NodeId) -> Option<&EngineSpec> {
        self.engines.get(self.number_on(node)?)
    }

    fn number_on(&self, node: &NodeId) -> Option<usize> {
        self.plan.ranks().position(|rank| rank.node == *node)
    }

    pub(super) fn is_on(&self, node: &NodeId) -> bool {
        self.engine_on(node).is_some()
    }

    pub(super) fn lead_name(&self) -> String {
        self.name(0)
    }

    /// Whom an engine means, that knows its neighbours by id, by name or by their place in the chain.
    pub(super) fn named(&self, node: &str) -> Option<String> {
        let last = self.plan.stages.last().and_then(|stage| stage.ranks.first());
        let place = last.filter(|_| node == "the last stage");
        let known = self.plan.ranks().find(|rank| rank.node.0 == node || rank.node_name == node);
        place.or(known).map(|rank| rank.node_name.clone())
    }

    /// Of the worker that an engine runs on.
    pub(super) fn name(&self, engine: u32) -> String {
        self.rank(engine).map(|rank| rank.node_name.clone()).unwrap_or_default()
    }

    fn state<'a>(&self, members: &'a Members, engine: u32) -> Option<&'a EngineState> {
        let node = &self.rank(engine)?.node;
        members.get(node)?.engines.get(&self.engines.get(engine as usize)?.id)
    }

    /// An engine that serves, when its worker is there to say so.
    fn serving(&self, members: &Members, engine: u32) -> Option<Serving> {
        match self.state(members, engine)? {
            EngineState::Ready { port, group_port, incarnation, .. } if self.node_connected(members, engine) => {
                Some(Serving { port: *port, group_port: *group_port, incarnation: *incarnation })
            }
            _ => None,
        }
    }

    fn numbers(&self) -> std::ops::Range<u32> {
        0..self.engines.len() as u32
    }

    /// The first engine that does not serve yet.
    pub(super) fn first_not_ready(&self, members: &Members) -> Option<u32> {
        self.numbers().find(|engine| self.serving(members, *engine).is_none())
    }

    pub(super) fn all_connected(&self, members: &Members) -> bool {
        self.plan.ranks().all(|rank| members.get(&rank.node).is_some_and(|member| member.is_connected()))
    }

    /// A worker of the plan that is lost.
    pub(super) fn lost(&self, members: &Members, now: Now) -> Option<Blame> {
        self.plan.ranks().find_map(|rank| {
            let cause = match members.get(&rank.node) {
                Some(member) => member.lost(now)?.to_owned(),
                None => "it is gone".to_owned(),
            };
            Some(Blame { worker: rank.node_name.clone(), message: format!("connection lost: {cause}") })
        })
    }

    /// A worker of the plan that is gone just now.
    pub(super) fn gone(&self, members: &Members) -> Option<Blame> {
        self.lost(members, Now::MAX)
    }

    /// The engine that is not the one that was linked any more, and did not end because it lost another one.
    pub(super) fn replaced(&self, members: &Members) -> Option<Blame> {
        self.not_as_linked(members).find_map(|engine| {
            let message = match self.ends.get(&engine) {
                Some(End { lost: Some(_), .. }) => return None,
                Some(End { cause, .. }) => cause.clone(),
                None => "its engine was started again".to_owned(),
            };
            Some(Blame { worker: self.name(engine), message })
        })
    }

    /// Whom engines lost that ended for that reason, by their own words. Its worker may have more to say.
    pub(super) fn lost_rank(&self, members: &Members) -> Option<Blame> {
        let end_of = |engine| self.ends.get(&engine).and_then(|end| Some((end.lost.as_ref()?, &end.cause)));
        let mut survivor = self.not_as_linked(members).find(|engine| end_of(*engine).is_some())?;
        // Who lost an engine that ended because it lost another one is not to be asked.
        for _ in self.numbers() {
            let (lost, _) = end_of(survivor)?;
            match self.numbers().find(|engine| self.name(*engine) == *lost).filter(|engine| end_of(*engine).is_some()) {
                Some(next) => survivor = next,
                None => break,
            }
        }
        let (lost, cause) = end_of(survivor)?;
        Some(Blame { worker: lost.clone(), message: format!("{} {cause}", self.name(survivor)) })
    }

    /// Whether the engine on a worker of this name is still the one that was linked, as far as its worker knows.
    pub(super) fn is_as_linked(&self, members: &Members, worker: &str) -> bool {
        let engine = self.numbers().find(|engine| self.name(*engine) == worker);
        engine.is_some_and(|engine| !self.not_as_linked(members).any(|other| other == engine))
    }

    /// Engines that are not those that were linked any more. Of a worker that is gone nobody knows: it tells when it is back.
    fn not_as_linked(&self, members: &Members) -> impl Iterator<Item = u32> {
        self.numbers().zip(&self.linked).filter_map(|(engine, linked)| match self.state(members, engine) {
            Some(EngineState::Ready { incarnation, .. }) if incarnation == linked => None,
            None if !self.node_connected(members, engine) => None,
            _ => Some(engine),
        })
    }

    /// Whether some ranks of a group were linked before and others were not: a process can be in one group in its life, so they would wait for
    /// each other in vain.
    pub(super) fn has_torn_group(&self, members: &Members) -> bool {
        let serving = |engine: u32| self.serving(members, engine).map(|serving| serving.incarnation);
        let was_linked = |engine: u32| self.linked.get(engine as usize).is_some_and(|linked| serving(engine) == Some(*linked));
        let stages = self.numbers().zip(&self.engines).map(|(engine, spec)| (spec.stage, was_linked(engine))).collect::<Vec<_>>();
        stages.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1)
    }

    /// How long engines may take to be linked.
    pub(super) fn link_timeout(&self) -> Duration {
        if self.has_groups() { GROUP_LINK_TIMEOUT } else { LINK_TIMEOUT }
    }

    pub(super) fn has_groups(&self) -> bool {
        self.plan.stages.iter().any(|stage| stage.ranks.len() > 1)
    }

    fn node_connected(&self, members: &Members, engine: u32) -> bool {
        let member = self.rank(engine).and_then(|rank| members.get(&rank.node));
        member.is_some_and(|member| member.is_connected())
    }

    /// Notes the state of an engine before it is replaced by a newer one; true when something moved.
    pub(super) fn note(&mut self, node: &NodeId, old: Option<&EngineState>, new: Option<&EngineState>) -> bool {
        let Some(engine) = self.number_on(node) else { return false };
        let failed = |state: Option<&EngineState>| matches!(state, Some(EngineState::Failed { .. }));
        if let Some(EngineState::Failed { cause, lost, .. }) = new
            && !failed(old)
        {
            *self.failures.entry(engine as u32).or_default() += 1;
            self.ends.entry(engine as u32).or_insert_with(|| End { cause: cause.clone(), lost: lost.clone() });
        }
        old != new
    }

    /// The first engine that failed; one that only lost another one when there is no other.
    pub(super) fn failure<'a>(&'a self, members: &'a Members) -> Option<Failure<'a>> {
        let failure = |is_loss: bool| self.numbers().find_map(|engine| self.failure_of(members, engine, is_loss));
        failure(false).or_else(|| failure(true))
    }

    fn failure_of<'a>(&'a self, members: &'a Members, engine: u32, is_loss: bool) -> Option<Failure<'a>> {
        match self.state(members, engine)? {
            EngineState::Failed { cause, output, retry_in_ms, lost } if lost.is_some() == is_loss => Some(Failure {
                worker: self.rank(engine).map_or("", |rank| &rank.node_name),
                cause,
                output,
                hopeless: retry_in_ms.is_none(),
                count: self.failures.get(&engine).copied().unwrap_or(0),
            }),
            _ => None,
        }
    }

    /// All worked together: earlier failures do not count any more.
    pub(super) fn forgive(&mut self) {
        self.failures.clear();
        self.link_failures = 0;
    }

    /// What to tell each engine so that they form a chain of groups in this epoch; None unless all serve.
    pub(super) fn link(&mut self, members: &Members, epoch: Epoch) -> Option<Vec<(u32, Vec<String>, Link)>> {
        let serving = self.numbers().map(|engine| self.serving(members, engine)).collect::<Option<Vec<_>>>()?;
        let wiring = Wiring { deployment: self, members, serving: &serving, links: members.links() };
        let links = self.numbers().map(|engine| Some((engine, self.addresses(members, engine)?, wiring.link(engine, epoch)?)));
        let links = links.collect::<Option<Vec<_>>>()?;
        self.linked = serving.into_iter().map(|engine| engine.incarnation).collect();
        self.ends.clear();
        Some(links)
    }

    /// Where the lead is reached.
    pub(super) fn lead_addresses(&self, members: &Members) -> Option<Vec<String>> {
        self.addresses(members, 0)
    }

    /// Where the coordinator reaches an engine.
    fn addresses(&self, members: &Members, engine: u32) -> Option<Vec<String>> {
        let member = members.get(&self.rank(engine)?.node)?;
        let port = self.serving(members, engine)?.port;
        Some(addresses::from_coordinator(&member.reached, &member.facts, port))
    }

    /// Every engine with its place and where it is reached; None unless all serve.
    pub(super) fn engines_at(&self, members: &Members) -> Option<Vec<EngineAt>> {
        let at = |(number, spec): (u32, &EngineSpec)| {
            let rank = self.rank(number)?;
            Some(EngineAt {
                number,
                stage: spec.stage,
                rank: spec.place.rank,
                node: rank.node.clone(),
                name: rank.node_name.clone(),
                addresses: self.addresses(members, number)?,
            })
        };
        self.numbers().zip(&self.engines).map(at).collect()
    }

    /// Whether no worker that can be asked runs an engine of it any more, now that none is wanted.
    pub(super) fn is_gone(&self, members: &Members) -> bool {
        self.plan.ranks().zip(&self.engines).all(|(rank, engine)| members.get(&rank.node).is_none_or(|member| member.is_rid_of(&engine.id)))
    }
}

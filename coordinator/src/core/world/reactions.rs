//! How the pretended cluster reacts to what the core asks for, and what happens in it by and by.

use super::{FakeEngine, FakeNode, Later, World, engine_name, instance_of, ms, way};
use crate::core::{
    adapters::AdapterFailure,
    event::{Effect, EngineAt, Event, Snapshot},
};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, EngineStatus, Peer},
    ids::{Epoch, InstanceId, NodeId, SequenceId},
    request::{Delivery, FinishReason, SessionCommand, TokenOut},
    units::Bytes,
};
use std::{collections::BTreeMap, time::Duration};

impl World {
    pub(crate) fn tell(&mut self, event: Event) {
        if self.ended.is_some() {
            return;
        }
        for effect in self.cluster.handle(event, self.now) {
            self.carry_out(effect);
        }
    }

    pub(super) fn carry_out(&mut self, effect: Effect) {
        assert!(self.ended.is_none(), "nothing comes after the end");
        let delay = self.soon();
        match effect {
            Effect::SetDesired { node, version, engines, neighbours } => {
                let promised: u64 = engines.iter().map(|engine| engine.memory.0).sum();
                assert!(promised <= self.usable, "{promised} bytes of {} are promised", self.usable);
                self.after(delay, Later::Apply { node, version, engines, neighbours });
            }
            Effect::Link { instance, epoch, engine, link, .. } => {
                self.links.insert((instance, engine), link.clone());
                assert!(self.epochs.last().is_none_or(|last| *last <= epoch), "epochs rise");
                let in_use = match self.jobs.get(&instance) {
                    Some(runner) => runner.ready.is_some(),
                    None => self.session.is_some(),
                };
                assert!(!in_use, "nothing runs while linking");
                if self.epochs.last() != Some(&epoch) {
                    self.epochs.push(epoch);
                }
                let plans = self.jobs.get(&instance).map_or(&self.plans, |runner| &runner.plans);
                let node = plans.last().map(|plan| plan.ranks().nth(engine as usize).expect("a rank").node.clone()).expect("a plan");
                self.after(delay, Later::Link { instance, epoch, engine, node, group: link.group.map(|group| group.incarnations) });
            }
            Effect::OpenSession { epoch, .. } => {
                assert_eq!(
                    self.links.iter().filter(|((id, _), _)| *id == InstanceId::SERVED).map(|(_, link)| link.epoch).max(),
                    Some(epoch)
                );
                assert!(self.session.is_none(), "one session at a time");
                let mut there = self.cluster.adapters().into_iter();
                assert!(there.all(|adapter| self.adapters.get(&(adapter.id, 0)) == Some(&epoch)), "adapters come before requests");
                self.session = Some(epoch);
                let lead = self.plans.last().map(|plan| plan.stages[0].ranks[0].node.clone()).expect("a plan");
                self.after(delay, Later::Open { epoch, lead });
            }
            Effect::LoadAdapter { epoch, engine, adapter, .. } => self.after(delay, Later::Adapter { epoch, engine, adapter }),
            Effect::DropAdapter { epoch, engine, adapter } => {
                let is_lead_done = engine.number == 0 || !self.adapters.contains_key(&(adapter, 0));
                assert!(is_lead_done, "the lead drops an adapter first");
                self.adapters.remove(&(adapter, engine.number));
                let event = Event::AdapterDropped { epoch, engine: engine.number, adapter };
                self.after(delay, Later::Tell(event));
            }
            Effect::AdapterSettled { adapter, outcome } => drop(self.settled.insert(adapter, outcome)),
            Effect::CloseSession => {
                (self.session, self.opened) = (None, None);
                self.at_lead.clear();
            }
            Effect::Command(SessionCommand::Submit(submission)) => {
                assert!(self.session.is_some(), "a request needs a session");
                // The session may be broken without the coordinator knowing yet.
                let Some(epoch) = self.opened else { return };
                self.at_lead.insert(submission.sequence);
                self.after(delay, Later::Token { epoch, sequence: submission.sequence, left: 5 });
            }
            Effect::Command(SessionCommand::Cancel(sequence)) => drop(self.at_lead.remove(&sequence)),
            Effect::Answer { sequence, event } => {
                assert!(self.ends_of(sequence).is_empty(), "nothing comes after the last answer of {sequence}");
                assert!(!self.abandoned.contains(&sequence), "nobody reads the answers of {sequence}");
                self.answers.entry(sequence).or_default().push(event);
            }
            Effect::Planned { instance: InstanceId::SERVED, plan } => self.plans.push(plan),
            Effect::Planned { instance, plan } => self.jobs.get_mut(&instance).expect("a job").plans.push(plan),
            Effect::End(failure) => self.ended = Some(failure),
            Effect::InstanceEnded { instance: InstanceId::SERVED, failure } => self.served_ends.push(failure),
            of_a_job => self.tell_runner(of_a_job),
        }
    }

    fn tell_runner(&mut self, effect: Effect) {
        let delay = self.soon();
        match effect {
            Effect::TrainingReady { instance, epoch, engines } => {
                let runner = self.jobs.get_mut(&instance).expect("a job");
                assert!(runner.ready.is_none() && runner.ended.is_none(), "told in order");
                assert!(runner.epochs.iter().all(|before| *before < epoch), "a fresh epoch");
                (runner.ready, runner.engines) = (Some(epoch), engines);
                runner.epochs.push(epoch);
            }
            Effect::TrainingBroken { instance, epoch, cause } => {
                let runner = self.jobs.get_mut(&instance).expect("a job");
                assert_eq!(runner.ready.take(), Some(epoch), "told once, in order");
                runner.causes.push(cause.unwrap_or_else(|| "as asked".into()));
            }
            Effect::TrainingCouldGrow { instance, epoch, workers } => {
                let runner = self.jobs.get_mut(&instance).expect("a job");
                assert_eq!(runner.ready, Some(epoch), "told while it runs");
                runner.could_have.push(workers);
                if self.saves {
                    self.after(delay + ms(200), Later::Tell(Event::PlanAgain { instance, epoch }));
                }
            }
            Effect::TrainingDrain { instance, .. } => {
                self.jobs.get_mut(&instance).expect("a job").drains += 1;
                if self.saves {
                    self.after(delay, Later::Tell(Event::Stop { instance }));
                }
            }
            Effect::InstanceEnded { instance, failure } => {
                let runner = self.jobs.get_mut(&instance).expect("a job");
                assert!(runner.ended.is_none(), "it ends once");
                (runner.ready, runner.ended) = (None, Some(failure));
            }
            other => unreachable!("{other:?}"),
        }
    }

    pub(super) fn happen(&mut self, later: Later) {
        let delay = self.soon();
        match later {
            Later::Tell(event) => self.tell(event),
            Later::Apply { node, version, engines, neighbours } => {
                let measuring = ms(100 + self.random.below(300));
                self.after(measuring, Later::Measured { node: node.clone(), version, neighbours });
                self.apply(&node, version, engines);
            }
            Later::Measured { node, version, neighbours } => self.measured(&node, version, &neighbours),
            Later::Loaded { node, instance, incarnation } => {
                let Some(engine) = self.engine_mut(&node, instance) else { return };
                if engine.incarnation == incarnation {
                    let group_port = if engine.spec.place.is_alone() { 0 } else { 10 };
                    engine.state = EngineState::Ready { port: 9, group_port, incarnation, resident: Bytes(1) };
                    self.observe(&node);
                }
            }
            Later::Link { instance, epoch, engine: number, node, group } => {
                let (result, wait) = self.link(instance, epoch, &node, group);
                self.after(delay + wait, Later::Tell(Event::Linked { instance, epoch, engine: number, result }));
            }
            Later::Adapter { epoch, engine: EngineAt { node, number, .. }, adapter } => {
                let engine = self.engine(&node, InstanceId::SERVED);
                let is_there = engine.is_some_and(|engine| engine.epoch == epoch && matches!(engine.state, EngineState::Ready { .. }));
                let result = match is_there {
                    true => {
                        self.adapters.insert((adapter, number), epoch);
                        Ok(())
                    }
                    false => Err(AdapterFailure::Unreachable("connection refused".into())),
                };
                self.after(delay, Later::Tell(Event::AdapterLoaded { epoch, engine: number, adapter, result }));
            }
            Later::Lose { node, instance, incarnation, lost } => {
                let engine = self.engine(&node, instance);
                if engine.is_some_and(|engine| engine.incarnation == incarnation && !engine.hangs) {
                    let cause = format!("lost rank 9 of worker {lost}");
                    let failed = EngineState::Failed { cause, output: Vec::new(), retry_in_ms: Some(200), lost: Some(lost) };
                    self.engine_fails(&node, instance, failed);
                }
            }
            Later::Open { epoch, lead } => {
                let engine = self.engine(&lead, InstanceId::SERVED);
                if self.session != Some(epoch) {
                    return;
                }
                if engine.is_some_and(|engine| engine.epoch == epoch && matches!(engine.state, EngineState::Ready { .. })) {
                    self.opened = Some(epoch);
                    return self.tell(Event::SessionOpened { epoch });
                }
                self.session = None;
                self.tell(Event::SessionBroken { instance: InstanceId::SERVED, epoch, node: None, message: "connection refused".into() });
            }
            Later::Token { epoch, sequence, left } => self.token(epoch, sequence, left),
        }
    }

    /// What an engine answers to a link, and how long it takes for that.
    fn link(&mut self, instance: InstanceId, epoch: Epoch, node: &NodeId, group: Option<Vec<u64>>) -> (Result<(), String>, Duration) {
        let engine = self.engine_mut(node, instance);
        let Some(engine) = engine.filter(|engine| matches!(engine.state, EngineState::Ready { .. }) && engine.epoch < epoch) else {
            return (Err("connection refused".to_owned()), ms(0));
        };
        if engine.hangs {
            return (Err("no answer".to_owned()), ms(7000));
        }
        engine.epoch = epoch;
        assert_eq!(group.as_ref().map_or(1, Vec::len), engine.spec.place.ranks(), "a link names the whole group");
        let Some(group) = group else { return (Ok(()), ms(0)) };
        if engine.formed.as_ref().is_some_and(|formed| *formed != group) {
            let cause = "a process can be in one group in its life".to_owned();
            let failed = EngineState::Failed { cause: cause.clone(), output: Vec::new(), retry_in_ms: Some(200), lost: None };
            self.engine_fails(node, instance, failed);
            self.members_lose(&group, instance, node, ms(1));
            return (Err(cause), ms(0));
        }
        engine.formed = Some(group.clone());
        let engines = self.nodes.values().filter_map(|fake| fake.engines.get(&instance));
        let alive = engines.filter(|engine| group.contains(&engine.incarnation));
        if alive.count() < group.len() {
            // It waits for a rank that never comes.
            let incarnation = self.engine(node, instance).map_or(0, |engine| engine.incarnation);
            self.after(ms(15_000), Later::Lose { node: node.clone(), instance, incarnation, lost: engine_name(node) });
            return (Err("the group did not form".to_owned()), ms(15_100));
        }
        (Ok(()), ms(0))
    }

    fn token(&mut self, epoch: Epoch, sequence: SequenceId, left: u32) {
        if self.opened != Some(epoch) || !self.at_lead.contains(&sequence) {
            return;
        }
        let token = TokenOut { id: left, logprob: None, top: Vec::new() };
        let delivery = match left {
            0 => Delivery::Finished { sequence, reason: FinishReason::Length },
            _ => Delivery::Token { sequence, token },
        };
        if left == 0 {
            self.at_lead.remove(&sequence);
        } else {
            let delay = self.soon();
            self.after(delay, Later::Token { epoch, sequence, left: left - 1 });
        }
        self.tell(Event::Delivered { epoch, delivery });
    }

    fn measured(&mut self, node: &NodeId, version: u64, neighbours: &[Peer]) {
        let is_wanted = |fake: &&mut FakeNode| fake.connected && fake.version == version;
        let Some(fake) = self.nodes.get_mut(node).filter(|_| self.measures).filter(is_wanted) else { return };
        fake.links = neighbours.iter().flat_map(|to| to.addresses.iter().map(|address| way(node, to, address))).collect();
        self.observe(node);
    }

    fn apply(&mut self, node: &NodeId, version: u64, engines: Vec<EngineSpec>) {
        let load = ms(50 + self.random.below(500));
        // In order: what was wanted before never overtakes what is wanted now.
        let Some(fake) = self.nodes.get_mut(node).filter(|fake| fake.connected && fake.version <= version) else { return };
        fake.version = version;
        let wanted: BTreeMap<_, _> = engines.into_iter().map(|spec| (instance_of(&spec), spec)).collect();
        let is_wanted =
            |(instance, engine): &(&InstanceId, &FakeEngine)| wanted.get(instance).is_some_and(|spec| spec.id == engine.spec.id);
        let dropped: Vec<_> = fake.engines.iter().filter(|engine| !is_wanted(engine)).map(|(instance, _)| *instance).collect();
        fake.engines.retain(|instance, _| !dropped.contains(instance));
        for (instance, spec) in wanted.into_iter().filter(|(instance, _)| !fake.engines.contains_key(instance)).collect::<Vec<_>>() {
            let incarnation = self.count + 1_000_000;
            let state = EngineState::Loading { done: Bytes(0), total: Bytes(1) };
            let engine = FakeEngine { spec, incarnation, state, epoch: Epoch(0), formed: None, hangs: false };
            if let Some(fake) = self.nodes.get_mut(node) {
                fake.engines.insert(instance, engine);
            }
            self.after(load, Later::Loaded { node: node.clone(), instance, incarnation });
        }
        dropped.into_iter().for_each(|instance| self.break_epoch(instance, "replaced"));
        self.observe(node);
    }

    pub(super) fn snapshot(fake: &FakeNode) -> Snapshot {
        let status = |engine: &FakeEngine| EngineStatus { id: engine.spec.id.clone(), state: engine.state.clone() };
        Snapshot { version: fake.version, engines: fake.engines.values().map(status).collect(), links: fake.links.clone() }
    }

    /// Each worker has a slow interface, which it names first, and a fast one.
    pub(super) fn addresses(name: &str) -> Vec<String> {
        let number = name.bytes().map(u32::from).sum::<u32>() % 250;
        vec![format!("10.0.0.{number}:1"), format!("10.1.0.{number}:1")]
    }

    pub(super) fn observe(&mut self, node: &NodeId) {
        let Some(fake) = self.nodes.get(node).filter(|fake| fake.connected) else { return };
        let addresses = Self::addresses(node.0.trim_start_matches("id-"));
        let event = Event::WorkerObserved { node: node.clone(), addresses, snapshot: Self::snapshot(fake) };
        // In order: snapshots of one worker never overtake each other.
        self.after(ms(1), Later::Tell(event));
    }

    /// Whoever speaks with the engines of this instance notices soon.
    pub(super) fn break_epoch(&mut self, instance: InstanceId, message: &str) {
        let epoch = match self.jobs.get(&instance) {
            Some(runner) => runner.ready,
            None => {
                let opened = self.opened.take_if(|_| instance == InstanceId::SERVED);
                if opened.is_some() {
                    self.at_lead.clear();
                }
                opened
            }
        };
        if let Some(epoch) = epoch {
            let delay = self.soon();
            self.after(delay, Later::Tell(Event::SessionBroken { instance, epoch, node: None, message: message.into() }));
        }
    }
}

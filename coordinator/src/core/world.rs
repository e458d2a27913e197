//! A pretended cluster for tests of the core: workers, engines and a lead in virtual time, with faults on demand.

use super::{
    Now,
    cluster::Cluster,
    event::{ClusterFailure, Effect, EngineAt, Event, Snapshot},
    placement::tests::{model, node},
    settings::{InstanceSettings, Kind, ModelFacts, Settings, TrainingFacts},
};
use crate::serving::{Admitted, InstanceState, RequestEvent};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, EngineStatus, Link, ModelSource, NodeFacts, Peer},
    ids::{Epoch, InstanceId, NodeId, SequenceId},
    links::{LinkFacts, Medium},
    plan::{Plan, Strategy},
    request::{Delivery, FinishReason, SessionCommand, TokenOut},
    sampling::SamplingParams,
    training::{FineTune, Optimizer, Parallel, Schedule, TrainingRole},
    units::Bytes,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

pub(crate) const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// How a pretended coordinator is started.
#[derive(Clone)]
pub(crate) struct Start {
    pub(crate) settings: Settings,
    /// None: idle.
    pub(crate) model: Option<Arc<ModelFacts>>,
    pub(crate) own: InstanceSettings,
}

pub(crate) fn start(workers: usize, strategy: Strategy) -> Start {
    let settings = Settings { cluster: "test".into(), run: "run".into(), min_workers: workers, wait: Some(Duration::from_secs(120)) };
    Start { settings, model: Some(facts()), own: InstanceSettings { strategy, ..InstanceSettings::default() } }
}

pub(crate) fn facts() -> Arc<ModelFacts> {
    let (spec, weights) = model(6, 64, true);
    let source = ModelSource::Folder("/model".into());
    Arc::new(ModelFacts { name: "test".into(), source, spec, weights, fingerprint: 7, reckoned: Default::default() })
}

pub(crate) fn training(parallel: Parallel) -> Kind {
    let role = TrainingRole {
        fine_tune: FineTune::Full,
        num_layers: None,
        optimizer: Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0, dampening: 0.0, nesterov: false },
        schedule: Schedule::constant(1e-5),
        seed: 0,
        grad_checkpoint: false,
        clear_cache_threshold: Bytes(0),
        parallel,
    };
    Kind::Training(Arc::new(TrainingFacts { model: facts(), role }))
}

/// SplitMix64 (Steele et al. 2014): small, seeded, good enough to choose faults.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

struct FakeEngine {
    spec: EngineSpec,
    incarnation: u64,
    state: EngineState,
    epoch: Epoch,
    /// The processes of its group, once that has formed: it can form one in its life.
    formed: Option<Vec<u64>>,
    /// It was stopped, and answers nobody.
    hangs: bool,
}

struct FakeNode {
    connected: bool,
    version: u64,
    /// One for each instance at most.
    engines: BTreeMap<InstanceId, FakeEngine>,
    links: Vec<LinkFacts>,
}

/// What happens later in the pretended cluster.
enum Later {
    Tell(Event),
    Apply {
        node: NodeId,
        version: u64,
        engines: Vec<EngineSpec>,
        neighbours: Vec<Peer>,
    },
    Measured {
        node: NodeId,
        version: u64,
        neighbours: Vec<Peer>,
    },
    Loaded {
        node: NodeId,
        instance: InstanceId,
        incarnation: u64,
    },
    Link {
        instance: InstanceId,
        epoch: Epoch,
        engine: u32,
        node: NodeId,
        group: Option<Vec<u64>>,
    },
    /// It notices that a rank of its group is gone.
    Lose {
        node: NodeId,
        instance: InstanceId,
        incarnation: u64,
        lost: String,
    },
    Open {
        epoch: Epoch,
        lead: NodeId,
    },
    Token {
        epoch: Epoch,
        sequence: SequenceId,
        left: u32,
    },
}

/// What a pretended worker measures: 10.1 is the better network.
fn way(from: &NodeId, to: &Peer, address: &str) -> LinkFacts {
    let is_fast = address.starts_with("10.1.");
    LinkFacts {
        from: from.clone(),
        to: to.node.clone(),
        interface: if is_fast { "en1" } else { "en0" }.into(),
        medium: Medium::Ethernet,
        address: address.split(':').next().unwrap_or_default().into(),
        round_trip_seconds: 1e-4,
        bytes_per_second: if is_fast { 1e9 } else { 1e7 },
    }
}

/// The runner of a job: what it was told.
#[derive(Debug, Default)]
pub(crate) struct FakeRunner {
    /// The epoch whose engines it may use.
    pub(crate) ready: Option<Epoch>,
    pub(crate) engines: Vec<EngineAt>,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) plans: Vec<Plan>,
    pub(crate) causes: Vec<String>,
    pub(crate) ended: Option<Option<ClusterFailure>>,
}

pub(crate) struct World {
    /// Memory of each worker.
    pub(crate) usable: u64,
    pub(crate) jobs: BTreeMap<InstanceId, FakeRunner>,
    /// Ends of served models.
    pub(crate) served_ends: Vec<Option<ClusterFailure>>,
    /// What each engine was told last.
    pub(crate) links: BTreeMap<(InstanceId, u32), Link>,
    /// Whether workers measure the ways between them.
    pub(crate) measures: bool,
    pub(crate) cluster: Cluster,
    pub(crate) now: Now,
    pub(crate) random: Random,
    nodes: BTreeMap<NodeId, FakeNode>,
    later: BTreeMap<(Now, u64), Later>,
    count: u64,
    /// The session that the coordinator holds open.
    session: Option<Epoch>,
    opened: Option<Epoch>,
    at_lead: BTreeSet<SequenceId>,
    pub(crate) answers: BTreeMap<SequenceId, Vec<RequestEvent>>,
    pub(crate) abandoned: BTreeSet<SequenceId>,
    pub(crate) plans: Vec<Plan>,
    pub(crate) epochs: Vec<Epoch>,
    pub(crate) ended: Option<Option<ClusterFailure>>,
}

impl World {
    pub(crate) fn new(start: Start, seed: u64) -> Self {
        let cluster = match start.model {
            Some(model) => Cluster::serving(start.settings, model, start.own),
            None => Cluster::idle(start.settings),
        };
        Self {
            usable: 4_000_000_000,
            jobs: BTreeMap::new(),
            served_ends: Vec::new(),
            links: BTreeMap::new(),
            measures: true,
            cluster,
            now: Duration::ZERO,
            random: Random(seed),
            nodes: BTreeMap::new(),
            later: BTreeMap::new(),
            count: 0,
            session: None,
            opened: None,
            at_lead: BTreeSet::new(),
            answers: BTreeMap::new(),
            abandoned: BTreeSet::new(),
            plans: Vec::new(),
            epochs: Vec::new(),
            ended: None,
        }
    }

    /// A cluster of so many workers that serves.
    pub(crate) fn ready(workers: usize, strategy: Strategy, seed: u64) -> Self {
        Self::ready_with(start(workers, strategy), workers, seed)
    }

    pub(crate) fn ready_with(start: Start, workers: usize, seed: u64) -> Self {
        let mut world = Self::new(start, seed);
        (0..workers).for_each(|i| world.worker_up(&format!("w{i}")));
        world.run(ms(10_000));
        assert_eq!(world.state(), InstanceState::Ready);
        world
    }

    pub(crate) fn state(&self) -> InstanceState {
        self.cluster.instance_state()
    }

    fn id(name: &str) -> NodeId {
        NodeId(format!("id-{name}"))
    }

    fn after(&mut self, delay: Duration, later: Later) {
        self.count += 1;
        self.later.insert((self.now + delay, self.count), later);
    }

    fn soon(&mut self) -> Duration {
        ms(1 + self.random.below(40))
    }

    // --- what tests do ---

    pub(crate) fn worker_up(&mut self, name: &str) {
        let id = Self::id(name);
        self.tell_of_the_end(&id);
        let fake =
            self.nodes.entry(id.clone()).or_insert(FakeNode { connected: false, version: 0, engines: BTreeMap::new(), links: Vec::new() });
        fake.connected = true;
        let snapshot = Self::snapshot(fake);
        let facts = NodeFacts { addresses: Self::addresses(name), ..node(name, self.usable, 0.0) };
        let (reached, facts) = (facts.addresses[0].clone(), Box::new(facts));
        self.tell(Event::WorkerUp { facts, reached, snapshot });
    }

    /// A stream that stands again was seen to break before.
    fn tell_of_the_end(&mut self, id: &NodeId) {
        let is_end = |later: &Later| matches!(later, Later::Tell(Event::WorkerDown { node, .. }) if node == id);
        let at = self.later.iter().find(|(_, later)| is_end(later)).map(|(at, _)| *at);
        if let Some(Later::Tell(event)) = at.and_then(|at| self.later.remove(&at)) {
            self.tell(event);
        }
    }

    /// Its stream breaks; with `dies` the process and its engine are gone too.
    pub(crate) fn worker_down(&mut self, name: &str, dies: bool) {
        let id = Self::id(name);
        let instances: Vec<_> = self.nodes.get(&id).into_iter().flat_map(|fake| fake.engines.keys().copied()).collect();
        for instance in instances.iter().filter(|_| dies) {
            self.group_loses(name, *instance, ms(5));
        }
        let Some(fake) = self.nodes.get_mut(&id).filter(|fake| fake.connected) else { return };
        fake.connected = false;
        if dies {
            (fake.version, fake.links) = (0, Vec::new());
            fake.engines.clear();
            instances.into_iter().for_each(|instance| self.break_epoch(instance, "connection reset"));
        }
        let delay = self.soon();
        self.after(delay, Later::Tell(Event::WorkerDown { node: id, cause: "connection reset".into() }));
    }

    pub(crate) fn engine_dies(&mut self, name: &str, retry_in_ms: Option<u64>) {
        self.engine_of_dies(InstanceId::SERVED, name, retry_in_ms);
    }

    pub(crate) fn engine_of_dies(&mut self, instance: InstanceId, name: &str, retry_in_ms: Option<u64>) {
        self.group_loses(name, instance, ms(1));
        let cause = "its engine was killed by signal 9".to_owned();
        let failed = EngineState::Failed { cause, output: vec!["last words".into()], retry_in_ms, lost: None };
        self.engine_fails(&Self::id(name), instance, failed);
    }

    /// It does not end, but answers nobody any more; the others of its group notice after a while.
    pub(crate) fn engine_hangs(&mut self, name: &str) {
        self.engine_of_hangs(InstanceId::SERVED, name);
    }

    pub(crate) fn engine_of_hangs(&mut self, instance: InstanceId, name: &str) {
        self.group_loses(name, instance, ms(8000));
        let Some(engine) = self.engine_mut(&Self::id(name), instance) else { return };
        engine.hangs = true;
        let epoch = engine.epoch;
        if self.jobs.get(&instance).is_some_and(|runner| runner.ready == Some(epoch)) {
            // The runner gets no answer.
            let (node, message) = (Some(name.to_owned()), "no answer".to_owned());
            self.after(ms(9000), Later::Tell(Event::SessionBroken { instance, epoch, node, message }));
        }
    }

    fn engine(&self, node: &NodeId, instance: InstanceId) -> Option<&FakeEngine> {
        self.nodes.get(node)?.engines.get(&instance)
    }

    fn engine_mut(&mut self, node: &NodeId, instance: InstanceId) -> Option<&mut FakeEngine> {
        self.nodes.get_mut(node)?.engines.get_mut(&instance)
    }

    fn engine_fails(&mut self, id: &NodeId, instance: InstanceId, state: EngineState) {
        let EngineState::Failed { retry_in_ms, .. } = state else { return };
        let Some(engine) = self.engine_mut(id, instance) else { return };
        engine.state = state;
        engine.incarnation += 1;
        (engine.formed, engine.hangs) = (None, false);
        let incarnation = engine.incarnation;
        self.break_epoch(instance, "stream closed");
        self.observe(id);
        if let Some(retry) = retry_in_ms {
            self.after(ms(retry + 200), Later::Loaded { node: id.clone(), instance, incarnation });
        }
    }

    /// The engines that have formed a group with the one of this worker will notice that it is gone.
    fn group_loses(&mut self, name: &str, instance: InstanceId, delay: Duration) {
        let id = Self::id(name);
        let own = self.engine(&id, instance).and_then(|engine| engine.formed.clone());
        if let Some(own) = own {
            self.members_lose(&own, instance, &id, delay);
        }
    }

    /// All of this group but `id`.
    fn members_lose(&mut self, group: &[u64], instance: InstanceId, id: &NodeId, delay: Duration) {
        let mates = self.nodes.iter().filter_map(|(node, fake)| {
            let engine = fake.engines.get(&instance).filter(|engine| node != id && engine.formed.as_deref() == Some(group))?;
            Some((node.clone(), engine.incarnation))
        });
        for (node, incarnation) in mates.collect::<Vec<_>>() {
            let delay = delay + self.soon();
            self.after(delay, Later::Lose { node, instance, incarnation, lost: engine_name(id) });
        }
    }

    pub(crate) fn start_job(&mut self, number: u64, strategy: Strategy, kind: Kind) -> InstanceId {
        self.start_job_with(number, InstanceSettings { strategy, ..InstanceSettings::default() }, kind)
    }

    pub(crate) fn start_job_with(&mut self, number: u64, settings: InstanceSettings, kind: Kind) -> InstanceId {
        let instance = InstanceId(number);
        self.jobs.insert(instance, FakeRunner::default());
        self.tell(Event::Start { instance, kind, settings });
        instance
    }

    pub(crate) fn submit(&mut self, sequence: u64) -> SequenceId {
        let sequence = SequenceId(sequence);
        let request = Admitted { prompt: vec![1], params: SamplingParams::default() };
        assert!(self.answers.insert(sequence, Vec::new()).is_none(), "a number is used once");
        self.tell(Event::Submitted { sequence, request });
        sequence
    }

    pub(crate) fn abandon(&mut self, sequence: SequenceId) {
        self.abandoned.insert(sequence);
        self.tell(Event::Abandoned { sequence });
    }

    pub(crate) fn is_at_lead(&self, sequence: SequenceId) -> bool {
        self.at_lead.contains(&sequence)
    }

    pub(crate) fn ends_of(&self, sequence: SequenceId) -> Vec<&RequestEvent> {
        let is_end = |event: &&RequestEvent| matches!(event, RequestEvent::Finished(_) | RequestEvent::Failed(_));
        self.answers[&sequence].iter().filter(is_end).collect()
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..100_000 {
            let next = self.later.keys().next().map(|(at, _)| *at);
            let deadline = self.cluster.deadline(self.now);
            let Some(at) = next.into_iter().chain(deadline).min().filter(|at| *at <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(at);
            match self.later.first_key_value().map(|((at, _), _)| *at) {
                Some(at) if at <= self.now => {
                    let Some((_, later)) = self.later.pop_first() else { continue };
                    self.happen(later);
                }
                _ => self.tell(Event::Tick),
            }
        }
        panic!("time stands still at {:?}", self.now);
    }

    // --- how the pretended cluster reacts ---

    pub(crate) fn tell(&mut self, event: Event) {
        if self.ended.is_some() {
            return;
        }
        for effect in self.cluster.handle(event, self.now) {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
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
                runner.causes.push(cause);
            }
            Effect::InstanceEnded { instance: InstanceId::SERVED, failure } => self.served_ends.push(failure),
            Effect::InstanceEnded { instance, failure } => {
                let runner = self.jobs.get_mut(&instance).expect("a job");
                assert!(runner.ended.is_none(), "it ends once");
                (runner.ready, runner.ended) = (None, Some(failure));
            }
            Effect::OpenSession { epoch, .. } => {
                assert_eq!(
                    self.links.iter().filter(|((id, _), _)| *id == InstanceId::SERVED).map(|(_, link)| link.epoch).max(),
                    Some(epoch)
                );
                assert!(self.session.is_none(), "one session at a time");
                self.session = Some(epoch);
                let lead = self.plans.last().map(|plan| plan.stages[0].ranks[0].node.clone()).expect("a plan");
                self.after(delay, Later::Open { epoch, lead });
            }
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
        }
    }

    fn happen(&mut self, later: Later) {
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

    fn snapshot(fake: &FakeNode) -> Snapshot {
        let status = |engine: &FakeEngine| EngineStatus { id: engine.spec.id.clone(), state: engine.state.clone() };
        Snapshot { version: fake.version, engines: fake.engines.values().map(status).collect(), links: fake.links.clone() }
    }

    /// Each worker has a slow interface, which it names first, and a fast one.
    fn addresses(name: &str) -> Vec<String> {
        let number = name.bytes().map(u32::from).sum::<u32>() % 250;
        vec![format!("10.0.0.{number}:1"), format!("10.1.0.{number}:1")]
    }

    fn observe(&mut self, node: &NodeId) {
        let Some(fake) = self.nodes.get(node).filter(|fake| fake.connected) else { return };
        let addresses = Self::addresses(node.0.trim_start_matches("id-"));
        let event = Event::WorkerObserved { node: node.clone(), addresses, snapshot: Self::snapshot(fake) };
        // In order: snapshots of one worker never overtake each other.
        self.after(ms(1), Later::Tell(event));
    }

    /// Whoever speaks with the engines of this instance notices soon.
    fn break_epoch(&mut self, instance: InstanceId, message: &str) {
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

fn engine_name(node: &NodeId) -> String {
    node.0.trim_start_matches("id-").to_owned()
}

/// As the engine's id tells.
fn instance_of(spec: &EngineSpec) -> InstanceId {
    InstanceId(spec.id.0.split('-').nth(1).and_then(|number| number.parse().ok()).expect("a number"))
}

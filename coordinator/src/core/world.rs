//! A pretended cluster for tests of the core: workers, engines and a lead in virtual time, with faults on demand.

use super::{
    Now,
    cluster::Cluster,
    event::{ClusterFailure, Effect, Event, ServedFacts, Settings, Snapshot},
    placement::tests::{model, node},
};
use crate::serving::{Admitted, InstanceState, RequestEvent};
use mlx_cluster_common::{
    cache::CacheOptions,
    engine::{EngineSpec, EngineState, EngineStatus, ModelSource, NodeFacts, Peer},
    ids::{Epoch, NodeId, SequenceId},
    links::{LinkFacts, Medium},
    plan::{Collective, Optimize, Plan, Strategy},
    request::{Delivery, FinishReason, SessionCommand, TokenOut},
    sampling::SamplingParams,
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

pub(crate) fn settings(workers: usize, strategy: Strategy) -> Settings {
    let (spec, weights) = model(6, 64, true);
    let source = ModelSource::Folder("/model".into());
    let facts = ServedFacts { name: "test".into(), source, spec, weights, fingerprint: 7, reckoned: Default::default() };
    Settings {
        cluster: "test".into(),
        run: "run".into(),
        model: Some(Arc::new(facts)),
        min_workers: workers,
        strategy,
        split: None,
        stages: None,
        collective: Collective::Auto,
        optimize: Optimize::Latency,
        context_tokens: None,
        caches: CacheOptions::default(),
        wait: Some(Duration::from_secs(120)),
    }
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
    engine: Option<FakeEngine>,
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
        incarnation: u64,
    },
    Link {
        epoch: Epoch,
        engine: u32,
        node: NodeId,
        group: Option<Vec<u64>>,
    },
    /// It notices that a rank of its group is gone.
    Lose {
        node: NodeId,
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

pub(crate) struct World {
    /// Whether workers measure the ways between them.
    pub(crate) measures: bool,
    /// Where each engine was told to find its next one.
    pub(crate) told: BTreeMap<u32, Vec<String>>,
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
    pub(crate) fn new(settings: Settings, seed: u64) -> Self {
        Self {
            measures: true,
            told: BTreeMap::new(),
            cluster: Cluster::new(settings),
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
        Self::ready_with(settings(workers, strategy), workers, seed)
    }

    pub(crate) fn ready_with(settings: Settings, workers: usize, seed: u64) -> Self {
        let mut world = Self::new(settings, seed);
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
        let fake = self.nodes.entry(id.clone()).or_insert(FakeNode { connected: false, version: 0, engine: None, links: Vec::new() });
        fake.connected = true;
        let snapshot = Self::snapshot(fake);
        let facts = NodeFacts { addresses: Self::addresses(name), ..node(name, 4_000_000_000, 0.0) };
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
        if dies {
            self.group_loses(name, ms(5));
        }
        let Some(fake) = self.nodes.get_mut(&id).filter(|fake| fake.connected) else { return };
        fake.connected = false;
        let had = dies && fake.engine.take().is_some();
        if dies {
            (fake.version, fake.links) = (0, Vec::new());
        }
        if had {
            self.break_session("connection reset");
        }
        let delay = self.soon();
        self.after(delay, Later::Tell(Event::WorkerDown { node: id, cause: "connection reset".into() }));
    }

    pub(crate) fn engine_dies(&mut self, name: &str, retry_in_ms: Option<u64>) {
        self.group_loses(name, ms(1));
        let cause = "its engine was killed by signal 9".to_owned();
        self.engine_fails(&Self::id(name), EngineState::Failed { cause, output: vec!["last words".into()], retry_in_ms, lost: None });
    }

    /// It does not end, but answers nobody any more; the others of its group notice after a while.
    pub(crate) fn engine_hangs(&mut self, name: &str) {
        self.group_loses(name, ms(8000));
        if let Some(engine) = self.nodes.get_mut(&Self::id(name)).and_then(|fake| fake.engine.as_mut()) {
            engine.hangs = true;
        }
    }

    fn engine_fails(&mut self, id: &NodeId, state: EngineState) {
        let EngineState::Failed { retry_in_ms, .. } = state else { return };
        let Some(engine) = self.nodes.get_mut(id).and_then(|fake| fake.engine.as_mut()) else { return };
        engine.state = state;
        engine.incarnation += 1;
        (engine.formed, engine.hangs) = (None, false);
        let incarnation = engine.incarnation;
        self.break_session("stream closed");
        self.observe(id);
        if let Some(retry) = retry_in_ms {
            self.after(ms(retry + 200), Later::Loaded { node: id.clone(), incarnation });
        }
    }

    /// The engines that have formed a group with the one of this worker will notice that it is gone.
    fn group_loses(&mut self, name: &str, delay: Duration) {
        let id = Self::id(name);
        let own = self.nodes.get(&id).and_then(|fake| fake.engine.as_ref()).and_then(|engine| engine.formed.clone());
        if let Some(own) = own {
            self.members_lose(&own, &id, name, delay);
        }
    }

    /// All of this group but `id`.
    fn members_lose(&mut self, group: &[u64], id: &NodeId, name: &str, delay: Duration) {
        let mates = self.nodes.iter().filter_map(|(node, fake)| {
            let engine = fake.engine.as_ref().filter(|engine| node != id && engine.formed.as_deref() == Some(group))?;
            Some((node.clone(), engine.incarnation))
        });
        for (node, incarnation) in mates.collect::<Vec<_>>() {
            let delay = delay + self.soon();
            self.after(delay, Later::Lose { node, incarnation, lost: name.to_owned() });
        }
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
                self.after(delay, Later::Apply { node, version, engines, neighbours });
            }
            Effect::Link { epoch, engine, link, .. } => {
                self.told.insert(engine, link.next.map(|peer| peer.addresses).unwrap_or_default());
                assert!(self.epochs.last().is_none_or(|last| *last <= epoch), "epochs rise");
                assert!(self.session.is_none(), "no session while linking");
                if self.epochs.last() != Some(&epoch) {
                    self.epochs.push(epoch);
                }
                let node = self.plans.last().map(|plan| plan.ranks().nth(engine as usize).expect("a rank").node.clone()).expect("a plan");
                self.after(delay, Later::Link { epoch, engine, node, group: link.group.map(|group| group.incarnations) });
            }
            Effect::OpenSession { epoch, .. } => {
                assert_eq!(self.epochs.last(), Some(&epoch), "only the newest epoch gets a session");
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
            Effect::Planned(plan) => self.plans.push(plan),
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
            Later::Loaded { node, incarnation } => {
                let Some(engine) = self.nodes.get_mut(&node).and_then(|fake| fake.engine.as_mut()) else { return };
                if engine.incarnation == incarnation {
                    let group_port = if engine.spec.place.is_alone() { 0 } else { 10 };
                    engine.state = EngineState::Ready { port: 9, group_port, incarnation, resident: Bytes(1) };
                    self.observe(&node);
                }
            }
            Later::Link { epoch, engine: number, node, group } => {
                let (result, wait) = self.link(epoch, &node, group);
                self.after(delay + wait, Later::Tell(Event::Linked { epoch, engine: number, result }));
            }
            Later::Lose { node, incarnation, lost } => {
                let engine = self.nodes.get(&node).and_then(|fake| fake.engine.as_ref());
                if engine.is_some_and(|engine| engine.incarnation == incarnation && !engine.hangs) {
                    let cause = format!("lost rank 9 of worker {lost}");
                    let failed = EngineState::Failed { cause, output: Vec::new(), retry_in_ms: Some(200), lost: Some(lost) };
                    self.engine_fails(&node, failed);
                }
            }
            Later::Open { epoch, lead } => {
                let engine = self.nodes.get(&lead).and_then(|fake| fake.engine.as_ref());
                if self.session != Some(epoch) {
                    return;
                }
                if engine.is_some_and(|engine| engine.epoch == epoch && matches!(engine.state, EngineState::Ready { .. })) {
                    self.opened = Some(epoch);
                    return self.tell(Event::SessionOpened { epoch });
                }
                self.session = None;
                self.tell(Event::SessionBroken { epoch, node: None, message: "connection refused".into() });
            }
            Later::Token { epoch, sequence, left } => self.token(epoch, sequence, left),
        }
    }

    /// What an engine answers to a link, and how long it takes for that.
    fn link(&mut self, epoch: Epoch, node: &NodeId, group: Option<Vec<u64>>) -> (Result<(), String>, Duration) {
        let engine = self.nodes.get_mut(node).and_then(|fake| fake.engine.as_mut());
        let Some(engine) = engine.filter(|engine| matches!(engine.state, EngineState::Ready { .. }) && engine.epoch < epoch) else {
            return (Err("connection refused".to_owned()), ms(0));
        };
        if engine.hangs {
            return (Err("no answer".to_owned()), ms(7000));
        }
        engine.epoch = epoch;
        assert_eq!(group.as_ref().map_or(1, Vec::len), engine.spec.place.ranks(), "a link names the whole group");
        let Some(group) = group else { return (Ok(()), ms(0)) };
        let name = engine_name(node);
        if engine.formed.as_ref().is_some_and(|formed| *formed != group) {
            let cause = "a process can be in one group in its life".to_owned();
            self.engine_fails(node, EngineState::Failed { cause: cause.clone(), output: Vec::new(), retry_in_ms: Some(200), lost: None });
            self.members_lose(&group, node, &name, ms(1));
            return (Err(cause), ms(0));
        }
        engine.formed = Some(group.clone());
        let alive = self.nodes.values().filter_map(|fake| fake.engine.as_ref()).filter(|engine| group.contains(&engine.incarnation));
        if alive.count() < group.len() {
            // It waits for a rank that never comes.
            let incarnation = self.nodes.get(node).and_then(|fake| fake.engine.as_ref()).map_or(0, |engine| engine.incarnation);
            self.after(ms(15_000), Later::Lose { node: node.clone(), incarnation, lost: name });
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
        let wanted = engines.into_iter().next();
        let same = fake.engine.as_ref().map(|engine| &engine.spec.id) == wanted.as_ref().map(|spec| &spec.id);
        if !same {
            let had = fake.engine.take().is_some();
            let incarnation = self.count + 1_000_000;
            fake.engine = wanted.map(|spec| FakeEngine {
                spec,
                incarnation,
                state: EngineState::Loading { done: Bytes(0), total: Bytes(1) },
                epoch: Epoch(0),
                formed: None,
                hangs: false,
            });
            if had {
                self.break_session("replaced");
            }
            self.after(load, Later::Loaded { node: node.clone(), incarnation });
        }
        self.observe(node);
    }

    fn snapshot(fake: &FakeNode) -> Snapshot {
        let status = |engine: &FakeEngine| EngineStatus { id: engine.spec.id.clone(), state: engine.state.clone() };
        Snapshot { version: fake.version, engines: fake.engine.iter().map(status).collect(), links: fake.links.clone() }
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

    fn break_session(&mut self, message: &str) {
        if let Some(epoch) = self.opened.take() {
            self.at_lead.clear();
            let delay = self.soon();
            let event = Event::SessionBroken { epoch, node: None, message: message.into() };
            self.after(delay, Later::Tell(event));
        }
    }
}

fn engine_name(node: &NodeId) -> String {
    node.0.trim_start_matches("id-").to_owned()
}

//! A pretended cluster for tests of the core: workers, engines and a lead in virtual time, with faults on demand.

mod reactions;

use super::{
    Now,
    adapters::AdapterOutcome,
    cluster::Cluster,
    event::{ClusterFailure, EngineAt, Event},
    placement::tests::{model, node},
    settings::{InstanceSettings, Kind, ModelFacts, Settings, TrainingFacts, TrainingWork},
};
use crate::serving::{Admitted, InstanceState, RequestEvent};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, Link, ModelSource, NodeFacts, Peer},
    ids::{AdapterId, Epoch, InstanceId, NodeId, SequenceId},
    links::{LinkFacts, Medium},
    plan::{Plan, Strategy},
    sampling::SamplingParams,
    training::{FineTune, LoraParameters, Optimizer, Parallel, Schedule, TrainStrategy, TrainingRole},
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

/// What one worker takes to hold all of the model, with the caches that are wished for.
pub(crate) fn needed() -> u64 {
    World::ready(1, Strategy::Auto, 9).plans[0].stages[0].ranks[0].needed().0
}

/// What one worker takes to train all of the model with so many rows at once.
pub(crate) fn needed_to_train(batch_size: u32) -> u64 {
    let mut world = World::new(Start { model: None, ..start(1, Strategy::Auto) }, 9);
    world.worker_up("w0");
    world.start_job_of(1, TrainingWork { batch_size, ..work(TrainStrategy::Auto) });
    world.run(ms(3000));
    let plan = &world.jobs[&InstanceId(1)].plans[0];
    assert_eq!(plan.training.as_ref().map(|training| training.micro_batch_rows), Some(batch_size));
    plan.stages[0].ranks[0].needed().0
}

pub(crate) fn work(strategy: TrainStrategy) -> TrainingWork {
    TrainingWork { strategy, batch_size: 4, max_seq_length: 64, tokens_per_row_max: None, accumulation: 1 }
}

pub(crate) fn training(work: TrainingWork) -> Arc<TrainingFacts> {
    let role = TrainingRole {
        fine_tune: FineTune::Lora(LoraParameters { rank: 8, scale: 20.0, dropout: 0.0, keys: None }),
        num_layers: None,
        optimizer: Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0, dampening: 0.0, nesterov: false },
        schedule: Schedule::constant(1e-5),
        seed: 0,
        grad_checkpoint: false,
        clear_cache_threshold: Bytes(0),
        parallel: Parallel::Data,
    };
    Arc::new(TrainingFacts { model: facts(), role, work })
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
    Adapter {
        epoch: Epoch,
        engine: EngineAt,
        adapter: AdapterId,
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
    /// Workers that it was offered again.
    pub(crate) could_have: Vec<Vec<String>>,
    pub(crate) drains: u32,
    pub(crate) ended: Option<Option<ClusterFailure>>,
}

pub(crate) struct World {
    /// Whether runners ask to be stopped when the coordinator drains.
    pub(crate) saves: bool,
    /// Memory of each worker.
    pub(crate) usable: u64,
    pub(crate) jobs: BTreeMap<InstanceId, FakeRunner>,
    /// Ends of served models.
    pub(crate) served_ends: Vec<Option<ClusterFailure>>,
    /// What engines hold of adapters, in which epoch.
    pub(crate) adapters: BTreeMap<(AdapterId, u32), Epoch>,
    pub(crate) settled: BTreeMap<AdapterId, AdapterOutcome>,
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
            saves: true,
            usable: 4_000_000_000,
            jobs: BTreeMap::new(),
            served_ends: Vec::new(),
            adapters: BTreeMap::new(),
            settled: BTreeMap::new(),
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
        self.engine_of_dies_unnoticed(instance, name, retry_in_ms);
    }

    /// As a rank that trains dies while the others of its group wait for batches.
    pub(crate) fn engine_of_dies_unnoticed(&mut self, instance: InstanceId, name: &str, retry_in_ms: Option<u64>) {
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

    pub(crate) fn start_job(&mut self, number: u64, strategy: TrainStrategy) -> InstanceId {
        self.start_job_of(number, work(strategy))
    }

    pub(crate) fn start_job_of(&mut self, number: u64, work: TrainingWork) -> InstanceId {
        let instance = InstanceId(number);
        self.jobs.insert(instance, FakeRunner::default());
        self.tell(Event::Start { instance, kind: Kind::Training(training(work)), settings: InstanceSettings::default() });
        instance
    }

    pub(crate) fn submit(&mut self, sequence: u64) -> SequenceId {
        let sequence = SequenceId(sequence);
        let request = Admitted { prompt: vec![1], params: SamplingParams::default(), adapter: None };
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
}

fn engine_name(node: &NodeId) -> String {
    node.0.trim_start_matches("id-").to_owned()
}

/// As the engine's id tells.
fn instance_of(spec: &EngineSpec) -> InstanceId {
    InstanceId(spec.id.0.split('-').nth(1).and_then(|number| number.parse().ok()).expect("a number"))
}

//! The one loop: takes what tasks, clients and the clock say, hands it to the core, carries out what the core decides.

mod adapters;

use crate::{
    adapters::{OpenAdapter, Registry},
    core::{
        Now,
        cluster::Cluster,
        event::{ClusterFailure, Effect, Event},
        settings::{InstanceSettings, Kind, ModelFacts, Settings},
    },
    discovery::{
        Peer,
        mdns::Found,
        rivals::{Rank, Rival, gives_way},
    },
    error::CoordinatorError,
    links::{Desired, Links, Note, adapter::DropCall, engine::LinkCall, session::SessionCall, session::SessionHandle},
    loading::{LoadAnswer, LoadError, LoadRequest, Read, Reading},
    model::{LoadedModel, ModelError},
    report::{Report, Reporter},
    runners::Runners,
    serving::{ClusterStatus, InstanceState, RequestEvent, RunnerNote, ServedModel, ServingCommand},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use mlx_cluster_common::ids::{InstanceId, NodeId, SequenceId};
use mlx_cluster_proto::wire::Hello;
use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Running requests get this long when the coordinator is told to stop; all of it must be over within 10 s.
const STOP_DRAIN: Duration = Duration::from_secs(5);
/// And this long when somebody asked to drain it.
const ASKED_DRAIN: Duration = Duration::from_secs(30);
/// When nobody came for so long, the user gets a hint.
const HINT_AFTER: Duration = Duration::from_secs(5);
/// Without any worker of our own, and one held by another coordinator for so long, that one is taken for alive.
const HELD_PATIENCE: Duration = Duration::from_secs(12);
/// The longest sleep, in case a deadline was missed.
const TICK_MAX: Duration = Duration::from_secs(1);

/// What the driver is made of.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    /// How models are spread unless somebody asks for another way.
    pub(crate) defaults: InstanceSettings,
    /// What is served from the start.
    pub(crate) start: Option<Arc<ModelFacts>>,
    /// What is served beside it from the start.
    pub(crate) adapters: Vec<OpenAdapter>,
    /// What clients need of the model that is served.
    pub(crate) model: Option<LoadedModel>,
    /// The folder for this machine's own state.
    pub(crate) home: PathBuf,
    pub(crate) hello: Hello,
    pub(crate) rank: Rank,
    pub(crate) join_addresses: Vec<String>,
    pub(crate) url: String,
    pub(crate) commands: mpsc::Receiver<ServingCommand>,
    pub(crate) status: watch::Sender<Arc<ClusterStatus>>,
    pub(crate) served: watch::Sender<Option<Arc<ServedModel>>>,
    /// Workers that announced themselves over gRPC.
    pub(crate) joined: mpsc::Receiver<Peer>,
    pub(crate) found: mpsc::Receiver<Found>,
    pub(crate) reporter: Reporter,
}

/// A client that waits for events. Dropping it lets go of the client's channel.
struct Client {
    events: mpsc::Sender<RequestEvent>,
    _over: oneshot::Sender<()>,
}

type Gone = Pin<Box<dyn Future<Output = SequenceId> + Send>>;

pub(crate) struct Driver {
    cluster: Cluster,
    parts: Parts,
    started: Instant,
    links: Links,
    notes: mpsc::Receiver<Note>,
    session: Option<SessionHandle>,
    clients: BTreeMap<SequenceId, Client>,
    /// One for each client; resolves when it is gone or its request is over.
    gone: FuturesUnordered<Gone>,
    sequences: u64,
    runners: Runners,
    adapters: Registry,
    reading: Option<Reading>,
    /// Who waits for the served model to be gone, and what it is called.
    unloading: Vec<(LoadAnswer, String)>,
    drained: Vec<oneshot::Sender<()>>,
    failure: Option<CoordinatorError>,
    held: BTreeMap<NodeId, (Now, String)>,
    shown: Shown,
}

/// What was told before, so that it is told once.
struct Shown {
    changes: u64,
    state: InstanceState,
    workers: usize,
    hinted: bool,
}

enum Input {
    Command(Option<ServingCommand>),
    Note(Option<Note>),
    Joined(Option<Peer>),
    Found(Option<Found>),
    Gone(SequenceId),
    RunnerGone(InstanceId),
    Read(Result<LoadedModel, ModelError>),
    Stop,
    Tick,
}

impl Driver {
    pub(crate) fn new(parts: Parts) -> Self {
        let (notes, receiver) = mpsc::channel(1024);
        let cluster = match &parts.start {
            Some(model) => Cluster::serving(parts.settings.clone(), Arc::clone(model), parts.defaults.clone()),
            None => Cluster::idle(parts.settings.clone()),
        };
        Self {
            cluster,
            links: Links::new(parts.hello.clone(), notes),
            parts,
            started: Instant::now(),
            notes: receiver,
            session: None,
            clients: BTreeMap::new(),
            gone: FuturesUnordered::new(),
            sequences: 0,
            runners: Runners::default(),
            adapters: Registry::default(),
            reading: None,
            unloading: Vec::new(),
            drained: Vec::new(),
            failure: None,
            held: BTreeMap::new(),
            shown: Shown { changes: u64::MAX, state: InstanceState::Idle, workers: 0, hinted: false },
        }
    }

    fn now(&self) -> Now {
        self.started.elapsed()
    }

    /// Runs until told to stop, or until there is no use in going on.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> Result<(), CoordinatorError> {
        let mut stopping = false;
        self.add_given_adapters();
        self.publish();
        loop {
            let input = self.next(&stop, stopping).await;
            stopping |= matches!(input, Input::Stop);
            let event = self.event(input);
            let ended = event.and_then(|event| self.handle(event));
            self.publish();
            self.adapters.answer();
            if let Some(result) = ended {
                self.links.stop().await;
                for done in self.drained {
                    // Who asked for the drain may be gone.
                    let _ = done.send(());
                }
                return self.failure.map_or(result, Err);
            }
        }
    }

    async fn next(&mut self, stop: &CancellationToken, stopping: bool) -> Input {
        let now = self.now();
        let until = self.cluster.deadline(now).unwrap_or(Now::MAX).min(now + TICK_MAX);
        let deadline = self.started + until;
        tokio::select! {
            note = self.notes.recv() => Input::Note(note),
            Some(sequence) = self.gone.next(), if !self.gone.is_empty() => Input::Gone(sequence),
            instance = self.runners.next_gone() => Input::RunnerGone(instance),
            read = read(&mut self.reading) => Input::Read(read),
            command = self.parts.commands.recv(), if !self.parts.commands.is_closed() => Input::Command(command),
            peer = self.parts.joined.recv(), if !self.parts.joined.is_closed() => Input::Joined(peer),
            found = self.parts.found.recv(), if !self.parts.found.is_closed() => Input::Found(found),
            () = stop.cancelled(), if !stopping => Input::Stop,
            () = tokio::time::sleep_until(deadline) => Input::Tick,
        }
    }

    /// The core's event, for inputs that concern it.
    fn event(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Command(Some(command)) => self.command(command),
            Input::RunnerGone(instance) => Some(Event::Stop { instance }),
            Input::Read(read) => self.read(read),
            Input::Note(Some(Note::Event(event))) => Some(event),
            Input::Note(Some(Note::Held { node, message })) => self.held(node, message),
            Input::Note(Some(Note::AdapterRead { name, read, answer })) => self.adapter_read(&name, read, answer),
            Input::Note(Some(Note::LinkEnded(node))) => {
                self.links.ended(&node);
                None
            }
            Input::Joined(Some(peer)) | Input::Found(Some(Found::Worker(peer))) => {
                self.links.seen(peer);
                None
            }
            Input::Found(Some(Found::WorkerGone(node))) => {
                self.links.forget(&node);
                None
            }
            Input::Found(Some(Found::Coordinator(rival))) => self.rival(&rival),
            Input::Gone(sequence) => self.clients.remove(&sequence).map(|_| Event::Abandoned { sequence }),
            Input::Stop => Some(Event::Drain { limit: STOP_DRAIN }),
            Input::Tick => Some(Event::Tick),
            Input::Command(None) | Input::Note(None) | Input::Joined(None) | Input::Found(None) => None,
        }
    }

    fn command(&mut self, command: ServingCommand) -> Option<Event> {
        match command {
            ServingCommand::Submit { request, events } => {
                let sequence = self.add_client(events);
                Some(Event::Submitted { sequence, request })
            }
            ServingCommand::Drain { done } => {
                self.drained.push(done);
                Some(Event::Drain { limit: ASKED_DRAIN })
            }
            ServingCommand::Load { request, answer } => {
                self.load(request, answer);
                None
            }
            ServingCommand::Unload { answer } => self.unload(answer),
            ServingCommand::LoadAdapter { name, path, answer } => {
                self.load_adapter(name, path, answer);
                None
            }
            ServingCommand::DropAdapter { name, answer } => self.drop_adapter(&name, answer),
            ServingCommand::StartJob { instance, facts, settings, notes } => {
                if instance == InstanceId::SERVED || self.cluster.has(instance) {
                    // A runner reads the end of its notes as the end of its engines.
                    tracing::error!(%instance, "a job asked for the number of another instance");
                    return None;
                }
                self.runners.add(instance, notes);
                Some(Event::Start { instance, kind: Kind::Training(facts), settings })
            }
            ServingCommand::Broken { instance, epoch, node, message } => Some(Event::SessionBroken { instance, epoch, node, message }),
            ServingCommand::PlanAgain { instance, epoch } => Some(Event::PlanAgain { instance, epoch }),
            ServingCommand::StopJob { instance } => (instance != InstanceId::SERVED).then_some(Event::Stop { instance }),
        }
    }

    /// The name of the model that is served or shall be.
    fn served_name(&self) -> String {
        self.parts.model.as_ref().map(|model| model.facts.name.clone()).unwrap_or_default()
    }

    fn load(&mut self, request: LoadRequest, answer: LoadAnswer) {
        let refused = match &self.reading {
            Some(reading) => Some(LoadError::BeingRead { model: reading.model().to_owned() }),
            None if self.cluster.has(InstanceId::SERVED) => Some(LoadError::ServedAlready { model: self.served_name() }),
            None => None,
        };
        match refused {
            // Who asked may be gone.
            Some(error) => drop(answer.send(Err(error))),
            None => self.reading = Some(Reading::start(request, answer, self.parts.home.clone())),
        }
    }

    fn read(&mut self, read: Result<LoadedModel, ModelError>) -> Option<Event> {
        let Read { model, settings } = self.reading.take()?.finish(read, &self.parts.defaults)?;
        let kind = Kind::Serving(Arc::clone(&model.facts));
        self.parts.model = Some(model);
        Some(Event::Start { instance: InstanceId::SERVED, kind, settings })
    }

    fn unload(&mut self, answer: LoadAnswer) -> Option<Event> {
        let instance = InstanceId::SERVED;
        if let Some(reading) = self.reading.take() {
            // Who asked may be gone.
            drop(answer.send(Ok(reading.model().to_owned())));
            reading.call_off();
            return None;
        }
        if self.cluster.has(instance) {
            self.unloading.push((answer, self.served_name()));
            return Some(Event::Stop { instance });
        }
        // One that failed to start is not there any more, but the state tells of it.
        let failed = matches!(self.cluster.instance_state(), InstanceState::Failed { .. });
        let answered = if failed { Ok(self.served_name()) } else { Err(LoadError::NothingServed) };
        drop(answer.send(answered));
        failed.then_some(Event::Stop { instance })
    }

    fn add_client(&mut self, events: mpsc::Sender<RequestEvent>) -> SequenceId {
        self.sequences += 1;
        let sequence = SequenceId(self.sequences);
        let (over, is_over) = oneshot::channel::<()>();
        let watched = events.clone();
        self.gone.push(Box::pin(async move {
            tokio::select! {
                () = watched.closed() => {}
                // Dropped with the client, when its request is over.
                _ = is_over => {}
            }
            sequence
        }));
        self.clients.insert(sequence, Client { events, _over: over });
        sequence
    }

    fn holds_workers(&self) -> bool {
        self.shown.workers > 0
    }

    fn rival(&mut self, rival: &Rival) -> Option<Event> {
        if !gives_way(&self.parts.rank, &rival.rank, self.holds_workers()) {
            return None;
        }
        self.give_way(rival.place())
    }

    /// A worker is held by somebody else. One that was killed lets go within seconds.
    fn held(&mut self, node: NodeId, message: String) -> Option<Event> {
        let now = self.now();
        let since = self.held.entry(node).or_insert((now, message)).clone();
        if self.holds_workers() || now < since.0 + HELD_PATIENCE {
            return None;
        }
        self.give_way(since.1)
    }

    fn give_way(&mut self, other: String) -> Option<Event> {
        let cluster = self.parts.settings.cluster.clone();
        self.failure.get_or_insert(CoordinatorError::SecondCoordinator { cluster, other });
        Some(Event::Drain { limit: Duration::ZERO })
    }

    /// Carries out what follows from an event; Some when all is over.
    fn handle(&mut self, event: Event) -> Option<Result<(), CoordinatorError>> {
        let mut events = VecDeque::from([event]);
        let mut ended = None;
        while let Some(event) = events.pop_front() {
            if let Event::WorkerUp { facts, .. } = &event {
                self.held.remove(&facts.id);
                let (name, chip, usable) = (facts.name.clone(), facts.chip.clone(), facts.usable_memory.to_string());
                (self.parts.reporter)(Report::WorkerFound { name, chip, usable });
            }
            let now = self.now();
            for effect in self.cluster.handle(event, now) {
                match effect {
                    Effect::End(failure) => ended = Some(failure.map_or(Ok(()), |failure| Err(failure.into()))),
                    effect => events.extend(self.carry_out(effect)),
                }
            }
        }
        ended
    }

    /// An event, where an effect fails at once.
    fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::SetDesired { node, version, engines, neighbours } => {
                self.links.set_desired(&node, Desired { version, engines, neighbours });
            }
            Effect::Link { instance, epoch, engine, name, addresses, link } => {
                tracing::debug!(%instance, %epoch, engine, name, ?addresses, "link");
                self.links.link(LinkCall { instance, epoch, engine, name, addresses, link });
            }
            Effect::OpenSession { epoch, name, addresses } => {
                self.session = Some(self.links.open_session(SessionCall { epoch, name, addresses }));
            }
            Effect::CloseSession => self.session = None,
            Effect::LoadAdapter { epoch, engine, layers, adapter } => return self.send_adapter(epoch, engine, layers, adapter),
            Effect::DropAdapter { epoch, engine, adapter } => self.links.drop_adapter(DropCall { epoch, engine, id: adapter }),
            Effect::AdapterSettled { adapter, outcome } => self.adapters.settled(adapter, outcome),
            Effect::Command(command) => {
                let session = self.session.as_ref()?;
                if !session.send(command) {
                    let message = "its engine takes no more requests".to_owned();
                    return Some(Event::SessionBroken { instance: InstanceId::SERVED, epoch: session.epoch, node: None, message });
                }
            }
            Effect::Answer { sequence, event } => return self.answer(sequence, event),
            Effect::Planned { instance, plan } if instance != InstanceId::SERVED => {
                return self.tell_runner(instance, RunnerNote::Planned(plan));
            }
            Effect::Planned { plan, .. } => {
                let served = self.parts.model.as_ref().map(|model| Arc::new(model.served(plan.context_tokens)));
                self.parts.served.send_replace(served);
                (self.parts.reporter)(Report::Planned(plan));
            }
            Effect::TrainingReady { instance, epoch, engines } => return self.tell_runner(instance, RunnerNote::Ready { epoch, engines }),
            Effect::TrainingBroken { instance, epoch, cause } => return self.tell_runner(instance, RunnerNote::Broken { epoch, cause }),
            Effect::TrainingCouldGrow { instance, epoch, workers } => {
                return self.tell_runner(instance, RunnerNote::CouldGrow { epoch, workers });
            }
            Effect::TrainingDrain { instance, within } => return self.tell_runner(instance, RunnerNote::Drain { within }),
            Effect::InstanceEnded { instance, failure } if instance != InstanceId::SERVED => {
                return self.tell_runner(instance, RunnerNote::Ended { failure });
            }
            Effect::InstanceEnded { failure, .. } => self.served_ended(failure.as_ref()),
            Effect::End(_) => {}
        }
        None
    }

    /// A job whose runner does not listen is stopped.
    fn tell_runner(&mut self, instance: InstanceId, note: RunnerNote) -> Option<Event> {
        (!self.runners.tell(instance, note)).then_some(Event::Stop { instance })
    }

    fn served_ended(&mut self, failure: Option<&ClusterFailure>) {
        self.parts.served.send_replace(None);
        self.adapters.clear();
        for (answer, name) in self.unloading.drain(..) {
            // Who asked may be gone.
            drop(answer.send(Ok(name)));
        }
        if let Some(failure) = failure {
            tracing::warn!(%failure, "the model is not served");
        }
    }

    /// A client that does not read as fast as tokens come is given up once its channel is full.
    fn answer(&mut self, sequence: SequenceId, event: RequestEvent) -> Option<Event> {
        let is_last = matches!(event, RequestEvent::Finished(_) | RequestEvent::Failed(_));
        let sent = self.clients.get(&sequence)?.events.try_send(event).is_ok();
        if !sent || is_last {
            self.clients.remove(&sequence);
        }
        (!sent && !is_last).then_some(Event::Abandoned { sequence })
    }

    /// Shows the state to the API and to the user, where it changed.
    fn publish(&mut self) {
        self.hint();
        if self.cluster.changes() == self.shown.changes {
            return;
        }
        self.shown.changes = self.cluster.changes();
        let status = self.cluster.status(&self.parts.join_addresses);
        self.shown.workers = status.workers.iter().filter(|worker| worker.connected).count();
        let state = status.instance.clone();
        self.parts.status.send_replace(Arc::new(status));
        if state == self.shown.state {
            return;
        }
        let report = match &state {
            InstanceState::Ready | InstanceState::Idle => Some(Report::Ready { url: self.parts.url.clone() }),
            InstanceState::WaitingForWorkers { .. } | InstanceState::Draining => None,
            other => Some(Report::State(other.clone())),
        };
        self.shown.state = state;
        report.into_iter().for_each(|report| (self.parts.reporter)(report));
    }

    fn hint(&mut self) {
        let waiting = match self.shown.state {
            InstanceState::WaitingForWorkers { found, wanted } => Some((found, wanted)),
            _ => None,
        };
        let Some((found, wanted)) = waiting.filter(|_| !self.shown.hinted && self.now() >= HINT_AFTER) else { return };
        self.shown.hinted = true;
        let join_address = self.parts.join_addresses.first().cloned().unwrap_or_default();
        (self.parts.reporter)(Report::Waiting { found, wanted, cluster: self.parts.settings.cluster.clone(), join_address });
    }
}

/// The model that is being read, once it is; never when there is none.
async fn read(reading: &mut Option<Reading>) -> Result<LoadedModel, ModelError> {
    match reading {
        Some(reading) => reading.read().await,
        None => std::future::pending().await,
    }
}

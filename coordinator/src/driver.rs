//! The one loop: takes what tasks, clients and the clock say, hands it to the core, carries out what the core decides.

use crate::{
    core::{
        Now,
        cluster::Cluster,
        event::{Effect, Event, Settings},
    },
    discovery::{
        Peer,
        mdns::Found,
        rivals::{Rank, Rival, gives_way},
    },
    error::CoordinatorError,
    links::{Desired, Links, Note, engine::LinkCall, session::SessionCall, session::SessionHandle},
    model::LoadedModel,
    report::{Report, Reporter},
    serving::{ClusterStatus, InstanceState, RequestEvent, ServedModel, ServingCommand},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use mlx_cluster_common::ids::{NodeId, SequenceId};
use mlx_cluster_proto::wire::Hello;
use std::{
    collections::{BTreeMap, VecDeque},
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
    pub(crate) model: Option<LoadedModel>,
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
    Stop,
    Tick,
}

impl Driver {
    pub(crate) fn new(parts: Parts) -> Self {
        let (notes, receiver) = mpsc::channel(1024);
        Self {
            cluster: Cluster::new(parts.settings.clone()),
            links: Links::new(parts.hello.clone(), notes),
            parts,
            started: Instant::now(),
            notes: receiver,
            session: None,
            clients: BTreeMap::new(),
            gone: FuturesUnordered::new(),
            sequences: 0,
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
        self.publish();
        loop {
            let input = self.next(&stop, stopping).await;
            stopping |= matches!(input, Input::Stop);
            let Some(event) = self.event(input) else { continue };
            let ended = self.handle(event);
            self.publish();
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
            Input::Command(Some(ServingCommand::Submit { request, events })) => {
                let sequence = self.add_client(events);
                Some(Event::Submitted { sequence, request })
            }
            Input::Command(Some(ServingCommand::Drain { done })) => {
                self.drained.push(done);
                Some(Event::Drain { limit: ASKED_DRAIN })
            }
            Input::Note(Some(Note::Event(event))) => Some(event),
            Input::Note(Some(Note::Held { node, message })) => self.held(node, message),
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
            Effect::Link { epoch, engine, name, addresses, link } => {
                tracing::debug!(%epoch, engine, name, ?addresses, "link");
                self.links.link(LinkCall { epoch, engine, name, addresses, link });
            }
            Effect::OpenSession { epoch, name, addresses } => {
                self.session = Some(self.links.open_session(SessionCall { epoch, name, addresses }));
            }
            Effect::CloseSession => self.session = None,
            Effect::Command(command) => {
                let session = self.session.as_ref()?;
                if !session.send(command) {
                    let message = "its engine takes no more requests".to_owned();
                    return Some(Event::SessionBroken { epoch: session.epoch, node: None, message });
                }
            }
            Effect::Answer { sequence, event } => return self.answer(sequence, event),
            Effect::Planned(plan) => {
                let served = self.parts.model.as_ref().map(|model| Arc::new(model.served(plan.context_tokens)));
                self.parts.served.send_replace(served);
                (self.parts.reporter)(Report::Planned(plan));
            }
            Effect::End(_) => {}
        }
        None
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

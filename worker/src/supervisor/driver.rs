//! Carries out what the plan decides: owns the engine processes and the fetches, and tells coordinators what it sees.

use super::{
    effort::Effort,
    facts::Facts,
    hold::{Held, Hold, Session},
    links::Situation,
    plan::{Effect, Event, Failure, Run, Supervision},
    process::{self, Control},
    store::Store,
};
use crate::engine::boot::{Boot, BootLine};
use futures_util::FutureExt;
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, EngineStatus, Peer},
    ids::NodeId,
    links::LinkFacts,
    units::Bytes,
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::{CancellationToken, DropGuard};

/// A coordinator hears something this often, so that it can tell a quiet worker from a dead one.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(1);
const RESIDENT_EVERY_TICKS: u64 = 3;
/// Of engines and their ends together: what is longer is killed with the worker.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);
const EVENTS_MAX: usize = 256;
const CONTROLS_MAX: usize = 4;

/// What a session asks of the driver.
#[derive(Debug)]
pub(crate) enum Request {
    Hold {
        node: NodeId,
        name: String,
        reply: oneshot::Sender<Result<Lease, Held>>,
    },
    /// A message came. `wanted` is the state that it wants, if it wants a new one.
    Heard {
        session: Session,
        wanted: Option<Wanted>,
    },
    /// What this node is, known once it was measured.
    Facts(Facts),
    /// The ways to all neighbours, as far as they were measured.
    Links(Vec<LinkFacts>),
}

/// What a coordinator wants of this worker.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) version: u64,
    pub(crate) engines: Vec<EngineSpec>,
    pub(crate) neighbours: Vec<Peer>,
}

/// A session's right to this worker. Dropping it gives the worker back.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) session: Session,
    /// Cancelled when the worker ends the session.
    pub(crate) revoked: CancellationToken,
    _ended: DropGuard,
}

/// The driver's side of a [`Lease`].
#[derive(Debug)]
struct Grant {
    session: Session,
    revoked: CancellationToken,
    ended: CancellationToken,
}

/// What is the case on this worker, as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observation {
    pub(crate) held: bool,
    pub(crate) facts: Option<Arc<Facts>>,
    pub(crate) version: u64,
    pub(crate) engines: Vec<EngineStatus>,
    pub(crate) links: Vec<LinkFacts>,
}

/// How engines are started.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) command: PathBuf,
    /// This worker's own, for what engines leave on disk while they run.
    pub(crate) folder: PathBuf,
    pub(crate) listen: IpAddr,
    pub(crate) worker: String,
}

#[derive(Debug)]
struct Engine {
    control: mpsc::Sender<Control>,
    pid: Option<u32>,
}

#[derive(Debug)]
pub(crate) struct Driver {
    launch: Launch,
    store: Arc<Store>,
    core: Supervision,
    hold: Hold,
    grant: Option<Grant>,
    facts: Option<Arc<Facts>>,
    neighbours: Vec<Peer>,
    links: Vec<LinkFacts>,
    engines: BTreeMap<Run, Engine>,
    fetches: BTreeMap<Run, AbortHandle>,
    tasks: JoinSet<()>,
    events: mpsc::Sender<Event>,
    observed: watch::Sender<Observation>,
    situation: watch::Sender<Situation>,
    system: Option<System>,
    effort: Effort,
    started: Instant,
    ticks: u64,
    /// When engines that have not ended by themselves are killed; known once the worker stops.
    abandon_at: Option<Instant>,
}

/// What the driver waits for.
enum Input {
    Event(Event),
    Request(Request),
    SessionEnded,
    TaskEnded(Result<(), JoinError>),
    KeepAlive,
    Shutdown,
    Abandon,
}

impl Driver {
    /// `last_run` is higher than any run of an earlier worker process of this node.
    pub(crate) fn new(
        launch: Launch,
        store: Arc<Store>,
        last_run: u64,
        observed: watch::Sender<Observation>,
        situation: watch::Sender<Situation>,
    ) -> (Self, mpsc::Receiver<Event>) {
        let (events, received) = mpsc::channel(EVENTS_MAX);
        let driver = Self {
            launch,
            store,
            core: Supervision::new(last_run),
            hold: Hold::default(),
            grant: None,
            facts: None,
            neighbours: Vec::new(),
            links: Vec::new(),
            engines: BTreeMap::new(),
            fetches: BTreeMap::new(),
            tasks: JoinSet::new(),
            events,
            observed,
            situation,
            system: System::new().ok(),
            effort: Effort::default(),
            started: Instant::now(),
            ticks: 0,
            abandon_at: None,
        };
        (driver, received)
    }

    /// Runs until `stop` and until the last engine is gone after it.
    pub(crate) async fn run(mut self, mut events: mpsc::Receiver<Event>, mut requests: mpsc::Receiver<Request>, stop: CancellationToken) {
        let mut keep_alive = interval(KEEP_ALIVE);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.abandon_at.is_none() || !self.core.is_idle() {
            let due = self.core.next_deadline().map(|time| self.started + time);
            let input = tokio::select! {
                Some(event) = events.recv() => Input::Event(event),
                Some(request) = requests.recv() => Input::Request(request),
                () = ended(self.grant.as_ref()) => Input::SessionEnded,
                Some(result) = self.tasks.join_next() => Input::TaskEnded(result),
                _ = keep_alive.tick() => Input::KeepAlive,
                () = sleep_until(due.unwrap_or(self.started)), if due.is_some() => Input::Event(Event::Tick),
                () = stop.cancelled(), if self.abandon_at.is_none() => Input::Shutdown,
                () = sleep_until(self.abandon_at.unwrap_or(self.started)), if self.abandon_at.is_some() => Input::Abandon,
            };
            match input {
                Input::Shutdown => {
                    self.abandon_at = Some(Instant::now() + SHUTDOWN_DEADLINE);
                    self.revoke();
                    self.handle(Event::Shutdown);
                }
                Input::Abandon => break,
                input => self.take(input),
            }
            self.publish();
        }
        // Dropping the tasks kills what is left.
        self.tasks.shutdown().await;
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Event(event) => {
                let is_ready = matches!(event, Event::Said { line: BootLine::Ready { .. }, .. });
                if let Event::Exited { run, .. } = &event {
                    self.engines.remove(run);
                }
                self.handle(event);
                if is_ready {
                    self.look_at_engines();
                }
            }
            Input::Request(request) => self.answer(request),
            Input::SessionEnded => self.release(),
            Input::TaskEnded(Err(error)) if error.is_panic() => tracing::error!(%error, "a task of the worker failed; please report this"),
            Input::KeepAlive => {
                self.ticks += 1;
                if self.ticks.is_multiple_of(RESIDENT_EVERY_TICKS) {
                    self.look_at_engines();
                }
            }
            Input::TaskEnded(_) | Input::Shutdown | Input::Abandon => {}
        }
    }

    fn answer(&mut self, request: Request) {
        let now = self.started.elapsed();
        match request {
            // Without a reply the coordinator is told that the worker is stopping.
            Request::Hold { .. } if self.abandon_at.is_some() => {}
            Request::Hold { node, name, reply } => {
                let lease = self.hold.take(&self.launch.worker, &node, &name, now).map(|session| self.lease(session));
                match &lease {
                    Ok(_) => tracing::info!(coordinator = name, %node, "held by a coordinator"),
                    Err(held) => tracing::warn!(coordinator = name, %node, "refused: {held}"),
                }
                if lease.is_ok() {
                    // So that nobody takes what was observed for an earlier coordinator for an answer to this one.
                    self.handle(Event::Held);
                    self.publish();
                }
                // When the coordinator is gone already, the lease ends here and with it the hold.
                let _ = reply.send(lease);
            }
            Request::Heard { session, wanted } => {
                if let (true, Some(Wanted { version, engines, neighbours })) = (self.hold.hear(session, now), wanted) {
                    self.neighbours = neighbours;
                    self.handle(Event::Wanted { version, engines });
                }
            }
            Request::Facts(facts) => self.facts = Some(Arc::new(facts)),
            Request::Links(links) => self.links = links,
        }
    }

    fn lease(&mut self, session: Session) -> Lease {
        // A coordinator that comes back replaces its own dead connection.
        self.revoke();
        let (revoked, ended) = (CancellationToken::new(), CancellationToken::new());
        self.grant = Some(Grant { session, revoked: revoked.clone(), ended: ended.clone() });
        Lease { session, revoked, _ended: ended.drop_guard() }
    }

    fn revoke(&mut self) {
        if let Some(grant) = self.grant.take() {
            grant.revoked.cancel();
            self.hold.release(grant.session);
        }
    }

    fn release(&mut self) {
        let Some(grant) = self.grant.take() else { return };
        if self.hold.release(grant.session) {
            tracing::info!("no coordinator holds this worker any more");
            self.neighbours.clear();
            self.handle(Event::Orphaned);
        }
    }

    fn handle(&mut self, event: Event) {
        for effect in self.core.handle(event, self.started.elapsed()) {
            self.carry_out(effect);
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Fetch { run, spec } => self.fetch(run, spec),
            Effect::CancelFetch { run } => {
                if let Some(fetch) = self.fetches.remove(&run) {
                    fetch.abort();
                }
            }
            Effect::Start { run, spec, folder } => self.start(run, spec, folder),
            Effect::CloseStdin { run } => self.control(run, Control::CloseStdin),
            Effect::Kill { run } => self.control(run, Control::Kill),
        }
    }

    fn control(&self, run: Run, control: Control) {
        // A process that is gone is not listening; one gets two controls in its life at most, so the channel is never full.
        if let Some(engine) = self.engines.get(&run) {
            let _ = engine.control.try_send(control);
        }
    }

    fn fetch(&mut self, run: Run, spec: EngineSpec) {
        let (store, events) = (self.store.clone(), self.events.clone());
        self.fetches.retain(|_, fetch| !fetch.is_finished());
        let fetch = self.tasks.spawn(async move {
            let panicked = AssertUnwindSafe(store.fetch(run, &spec, events.clone())).catch_unwind().await.is_err();
            if panicked {
                let cause = format!("fetching {} failed inside mlx-cluster; please report this", spec.model);
                let _ = events.send(Event::FetchFailed { run, failure: Failure::passing(cause) }).await;
            }
        });
        self.fetches.insert(run, fetch);
    }

    fn start(&mut self, run: Run, spec: EngineSpec, folder: PathBuf) {
        let boot = Boot { spec, folder, listen: SocketAddr::new(self.launch.listen, 0), node_name: self.launch.worker.clone() };
        let (control, controls) = mpsc::channel(CONTROLS_MAX);
        let environment = match process::environment(&boot.spec.place, run, &self.launch.folder) {
            Ok(environment) => environment,
            Err(error) => {
                let cause = format!("engine could not be started: cannot make {} ({error})", self.launch.folder.display());
                return self.handle(Event::Exited { run, cause, output: Vec::new() });
            }
        };
        match process::start(&self.launch.command, environment, boot, run, controls, self.events.clone()) {
            Ok(process) => {
                self.engines.insert(run, Engine { control, pid: process.pid() });
                self.tasks.spawn(process.attend());
            }
            Err(error) => {
                let cause = format!("engine could not be started: {} ({error})", self.launch.command.display());
                self.handle(Event::Exited { run, cause, output: Vec::new() });
            }
        }
    }

    /// Asks the system how much memory each engine has, and how much they computed.
    fn look_at_engines(&mut self) {
        let Some(system) = &mut self.system else { return };
        let pids: Vec<_> = self.engines.iter().filter_map(|(run, engine)| Some((*run, Pid::from_u32(engine.pid?)))).collect();
        let only: Vec<_> = pids.iter().map(|(_, pid)| *pid).collect();
        let wanted = ProcessRefreshKind::nothing().with_memory().with_cpu().without_tasks();
        system.refresh_processes_specifics(ProcessesToUpdate::Some(&only), true, wanted);
        let computed = only.iter().filter_map(|pid| Some(system.process(*pid)?.accumulated_cpu_time())).sum();
        self.effort.look(Duration::from_millis(computed), self.started.elapsed());
        let sizes: Vec<_> = pids.into_iter().filter_map(|(run, pid)| Some((run, Bytes(system.process(pid)?.memory())))).collect();
        for (run, bytes) in sizes {
            self.handle(Event::Resident { run, bytes });
        }
    }

    /// Whether engines load or compute, as far as that is known.
    fn is_busy(&self, engines: &[EngineStatus]) -> bool {
        let starts = |status: &EngineStatus| matches!(status.state, EngineState::Fetching { .. } | EngineState::Loading { .. });
        engines.iter().any(starts) || (!engines.is_empty() && self.effort.is_high)
    }

    fn publish(&self) {
        let engines = self.core.statuses(self.started.elapsed());
        let situation = Situation { neighbours: self.neighbours.clone(), is_busy: self.is_busy(&engines) };
        self.situation.send_if_modified(|known| std::mem::replace(known, situation.clone()) != situation);
        self.observed.send_replace(Observation {
            held: self.hold.is_held(),
            facts: self.facts.clone(),
            version: self.core.version(),
            engines,
            links: self.links.clone(),
        });
    }
}

/// When the session of this grant ends; never without one.
async fn ended(grant: Option<&Grant>) {
    match grant {
        Some(grant) => grant.ended.cancelled().await,
        None => std::future::pending().await,
    }
}

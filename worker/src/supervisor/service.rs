//! The worker's gRPC service: one coordinator's stream of wishes in, what is the case out.

use super::{
    driver::{Lease, Observation, Request, Wanted},
    links::answer::{self, Echoes},
    local::Local,
};
use futures_util::Stream;
use mlx_cluster_common::{
    engine::{EngineSpec, Peer},
    ids::NodeId,
};
use mlx_cluster_proto::{WireError, wire};
use std::{collections::BTreeSet, net::IpAddr, pin::Pin, sync::Arc, time::Duration};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Response, Status, Streaming};

const FIRST_MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
/// A coordinator that says nothing for this long is taken for gone.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Snapshots on their way to a coordinator; one that is slow gets the next one instead.
const OBSERVED_BUFFERED_MAX: usize = 4;
const ENGINES_MAX: usize = 64;
const NEIGHBOURS_MAX: usize = 256;
const NEIGHBOUR_ADDRESSES_MAX: usize = 16;
const NAME_CHARS_SHOWN: usize = 64;

#[derive(Debug)]
pub(crate) struct WorkerService {
    pub(crate) local: Arc<Local>,
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) observed: watch::Receiver<Observation>,
    pub(crate) sessions: TaskTracker,
    /// One permit: for measuring a way, or for being measured.
    pub(crate) turn: Arc<Semaphore>,
}

type Outgoing = Pin<Box<dyn Stream<Item = Result<wire::Observed, Status>> + Send>>;

#[tonic::async_trait]
impl wire::worker_server::Worker for WorkerService {
    type SuperviseStream = Outgoing;
    type ProbeStream = Echoes;

    /// Answers once the first message has come; what is observed follows as soon as this node has been measured.
    async fn supervise(&self, request: tonic::Request<Streaming<wire::Desired>>) -> Result<Response<Outgoing>, Status> {
        let reached = request.local_addr().map(|address| address.ip().to_canonical());
        let mut inbound = request.into_inner();
        let first = match timeout(FIRST_MESSAGE_DEADLINE, inbound.message()).await {
            Ok(first) => first?.ok_or(WireError::Missing("hello"))?,
            Err(_) => return Err(Status::deadline_exceeded("no first message within 5 s")),
        };
        let hello = first.hello.clone().ok_or(WireError::Missing("hello"))?;
        hello.check(&self.local.cluster.0)?;
        let wanted = wanted(first)?;
        let lease = self.hold(&hello).await?;
        let (outbound, receiver) = mpsc::channel(OBSERVED_BUFFERED_MAX);
        let session = SessionTask {
            local: self.local.clone(),
            coordinator: hello.name,
            reached,
            lease,
            requests: self.requests.clone(),
            observed: self.observed.clone(),
            outbound,
            greeted: false,
        };
        self.sessions.spawn(session.run(inbound, wanted));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn probe(&self, request: tonic::Request<Streaming<wire::ProbeFrame>>) -> Result<Response<Echoes>, Status> {
        answer::answer(request.into_inner(), &self.local.cluster.0, &self.turn, &self.sessions).await
    }
}

impl WorkerService {
    async fn hold(&self, hello: &wire::Hello) -> Result<Lease, Status> {
        let stopping = || Status::unavailable(format!("worker {} is stopping", self.local.name));
        let (reply, answer) = oneshot::channel();
        // Shown to whoever asks for this worker next.
        let shown = |text: &str| text.chars().filter(|c| !c.is_control()).take(NAME_CHARS_SHOWN).collect::<String>();
        let request = Request::Hold { node: NodeId(shown(&hello.node)), name: shown(&hello.name), reply };
        self.requests.send(request).await.map_err(|_| stopping())?;
        let answer = answer.await.map_err(|_| stopping())?;
        answer.map_err(|held| Status::failed_precondition(held.to_string()))
    }
}

/// The new state that a message wants; None when it only keeps the stream alive.
fn wanted(message: wire::Desired) -> Result<Option<Wanted>, Status> {
    if message.version == 0 {
        return Ok(None);
    }
    if message.engines.len() > ENGINES_MAX {
        return Err(WireError::Invalid { field: "engines", value: format!("a list of {}", message.engines.len()) }.into());
    }
    let engines = message.engines.into_iter().map(EngineSpec::try_from).collect::<Result<Vec<_>, _>>()?;
    let ids: BTreeSet<_> = engines.iter().map(|spec| &spec.id).collect();
    if ids.len() != engines.len() {
        return Err(WireError::Invalid { field: "engines", value: "a list that names one engine twice".into() }.into());
    }
    let is_long = |peer: &wire::Peer| peer.addresses.len() > NEIGHBOUR_ADDRESSES_MAX;
    if message.neighbours.len() > NEIGHBOURS_MAX || message.neighbours.iter().any(is_long) {
        return Err(WireError::Invalid { field: "neighbours", value: format!("a list of {}", message.neighbours.len()) }.into());
    }
    let neighbours = message.neighbours.into_iter().map(Peer::from).collect();
    Ok(Some(Wanted { version: message.version, engines, neighbours }))
}

/// One coordinator's stream, from the hold to its end.
struct SessionTask {
    local: Arc<Local>,
    coordinator: String,
    /// The address of this node under which the coordinator reached it.
    reached: Option<IpAddr>,
    lease: Lease,
    requests: mpsc::Sender<Request>,
    observed: watch::Receiver<Observation>,
    outbound: mpsc::Sender<Result<wire::Observed, Status>>,
    greeted: bool,
}

/// What a session waits for.
enum Next {
    Message(Result<Option<wire::Desired>, Status>),
    Silence,
    Changed(bool),
    Revoked,
    Gone,
}

impl SessionTask {
    async fn run(mut self, mut inbound: Streaming<wire::Desired>, first: Option<Wanted>) {
        let Err(status) = self.converse(&mut inbound, first).await else { return };
        tracing::info!(coordinator = self.coordinator, reason = status.message(), "the coordinator's stream ends");
        // It may be gone, or not reading: then it learns the reason from its own side.
        let _ = self.outbound.try_send(Err(status));
    }

    /// Ok when the coordinator ended the stream, else why we do.
    async fn converse(&mut self, inbound: &mut Streaming<wire::Desired>, first: Option<Wanted>) -> Result<(), Status> {
        self.hear(first).await?;
        self.tell();
        let mut silent_at = Instant::now() + SILENCE_MAX;
        loop {
            let next = tokio::select! {
                message = timeout_at(silent_at, inbound.message()) => message.map_or(Next::Silence, Next::Message),
                changed = self.observed.changed() => Next::Changed(changed.is_ok()),
                () = self.lease.revoked.cancelled() => Next::Revoked,
                () = self.outbound.closed() => Next::Gone,
            };
            match next {
                Next::Message(Ok(Some(message))) => {
                    silent_at = Instant::now() + SILENCE_MAX;
                    self.hear(wanted(message)?).await?;
                }
                Next::Changed(true) => self.tell(),
                Next::Message(Ok(None)) | Next::Gone => return Ok(()),
                Next::Message(Err(status)) => return Err(status),
                Next::Silence => return Err(self.silence()),
                Next::Changed(false) | Next::Revoked => return Err(self.stopping()),
            }
        }
    }

    async fn hear(&self, wanted: Option<Wanted>) -> Result<(), Status> {
        let heard = Request::Heard { session: self.lease.session, wanted };
        self.requests.send(heard).await.map_err(|_| self.stopping())
    }

    /// Sends the whole state, once this node has been measured. A coordinator that is slow misses this one and gets the next.
    fn tell(&mut self) {
        let observation = self.observed.borrow_and_update().clone();
        let Some(facts) = observation.facts else { return };
        let observed = wire::Observed {
            hello: (!self.greeted).then(|| self.local.hello()),
            facts: Some(wire::NodeFacts::from(&facts.of_node(&self.local, self.reached))),
            version: observation.version,
            engines: observation.engines.into_iter().map(wire::EngineStatus::from).collect(),
            links: observation.links.into_iter().map(wire::LinkFacts::from).collect(),
        };
        self.greeted |= self.outbound.try_send(Ok(observed)).is_ok();
    }

    fn silence(&self) -> Status {
        let (worker, seconds) = (&self.local.name, SILENCE_MAX.as_secs());
        Status::deadline_exceeded(format!("worker {worker} heard nothing from coordinator {} for {seconds} s", self.coordinator))
    }

    fn stopping(&self) -> Status {
        Status::unavailable(format!("worker {} is stopping, or the coordinator has connected again", self.local.name))
    }
}

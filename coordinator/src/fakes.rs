//! Workers and engines for tests: real gRPC on loopback, with nothing behind it.

use mlx_cluster_common::ids::NodeId;
use mlx_cluster_proto::{
    net,
    wire::{
        self, Hello, delivery::Delivery, engine_server::Engine, engine_server::EngineServer, engine_status::State,
        session_command::Command, worker_server::Worker, worker_server::WorkerServer,
    },
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

type Outbound<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A prompt that starts with this gets one token and then nothing.
pub(crate) const ENDLESS: u32 = 7;

/// What a fake engine was told.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Told {
    pub(crate) links: Vec<wire::LinkRequest>,
    pub(crate) sessions: Vec<u64>,
    pub(crate) cancelled: Vec<u64>,
    /// Loaded and not dropped, with the names of their tensors.
    pub(crate) adapters: BTreeMap<u64, Vec<String>>,
}

/// Echoes prompts when it is the lead.
#[derive(Clone)]
struct FakeEngine {
    told: Arc<Mutex<Told>>,
    killed: CancellationToken,
}

#[tonic::async_trait]
impl Engine for FakeEngine {
    type StepsStream = Outbound<wire::Heartbeat>;
    type ResultsStream = Outbound<wire::Heartbeat>;
    type SessionStream = Outbound<wire::Delivery>;

    async fn link(&self, request: Request<wire::LinkRequest>) -> Result<Response<wire::LinkReply>, Status> {
        if self.killed.is_cancelled() {
            return Err(Status::unavailable("gone"));
        }
        self.told.lock().expect("not poisoned").links.push(request.into_inner());
        Ok(Response::new(wire::LinkReply {}))
    }

    async fn steps(&self, _: Request<Streaming<wire::StepFrame>>) -> Result<Response<Self::StepsStream>, Status> {
        Err(Status::unimplemented("a fake"))
    }

    async fn results(&self, _: Request<Streaming<wire::StepResult>>) -> Result<Response<Self::ResultsStream>, Status> {
        Err(Status::unimplemented("a fake"))
    }

    async fn session(&self, request: Request<Streaming<wire::SessionCommand>>) -> Result<Response<Self::SessionStream>, Status> {
        let (outbound, stream) = mpsc::channel(64);
        tokio::spawn(self.clone().converse(request.into_inner(), outbound));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn load_adapter(&self, request: Request<Streaming<wire::AdapterPart>>) -> Result<Response<wire::AdapterLoaded>, Status> {
        let (mut parts, mut adapter, mut names) = (request.into_inner(), 0, Vec::new());
        while let Some(wire::AdapterPart { part: Some(part) }) = parts.message().await? {
            match part {
                wire::adapter_part::Part::Head(head) => adapter = head.adapter,
                wire::adapter_part::Part::Tensor(tensor) => names.push(tensor.name),
            }
        }
        self.told.lock().expect("not poisoned").adapters.insert(adapter, names);
        Ok(Response::new(wire::AdapterLoaded { bytes: 1 }))
    }

    async fn drop_adapter(&self, request: Request<wire::DropAdapterRequest>) -> Result<Response<wire::AdapterDropped>, Status> {
        self.told.lock().expect("not poisoned").adapters.remove(&request.into_inner().adapter);
        Ok(Response::new(wire::AdapterDropped {}))
    }
}

impl FakeEngine {
    async fn converse(self, mut commands: Streaming<wire::SessionCommand>, outbound: mpsc::Sender<Result<wire::Delivery, Status>>) {
        loop {
            let command = tokio::select! {
                command = commands.next() => command,
                () = self.killed.cancelled() => return,
            };
            let Some(Ok(wire::SessionCommand { command: Some(command) })) = command else { return };
            match command {
                Command::Open(epoch) => {
                    self.told.lock().expect("not poisoned").sessions.push(epoch);
                    say(&outbound, Delivery::Load(wire::EngineLoad::default())).await;
                }
                Command::Cancel(sequence) => self.told.lock().expect("not poisoned").cancelled.push(sequence),
                Command::KeepAlive(_) => say(&outbound, Delivery::Load(wire::EngineLoad { running: 1, ..Default::default() })).await,
                Command::Submit(wire::Submission { sequence, prompt, .. }) => {
                    let is_endless = prompt.first() == Some(&ENDLESS);
                    let n = if is_endless { 1 } else { prompt.len() };
                    for id in prompt.into_iter().take(n) {
                        let token = Some(wire::Token { id, ..Default::default() });
                        say(&outbound, Delivery::Token(wire::GeneratedToken { sequence, token })).await;
                    }
                    if !is_endless {
                        say(&outbound, Delivery::Finished(wire::Finished { sequence, reason: 0 })).await;
                    }
                }
            }
        }
    }
}

async fn say(outbound: &mpsc::Sender<Result<wire::Delivery, Status>>, delivery: Delivery) {
    // The coordinator may have gone.
    drop(outbound.send(Ok(wire::Delivery { delivery: Some(delivery) })).await);
}

async fn listener() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = net::listen(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a port");
    let address = listener.local_addr().expect("bound");
    (listener, address)
}

/// An engine process, as a task.
struct Process {
    engine: FakeEngine,
    port: u32,
    incarnation: u64,
}

impl Process {
    async fn start(told: Arc<Mutex<Told>>, incarnation: u64) -> Self {
        let (listener, address) = listener().await;
        let engine = FakeEngine { told, killed: CancellationToken::new() };
        let service = EngineServer::new(engine.clone());
        let stop = engine.killed.clone().cancelled_owned();
        tokio::spawn(net::server().add_service(service).serve_with_incoming_shutdown(net::incoming(listener), stop));
        Self { engine, port: u32::from(address.port()), incarnation }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.engine.killed.cancel();
    }
}

#[derive(Debug, Clone, Default)]
struct Snapshot {
    version: u64,
    engines: Vec<wire::EngineStatus>,
    links: Vec<wire::LinkFacts>,
}

/// The state of a fake worker, shared with its service.
pub(crate) struct FakeWorker {
    hello: Hello,
    pub(crate) address: SocketAddr,
    /// What the newest engine was told.
    pub(crate) told: Arc<Mutex<Told>>,
    processes: tokio::sync::Mutex<BTreeMap<String, Process>>,
    observed: watch::Sender<Snapshot>,
}

#[derive(Clone)]
struct Service(Arc<FakeWorker>);

impl FakeWorker {
    pub(crate) async fn start(cluster: &str, name: &str) -> Arc<Self> {
        let (listener, address) = listener().await;
        let hello = Hello::new(cluster, &NodeId(format!("id-{name}")), name);
        let worker = Arc::new(Self {
            hello,
            address,
            told: Arc::default(),
            processes: tokio::sync::Mutex::default(),
            observed: watch::Sender::new(Snapshot::default()),
        });
        let service = WorkerServer::new(Service(Arc::clone(&worker)));
        tokio::spawn(net::server().add_service(service).serve_with_incoming(net::incoming(listener)));
        worker
    }

    /// Says to a coordinator where this worker is.
    pub(crate) async fn join(&self, coordinator: SocketAddr) -> Result<Hello, Status> {
        let channel = net::connect("the coordinator", &[coordinator.to_string()]).await.expect("reachable");
        let request = wire::JoinRequest { hello: Some(self.hello.clone()), addresses: vec![self.address.to_string()] };
        let reply = wire::cluster_client::ClusterClient::new(channel).join(request).await?;
        Ok(reply.into_inner().hello.expect("a hello"))
    }

    /// Kills the engine, says so, and starts it again a moment later.
    pub(crate) async fn kill_engine(&self) {
        let mut processes = self.processes.lock().await;
        let (id, process) = processes.pop_first().expect("an engine");
        let incarnation = process.incarnation + 1;
        drop(process);
        let failed = wire::Failed { cause: "engine killed by signal 9".into(), output: Vec::new(), retry_in_ms: Some(100), lost: None };
        self.tell(&id, State::Failed(failed));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let process = Process::start(Arc::clone(&self.told), incarnation).await;
        self.tell(&id, ready(&process));
        processes.insert(id, process);
    }

    fn tell(&self, id: &str, state: State) {
        let status = wire::EngineStatus { id: id.to_owned(), state: Some(state) };
        self.observed.send_modify(|snapshot| {
            snapshot.engines.retain(|engine| engine.id != id);
            snapshot.engines.push(status);
        });
    }

    async fn want(&self, desired: wire::Desired) {
        let wire::Desired { version, engines, neighbours, .. } = desired;
        let mut processes = self.processes.lock().await;
        processes.retain(|id, _| engines.iter().any(|spec| spec.id == *id));
        for spec in engines {
            if let std::collections::btree_map::Entry::Vacant(free) = processes.entry(spec.id) {
                free.insert(Process::start(Arc::clone(&self.told), 1).await);
            }
        }
        let status = |(id, process): (&String, &Process)| wire::EngineStatus { id: id.clone(), state: Some(ready(process)) };
        let links = neighbours.into_iter().map(measured).collect();
        self.observed.send_replace(Snapshot { version, engines: processes.iter().map(status).collect(), links });
    }

    pub(crate) async fn engines(&self) -> usize {
        self.processes.lock().await.len()
    }
}

/// As if this neighbour had been measured.
fn measured(neighbour: wire::Peer) -> wire::LinkFacts {
    let medium = wire::Medium::Loopback.into();
    let (address, interface) = ("127.0.0.1".into(), "lo".into());
    wire::LinkFacts { to: neighbour.node, interface, medium, address, round_trip_seconds: 1e-4, bytes_per_second: 1e9 }
}

fn ready(process: &Process) -> State {
    State::Ready(wire::Ready { port: process.port, group_port: 0, incarnation: process.incarnation, resident_bytes: 1 })
}

#[tonic::async_trait]
impl Worker for Service {
    type SuperviseStream = Outbound<wire::Observed>;
    type ProbeStream = Outbound<wire::ProbeEcho>;

    async fn probe(&self, _: Request<Streaming<wire::ProbeFrame>>) -> Result<Response<Self::ProbeStream>, Status> {
        Err(Status::unimplemented("a fake"))
    }

    async fn supervise(&self, request: Request<Streaming<wire::Desired>>) -> Result<Response<Outbound<wire::Observed>>, Status> {
        let mut inbound = request.into_inner();
        let (outbound, stream) = mpsc::channel(16);
        let worker = Arc::clone(&self.0);
        let mut changes = worker.observed.subscribe();
        tokio::spawn(async move {
            let mut hello = Some(worker.hello.clone());
            loop {
                let Snapshot { version, engines, links } = changes.borrow_and_update().clone();
                let facts = wire::NodeFacts {
                    usable_memory_bytes: 4_000_000_000,
                    total_memory_bytes: 4_000_000_000,
                    addresses: vec![worker.address.to_string()],
                    ..Default::default()
                };
                let observed = wire::Observed { hello: hello.take(), facts: Some(facts), version, engines, links };
                if outbound.send(Ok(observed)).await.is_err() {
                    return;
                }
                let desired = tokio::select! {
                    desired = inbound.next() => desired,
                    Ok(()) = changes.changed() => continue,
                };
                let Some(Ok(desired)) = desired else { return };
                if desired.version > 0 {
                    worker.want(desired).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

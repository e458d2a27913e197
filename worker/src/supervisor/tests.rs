//! A whole worker on loopback, with engines that are shell scripts, held by a coordinator that is this test.

use super::*;
use mlx_cluster_common::cache::{CacheOptions, CacheReservation};
use mlx_cluster_common::engine::{EngineSpec, EngineState, EngineStatus, ModelSource};
use mlx_cluster_proto::wire;
use std::path::Path;
use tokio::{
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

const DEADLINE: Duration = Duration::from_secs(30);

struct Worker {
    home: tempfile::TempDir,
    address: String,
    shutdown: CancellationToken,
    running: JoinHandle<Result<(), WorkerError>>,
}

impl Worker {
    async fn start() -> Self {
        Self::start_with(None).await
    }

    async fn start_with(join: Option<String>) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        let engine = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/supervisor/testdata/fake_engine.sh");
        let options = WorkerOptions {
            cluster: "test".into(),
            name: None,
            listen: None,
            join,
            memory_limit: Some(Bytes(1 << 30)),
            home: home.path().to_path_buf(),
            engine_command: Some(engine),
            quiet: true,
        };
        let listener = net::listen((Ipv4Addr::LOCALHOST, 0).into()).await.expect("a port");
        let listen = listener.local_addr().expect("an address");
        let id = uuid::Uuid::new_v4().simple().to_string().as_str().into();
        let local = Local { id, name: "mini-2".into(), cluster: "test".into(), listen };
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(serve(options, local, home.path().join("models"), listener, shutdown.clone()));
        Self { home, address: listen.to_string(), shutdown, running }
    }

    /// A model's folder on whose behalf the engine does what the shell script says.
    fn model(&self, behaviour: &str) -> PathBuf {
        let folder = self.home.path().join("model");
        std::fs::create_dir_all(&folder).expect("made");
        std::fs::write(folder.join("config.json"), "{}").expect("written");
        std::fs::write(folder.join("behaviour.sh"), behaviour).expect("written");
        folder
    }

    async fn supervise(&self, hello: wire::Hello, engines: Vec<EngineSpec>) -> Result<Coordinator, Status> {
        let channel = net::connect("the worker", std::slice::from_ref(&self.address)).await.expect("it listens");
        let mut client = wire::worker_client::WorkerClient::new(channel);
        let (desired, outgoing) = mpsc::channel(4);
        let engines = engines.into_iter().map(Into::into).collect();
        let first = wire::Desired { hello: Some(hello), version: 1, engines, neighbours: Vec::new() };
        desired.send(first).await.expect("room");
        let observed = client.supervise(ReceiverStream::new(outgoing)).await?.into_inner();
        Ok(Coordinator { desired, observed })
    }

    async fn stop(self) {
        self.shutdown.cancel();
        let ended = timeout(DEADLINE, self.running).await.expect("in time");
        ended.expect("no panic").expect("no error");
    }
}

struct Coordinator {
    desired: mpsc::Sender<wire::Desired>,
    observed: Streaming<wire::Observed>,
}

impl Coordinator {
    async fn next(&mut self) -> Result<Option<wire::Observed>, Status> {
        timeout(DEADLINE, self.observed.message()).await.expect("in time")
    }

    /// The first state of the only engine that is as wanted.
    async fn engine(&mut self, wanted: impl Fn(&EngineState) -> bool) -> EngineState {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let message = timeout_at(deadline, self.observed.message()).await.expect("in time");
            let mut observed = message.expect("a message").expect("not the end");
            let Some(status) = observed.engines.pop() else { continue };
            let state = EngineStatus::try_from(status).expect("a status").state;
            if wanted(&state) {
                return state;
            }
        }
    }
}

fn hello(node: &str) -> wire::Hello {
    wire::Hello::new("test", &node.into(), &format!("{node}-name"))
}

fn spec(folder: &Path) -> EngineSpec {
    EngineSpec {
        id: "engine-1".into(),
        model: ModelSource::Folder(folder.display().to_string()),
        fingerprint: 1,
        stage: 0,
        n_stages: 1,
        layers: 0..2,
        place: mlx_cluster_common::tensor::TensorPlace::alone(),
        collective: mlx_cluster_common::plan::Collective::Auto,
        context_tokens: 128,
        cache_tokens: 1024,
        sequences: 16,
        memory: Bytes(1 << 20),
        caches: CacheOptions::default(),
        reservation: CacheReservation::default(),
        weight_peers: Vec::new(),
        training: None,
    }
}

fn is_ready(state: &EngineState) -> bool {
    matches!(state, EngineState::Ready { .. })
}

fn is_failed(state: &EngineState) -> bool {
    matches!(state, EngineState::Failed { .. })
}

async fn appears(path: &Path) {
    let deadline = Instant::now() + DEADLINE;
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} in time", path.display());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_engine_becomes_ready_and_ends_with_its_worker() {
    let worker = Worker::start().await;
    let folder = worker.model(
        r#"echo '{"loading":{"done_bytes":1,"total_bytes":2}}'
        echo '{"ready":{"port":4242}}'
        until_stdin_closes
        touch "$folder/ended""#,
    );
    let mut coordinator = worker.supervise(hello("a"), vec![spec(&folder)]).await.expect("held");
    let first = coordinator.next().await.expect("a message").expect("not the end");
    let from = first.hello.expect("in the first message");
    let facts = first.facts.expect("measured").into_facts(&from);
    assert_eq!((facts.name.as_str(), facts.addresses.as_slice()), ("mini-2", std::slice::from_ref(&worker.address)));
    assert_eq!((facts.usable_memory, facts.matmul_rate, facts.memory_bandwidth), (Bytes(1 << 30), 1e9, 2e9));
    let ready = coordinator.engine(is_ready).await;
    let EngineState::Ready { port, incarnation, resident, .. } = ready else { panic!("{ready:?}") };
    assert!(port == 4242 && incarnation > 1_000_000 && resident > Bytes(0), "{ready:?}");
    worker.shutdown.cancel();
    let end = loop {
        match coordinator.next().await {
            Ok(Some(_)) => {}
            end => break end,
        }
    };
    assert_eq!(end.expect_err("a reason").code(), Code::Unavailable);
    appears(&folder.join("ended")).await;
    worker.stop().await;
}

#[tokio::test]
async fn an_engine_that_dies_is_reported_with_its_last_words_and_comes_back() {
    let worker = Worker::start().await;
    let folder = worker.model(
        r#"echo '{"ready":{"port":4242}}'
        if [ ! -e "$folder/died" ]; then
            touch "$folder/died"
            echo "MLX: no more memory" >&2
            kill -9 $$
        fi
        until_stdin_closes"#,
    );
    let mut coordinator = worker.supervise(hello("a"), vec![spec(&folder)]).await.expect("held");
    let failed = coordinator.engine(is_failed).await;
    let EngineState::Failed { cause, output, retry_in_ms, lost: None } = failed else { panic!("{failed:?}") };
    assert_eq!(
        (cause.as_str(), output.as_slice()),
        ("engine exited with signal 9 (SIGKILL)", ["MLX: no more memory".to_owned()].as_slice())
    );
    assert!(retry_in_ms.is_some_and(|ms| ms <= 200), "{retry_in_ms:?}");
    coordinator.engine(is_ready).await;
    worker.stop().await;
}

#[tokio::test]
async fn what_is_hopeless_is_reported_and_not_started_again() {
    let worker = Worker::start().await;
    let folder = worker.model(
        r#"echo started >> "$folder/starts"
        echo "looking for the head" >&2
        echo '{"failed":{"cause":"tensor lm_head.weight is missing","hopeless":true}}'
        exit 1"#,
    );
    let mut coordinator = worker.supervise(hello("a"), vec![spec(&folder)]).await.expect("held");
    let with_output = |state: &EngineState| matches!(state, EngineState::Failed { output, .. } if !output.is_empty());
    let failed = coordinator.engine(with_output).await;
    let EngineState::Failed { cause, output, retry_in_ms, lost: None } = failed else { panic!("{failed:?}") };
    assert_eq!((cause.as_str(), output[0].as_str(), retry_in_ms), ("tensor lm_head.weight is missing", "looking for the head", None));
    // Two keep-alives later it is still so.
    for _ in 0..2 {
        assert!(is_failed(&coordinator.engine(|_| true).await));
    }
    assert_eq!(std::fs::read_to_string(folder.join("starts")).expect("started"), "started\n");
    let nowhere = EngineSpec { id: "engine-2".into(), model: ModelSource::Folder("/no/such/model".into()), ..spec(&folder) };
    let wish = wire::Desired { version: 2, engines: vec![nowhere.into()], ..Default::default() };
    coordinator.desired.send(wish).await.expect("sent");
    let missing =
        |state: &EngineState| matches!(state, EngineState::Failed { cause, .. } if cause.contains("has no folder /no/such/model"));
    coordinator.engine(missing).await;
    worker.stop().await;
}

#[tokio::test]
async fn engines_end_when_their_coordinator_is_gone_and_the_next_one_gets_the_worker() {
    let worker = Worker::start().await;
    let folder = worker.model(
        r#"echo '{"ready":{"port":4242}}'
        until_stdin_closes
        touch "$folder/ended""#,
    );
    let mut coordinator = worker.supervise(hello("a"), vec![spec(&folder)]).await.expect("held");
    coordinator.engine(is_ready).await;
    drop(coordinator);
    let deadline = Instant::now() + DEADLINE;
    let mut next = loop {
        match worker.supervise(hello("b"), vec![]).await {
            Ok(next) => break next,
            Err(status) => assert!(status.code() == Code::FailedPrecondition && Instant::now() < deadline, "{status}"),
        }
    };
    appears(&folder.join("ended")).await;
    loop {
        let observed = next.next().await.expect("a message").expect("not the end");
        // Before that, what the first coordinator left is shown, as the answer to no wish.
        if observed.version == 1 {
            assert!(observed.engines.is_empty(), "{observed:?}");
            break;
        }
        assert_eq!(observed.version, 0);
    }
    worker.stop().await;
}

#[tokio::test]
async fn without_a_new_coordinator_engines_end_after_the_grace_time() {
    let worker = Worker::start().await;
    let folder = worker.model(
        r#"echo '{"ready":{"port":4242}}'
        until_stdin_closes
        touch "$folder/ended""#,
    );
    let mut coordinator = worker.supervise(hello("a"), vec![spec(&folder)]).await.expect("held");
    coordinator.engine(is_ready).await;
    let dropped = Instant::now();
    drop(coordinator);
    appears(&folder.join("ended")).await;
    assert!(dropped.elapsed() >= plan::ORPHAN_GRACE, "{:?}", dropped.elapsed());
    worker.stop().await;
}

#[tokio::test]
async fn strangers_and_second_coordinators_are_refused_with_the_reason() {
    let worker = Worker::start().await;
    let refusal = async |hello| match worker.supervise(hello, vec![]).await {
        Ok(_) => panic!("not refused"),
        Err(status) => (status.code(), status.message().to_owned()),
    };
    let (code, message) = refusal(wire::Hello { cluster: "office".into(), ..hello("a") }).await;
    assert!(code == Code::FailedPrecondition && message.contains("office") && message.contains("`test`"), "{message}");
    let (code, message) = refusal(wire::Hello { protocol: 99, version: "9.9".into(), ..hello("a") }).await;
    assert!(code == Code::FailedPrecondition && message.contains("9.9") && message.contains(VERSION), "{message}");
    let _held = worker.supervise(hello("a"), vec![]).await.expect("held");
    let (code, message) = refusal(hello("b")).await;
    assert!(
        code == Code::FailedPrecondition && message.contains("worker mini-2 is already held by coordinator a-name (node a"),
        "{message}"
    );
    worker.stop().await;
}

/// A coordinator that only remembers who joined.
struct Joined(mpsc::Sender<wire::JoinRequest>);

#[tonic::async_trait]
impl wire::cluster_server::Cluster for Joined {
    async fn join(&self, request: tonic::Request<wire::JoinRequest>) -> Result<tonic::Response<wire::JoinReply>, Status> {
        self.0.send(request.into_inner()).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(tonic::Response::new(wire::JoinReply { hello: Some(hello("a")) }))
    }
}

#[tokio::test]
async fn a_worker_joins_and_joins_again_when_it_was_let_go() {
    let listener = net::listen((Ipv4Addr::LOCALHOST, 0).into()).await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (joined, mut joins) = mpsc::channel(16);
    let service = wire::cluster_server::ClusterServer::new(Joined(joined));
    let server = tokio::spawn(net::server().add_service(service).serve_with_incoming(net::incoming(listener)));
    let worker = Worker::start_with(Some(address)).await;
    for _ in 0..2 {
        let join = timeout(DEADLINE, joins.recv()).await.expect("in time").expect("a worker");
        assert_eq!((join.addresses, join.hello.expect("who").name), (vec![worker.address.clone()], "mini-2".to_owned()));
        let coordinator = worker.supervise(hello("a"), vec![]).await.expect("held");
        drop(coordinator);
    }
    worker.stop().await;
    server.abort();
}

#[tokio::test]
async fn workers_measure_the_ways_to_each_other_in_turn() {
    let workers = [Worker::start().await, Worker::start().await, Worker::start().await];
    let mut coordinators = Vec::new();
    let mut peers = Vec::new();
    for (number, worker) in workers.iter().enumerate() {
        let mut coordinator = worker.supervise(hello("a"), Vec::new()).await.expect("free");
        let observed = coordinator.next().await.expect("a message").expect("not the end");
        let node = observed.hello.expect("in the first").node;
        peers.push(wire::Peer { node, name: format!("w{number}"), addresses: vec![worker.address.clone(), "127.0.0.1:1".into()] });
        coordinators.push(coordinator);
    }
    for coordinator in &coordinators {
        let neighbours = wire::Desired { version: 2, neighbours: peers.clone(), ..Default::default() };
        coordinator.desired.send(neighbours).await.expect("room");
    }
    for (number, coordinator) in coordinators.iter_mut().enumerate() {
        let links = loop {
            let observed = coordinator.next().await.expect("a message").expect("not the end");
            if observed.links.len() == 2 {
                break observed.links;
            }
        };
        for link in links {
            assert!(link.to != peers[number].node && peers.iter().any(|peer| peer.node == link.to));
            let link = link.into_facts("x".into()).expect("sound");
            assert!(link.address == "127.0.0.1" && link.medium == mlx_cluster_common::links::Medium::Loopback);
            assert!(link.round_trip_seconds < 0.1 && link.bytes_per_second > 1e6, "{link:?}");
        }
    }
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test]
async fn a_worker_is_measured_by_its_own_cluster_only() {
    let worker = Worker::start().await;
    let channel = net::connect("the worker", std::slice::from_ref(&worker.address)).await.expect("it listens");
    let stranger = wire::ProbeFrame { hello: Some(wire::Hello::new("other", &"s".into(), "s")), ..Default::default() };
    for (frame, code) in [(stranger, Code::FailedPrecondition), (wire::ProbeFrame::default(), Code::InvalidArgument)] {
        let frames = tokio_stream::iter([frame]);
        let refused = wire::worker_client::WorkerClient::new(channel.clone()).probe(frames).await;
        assert_eq!(refused.expect_err("refused").code(), code);
    }
    drop(channel);
    worker.stop().await;
}

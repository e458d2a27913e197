//! The driver with everything around it on loopback: workers join, engines are linked, tokens come, things break.

use crate::{
    core::{
        settings::InstanceSettings,
        world::{Start, start, training, work},
    },
    discovery::{
        mdns::Found,
        rivals::{self, Rank, Rival},
    },
    driver::{Driver, Parts},
    error::CoordinatorError,
    fakes::{ENDLESS, FakeWorker},
    grpc,
    loading::{LoadError, LoadRequest},
    report,
    serving::{Admitted, ClusterStatus, InstanceState, RequestEvent, RequestFailure, RunnerNote, ServingCommand},
};
use mlx_cluster_common::{
    ids::{InstanceId, NodeId},
    plan::Strategy,
    request::{EngineLoad, FinishReason},
    sampling::SamplingParams,
    training::TrainStrategy,
};
use mlx_cluster_proto::{net, wire::Hello};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

/// A running coordinator without HTTP and without multicast.
struct Coordinator {
    address: SocketAddr,
    commands: mpsc::Sender<ServingCommand>,
    status: watch::Receiver<Arc<ClusterStatus>>,
    found: mpsc::Sender<Found>,
    stop: CancellationToken,
    driver: JoinHandle<Result<(), CoordinatorError>>,
}

impl Coordinator {
    async fn start(workers: usize) -> Self {
        Self::start_with(start(workers, Strategy::Pipeline)).await
    }

    async fn start_with(start: Start) -> Self {
        let listener = net::listen(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let Start { settings, model, own } = start;
        let rank = Rank { started_ms: 100, id: NodeId("coordinator-id".into()) };
        let hello = Hello::new(&settings.cluster, &rank.id, "studio");
        let (commands, commands_out) = mpsc::channel(16);
        let (joined, joined_out) = mpsc::channel(16);
        let (found, found_out) = mpsc::channel(16);
        let empty = ClusterStatus {
            adapters: Vec::new(),
            links: Vec::new(),
            cluster: settings.cluster.clone(),
            instance: InstanceState::Idle,
            plan: None,
            jobs: Vec::new(),
            workers: Vec::new(),
            load: EngineLoad::default(),
            join_addresses: Vec::new(),
        };
        let (status, status_out) = watch::channel(Arc::new(empty));
        let stop = CancellationToken::new();
        tokio::spawn(grpc::serve(listener, hello.clone(), joined, stop.clone()));
        let driver = Driver::new(Parts {
            settings,
            defaults: own,
            start: model,
            adapters: Vec::new(),
            model: None,
            home: std::path::PathBuf::new(),
            hello,
            rank,
            join_addresses: vec![address.to_string()],
            url: "http://test".into(),
            commands: commands_out,
            status,
            served: watch::Sender::new(None),
            joined: joined_out,
            found: found_out,
            reporter: report::quiet(),
        });
        let driver = tokio::spawn(driver.run(stop.clone()));
        Self { address, commands, status: status_out, found, stop, driver }
    }

    async fn ready(workers: usize) -> (Self, Vec<Arc<FakeWorker>>) {
        Self::with_workers(workers, start(workers, Strategy::Pipeline)).await
    }

    async fn idle(workers: usize) -> (Self, Vec<Arc<FakeWorker>>) {
        Self::with_workers(workers, Start { model: None, ..start(workers, Strategy::Auto) }).await
    }

    async fn with_workers(workers: usize, start: Start) -> (Self, Vec<Arc<FakeWorker>>) {
        let wanted = if start.model.is_some() { InstanceState::Ready } else { InstanceState::Idle };
        let mut coordinator = Self::start_with(start).await;
        let mut fakes = Vec::new();
        for i in 0..workers {
            let worker = FakeWorker::start("test", &format!("w{i}")).await;
            assert_eq!(worker.join(coordinator.address).await.expect("taken").name, "studio");
            fakes.push(worker);
        }
        coordinator.until(|state| *state == wanted).await;
        (coordinator, fakes)
    }

    async fn tell(&self, command: ServingCommand) {
        self.commands.send(command).await.expect("the driver lives");
    }

    async fn start_job(&self, number: u64) -> mpsc::Receiver<RunnerNote> {
        let (notes, receiver) = mpsc::channel(16);
        let (instance, facts) = (InstanceId(number), training(work(TrainStrategy::Pipeline)));
        self.tell(ServingCommand::StartJob { instance, facts, settings: InstanceSettings::default(), notes }).await;
        receiver
    }

    async fn load(&self, model: &str) -> Result<String, LoadError> {
        let (answer, answered) = oneshot::channel();
        let request = LoadRequest { model: model.into(), strategy: None, context_tokens: None };
        self.tell(ServingCommand::Load { request, answer }).await;
        timeout(PATIENCE, answered).await.expect("in time").expect("answered")
    }

    async fn unload(&self) -> Result<String, LoadError> {
        let (answer, answered) = oneshot::channel();
        self.tell(ServingCommand::Unload { answer }).await;
        timeout(PATIENCE, answered).await.expect("in time").expect("answered")
    }

    async fn until(&mut self, wanted: impl Fn(&InstanceState) -> bool) {
        let reached = timeout(PATIENCE, self.status.wait_for(|status| wanted(&status.instance))).await;
        reached.expect("in time").expect("the driver lives");
    }

    async fn submit(&self, prompt: &[u32]) -> mpsc::Receiver<RequestEvent> {
        let (events, receiver) = mpsc::channel(16);
        let request = Admitted { prompt: prompt.to_vec(), params: SamplingParams::default(), adapter: None };
        self.commands.send(ServingCommand::Submit { request, events }).await.expect("the driver lives");
        receiver
    }

    async fn end(self) -> Result<(), CoordinatorError> {
        timeout(PATIENCE, self.driver).await.expect("in time").expect("no panic")
    }
}

async fn note(notes: &mut mpsc::Receiver<RunnerNote>) -> RunnerNote {
    timeout(PATIENCE, notes.recv()).await.expect("in time").expect("not the end")
}

async fn next(events: &mut mpsc::Receiver<RequestEvent>) -> Option<RequestEvent> {
    timeout(PATIENCE, events.recv()).await.expect("in time")
}

async fn token(events: &mut mpsc::Receiver<RequestEvent>) -> u32 {
    match next(events).await {
        Some(RequestEvent::Token(token)) => token.id,
        other => panic!("no token but {other:?}"),
    }
}

async fn eventually(condition: impl AsyncFn() -> bool) {
    let wait = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("in time");
}

#[tokio::test]
async fn workers_join_and_tokens_come_until_it_is_drained() {
    let (coordinator, workers) = Coordinator::ready(2).await;
    let links = |worker: &FakeWorker| worker.told.lock().expect("not poisoned").links.clone();
    assert_eq!(links(&workers[0])[0].next.as_ref().map(|peer| peer.name.as_str()), Some("w1"));
    assert_eq!(links(&workers[1])[0].next.as_ref().map(|peer| peer.name.as_str()), Some("w0"), "the last stage answers to the lead");

    let mut events = coordinator.submit(&[1, 2]).await;
    assert_eq!((token(&mut events).await, token(&mut events).await), (1, 2));
    assert_eq!(next(&mut events).await, Some(RequestEvent::Finished(FinishReason::Stop)));
    assert_eq!(next(&mut events).await, None, "nothing comes after the end");

    let mut events = coordinator.submit(&[ENDLESS]).await;
    token(&mut events).await;
    drop(events);
    eventually(async || workers[0].told.lock().expect("not poisoned").cancelled == [2]).await;

    let (done, drained) = oneshot::channel();
    coordinator.commands.send(ServingCommand::Drain { done }).await.expect("the driver lives");
    timeout(PATIENCE, drained).await.expect("in time").expect("told");
    for worker in &workers {
        assert_eq!(worker.engines().await, 0, "no engine is left");
    }
    assert!(coordinator.end().await.is_ok());
}

#[tokio::test]
async fn an_engine_that_dies_is_named_and_replaced() {
    let (mut coordinator, workers) = Coordinator::ready(2).await;
    let mut events = coordinator.submit(&[ENDLESS]).await;
    token(&mut events).await;
    let (killed, ()) = tokio::join!(workers[1].kill_engine(), coordinator.until(|state| matches!(state, InstanceState::Recovering { .. })));
    let () = killed;
    let failure = RequestFailure::Broken { worker: "w1".into(), message: "engine killed by signal 9".into() };
    assert_eq!(next(&mut events).await, Some(RequestEvent::Failed(failure)));
    coordinator.until(|state| *state == InstanceState::Ready).await;
    let mut events = coordinator.submit(&[5]).await;
    assert_eq!(token(&mut events).await, 5);
    assert_eq!(workers[0].told.lock().expect("not poisoned").sessions, [1, 2], "a new epoch, a new session");

    // The lead itself.
    let mut events = coordinator.submit(&[ENDLESS]).await;
    token(&mut events).await;
    workers[0].kill_engine().await;
    let failed = next(&mut events).await;
    assert!(matches!(&failed, Some(RequestEvent::Failed(RequestFailure::Broken { worker, .. })) if worker == "w0"), "{failed:?}");
    coordinator.until(|state| *state == InstanceState::Ready).await;
    coordinator.stop.cancel();
    assert!(coordinator.end().await.is_ok());
}

#[tokio::test]
async fn a_client_that_does_not_read_is_given_up() {
    let (coordinator, _workers) = Coordinator::ready(1).await;
    let mut events = coordinator.submit(&(100..140).collect::<Vec<_>>()).await;
    eventually(async || events.is_closed() || events.len() == 16).await;
    let mut read = 0;
    while let Some(RequestEvent::Token(_)) = next(&mut events).await {
        read += 1;
    }
    assert_eq!(read, 16, "what fitted, then the end");
}

#[tokio::test]
async fn of_two_coordinators_the_later_one_gives_way_if_the_other_lives() {
    let first = Coordinator::start(1).await;
    let second = Coordinator::start(1).await;
    let rival = |started_ms| Rival {
        rank: Rank { started_ms, id: NodeId("coordinator-id".into()) },
        name: "studio".into(),
        addresses: vec![first.address.to_string()],
    };
    let asking = Hello::new("test", &"other".into(), "asking");
    assert!(rivals::lives(&rival(1), &asking).await);
    let renamed = Rival { rank: Rank { started_ms: 1, id: "gone".into() }, ..rival(1) };
    assert!(!rivals::lives(&renamed, &asking).await, "another coordinator has taken the port");
    second.found.send(Found::Coordinator(rival(200))).await.expect("the driver lives");
    second.found.send(Found::Coordinator(rival(1))).await.expect("the driver lives");
    let error = second.end().await.expect_err("gives way").to_string();
    assert!(error.contains("`test`") && error.contains("studio at 127.0.0.1"), "{error}");
}

#[tokio::test]
async fn a_runner_is_told_what_becomes_of_its_engines() {
    let (coordinator, workers) = Coordinator::idle(2).await;
    let mut notes = coordinator.start_job(1).await;
    let planned = note(&mut notes).await;
    assert!(matches!(&planned, RunnerNote::Planned(plan) if plan.stages.len() == 2), "{planned:?}");
    let RunnerNote::Ready { epoch: first, engines } = note(&mut notes).await else { panic!("not ready") };
    let places: Vec<_> = engines.iter().map(|engine| (engine.number, engine.stage, engine.rank, engine.name.as_str())).collect();
    assert_eq!(places, [(0, 0, 0, "w0"), (1, 1, 0, "w1")]);
    for engine in &engines {
        net::connect("an engine", &engine.addresses).await.expect("it is there");
    }
    let jobs = coordinator.status.borrow().jobs.clone();
    assert_eq!(
        jobs.iter().map(|job| (job.instance, job.model.as_str(), &job.state)).collect::<Vec<_>>(),
        [(InstanceId(1), "test", &InstanceState::Ready)]
    );

    workers[1].kill_engine().await;
    let broken = note(&mut notes).await;
    assert_eq!(broken, RunnerNote::Broken { epoch: first, cause: Some("worker w1: engine killed by signal 9".into()) });
    let RunnerNote::Ready { epoch: second, .. } = note(&mut notes).await else { panic!("not ready again") };
    assert!(second > first);

    let (instance, node, message) = (InstanceId(1), Some("w0".to_owned()), "no answer".to_owned());
    coordinator.tell(ServingCommand::Broken { instance, epoch: second, node, message }).await;
    assert_eq!(note(&mut notes).await, RunnerNote::Broken { epoch: second, cause: Some("worker w0: no answer".into()) });
    let RunnerNote::Ready { epoch: third, .. } = note(&mut notes).await else { panic!("not ready again") };
    assert!(third > second);

    coordinator.tell(ServingCommand::StopJob { instance }).await;
    assert_eq!(note(&mut notes).await, RunnerNote::Ended { failure: None });
    assert_eq!((workers[0].engines().await, workers[1].engines().await), (0, 0));
    assert_eq!(timeout(PATIENCE, notes.recv()).await.expect("in time"), None, "nothing comes after the end");
}

#[tokio::test]
async fn a_job_without_its_runner_is_stopped() {
    let (coordinator, workers) = Coordinator::idle(1).await;
    let mut notes = coordinator.start_job(1).await;
    while !matches!(note(&mut notes).await, RunnerNote::Ready { .. }) {}
    let mut taken = coordinator.start_job(1).await;
    assert_eq!(timeout(PATIENCE, taken.recv()).await.expect("in time"), None, "the number is in use");
    drop(notes);
    eventually(async || workers[0].engines().await == 0 && coordinator.status.borrow().jobs.is_empty()).await;
    assert!(matches!(coordinator.status.borrow().instance, InstanceState::Idle));
    // Its number is free again.
    let mut notes = coordinator.start_job(1).await;
    while !matches!(note(&mut notes).await, RunnerNote::Ready { .. }) {}
}

#[tokio::test]
async fn loading_is_refused_with_a_reason() {
    let (coordinator, _workers) = Coordinator::ready(1).await;
    assert!(matches!(coordinator.load("/none").await, Err(LoadError::ServedAlready { .. })));
    assert!(coordinator.unload().await.is_ok());
    assert!(matches!(coordinator.status.borrow().instance, InstanceState::Idle));
    assert!(matches!(coordinator.unload().await, Err(LoadError::NothingServed)));
    let error = coordinator.load("/no/such/folder").await.expect_err("not there").to_string();
    assert!(error.contains("/no/such/folder"), "{error}");
}

//! Starts and ends everything that a coordinator consists of, and owns its tasks.

use crate::{
    adapters::{AdapterArgument, OpenAdapter, Registry, ServeAdapterError},
    api,
    core::settings::{InstanceSettings, Settings},
    discovery::{
        interfaces::{own_addresses, reachable},
        mdns::{Announcement, Mdns, watch as watch_mdns},
        rivals::Rank,
    },
    driver::{Driver, Parts},
    error::CoordinatorError,
    grpc, loading, model,
    report::{self, Reporter},
    serving::{ClusterStatus, InstanceState, Serving},
    training::{
        jobs::{JobParts, Jobs, JobsTask},
        runner::ClusterRunner,
    },
};
use mlx_cluster_common::{
    cache::CacheOptions,
    ids::{ClusterName, NodeId},
    plan::{Collective, Optimize, Strategy, ToldStage},
    request::EngineLoad,
};
use mlx_cluster_proto::{net, wire::Hello};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Where workers join unless told otherwise; any free port when this one is taken.
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 7070);
const COMMANDS: usize = 64;
const FOUND: usize = 64;
/// A part that was told to end gets this long.
const PART_TIMEOUT: Duration = Duration::from_secs(2);
/// A job that runs may save a checkpoint, before its engines are taken away.
const JOBS_TIMEOUT: Duration = Duration::from_secs(4);
/// The HTTP server may finish sending.
const HTTP_TIMEOUT: Duration = Duration::from_secs(6);

/// How a coordinator is started.
#[derive(Debug, Clone)]
pub struct CoordinatorOptions {
    /// A folder or a repository; None starts idle.
    pub model: Option<String>,
    /// To be served beside it.
    pub adapters: Vec<AdapterArgument>,
    pub cluster: ClusterName,
    /// For messages; the machine's name by default.
    pub name: Option<String>,
    pub http: SocketAddr,
    /// Where workers join; port 7070 of all addresses, or a free one, by default.
    pub listen: Option<SocketAddr>,
    pub min_workers: usize,
    pub strategy: Strategy,
    /// Layers of each stage, the most capable worker first.
    pub split: Option<Vec<u32>>,
    /// Which workers hold which layers, exactly.
    pub stages: Option<Vec<ToldStage>>,
    pub collective: Collective,
    /// What `auto` chooses for.
    pub optimize: Optimize,
    pub context_tokens: Option<u32>,
    /// How keys and values are kept.
    pub caches: CacheOptions,
    /// The folder for this machine's own state.
    pub home: PathBuf,
    /// When `min_workers` are not there after this, the coordinator ends with an error.
    pub wait_for_workers: Duration,
    pub quiet: bool,
}

impl Default for CoordinatorOptions {
    fn default() -> Self {
        Self {
            model: None,
            adapters: Vec::new(),
            cluster: "default".into(),
            name: None,
            http: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            listen: None,
            min_workers: 1,
            strategy: Strategy::Auto,
            split: None,
            stages: None,
            collective: Collective::Auto,
            optimize: Optimize::Latency,
            context_tokens: None,
            caches: CacheOptions::default(),
            home: PathBuf::new(),
            wait_for_workers: Duration::from_secs(120),
            quiet: false,
        }
    }
}

/// Runs a coordinator until `shutdown`, or until it fails. The plan and what happens are printed unless `quiet`.
pub async fn run(options: CoordinatorOptions, shutdown: CancellationToken) -> Result<(), CoordinatorError> {
    let reporter = if options.quiet { report::quiet() } else { report::lines() };
    run_with(options, shutdown, reporter).await
}

/// As [`run`], with somebody else to tell what happens.
pub async fn run_with(options: CoordinatorOptions, shutdown: CancellationToken, reporter: Reporter) -> Result<(), CoordinatorError> {
    let http = bind(options.http, "--http").await?;
    let grpc = bind_grpc(options.listen).await?;
    let (commands, commands_out) = mpsc::channel(COMMANDS);
    let (status, status_out) = watch::channel(Arc::new(starting(&options)));
    let (served, served_out) = watch::channel(None);
    let parts = JobParts { home: options.home.clone(), runner: Box::new(ClusterRunner), commands: commands.clone() };
    let (jobs, jobs_task) = Jobs::open(parts)?;
    let serving = Serving { commands, status: status_out, model: served_out };
    let http_stop = CancellationToken::new();
    let url = format!("http://{}", local_address(&http, options.http));
    let server = tokio::spawn(api::serve(http, serving, jobs, http_stop.clone()));

    let channels = Channels { commands: commands_out, status, served };
    let (jobs_stop, engines_stop) = (shutdown.child_token(), CancellationToken::new());
    let jobs_end = tokio::spawn(end_jobs_first(jobs_task, jobs_stop.clone(), engines_stop.clone()));
    let mut result = serve(&options, grpc, url, channels, engines_stop, reporter).await;
    jobs_stop.cancel();
    if let (Err(error), true) = (jobs_end.await, result.is_ok()) {
        result = Err(CoordinatorError::Task { cause: error.to_string() });
    }
    http_stop.cancel();
    match timeout(HTTP_TIMEOUT, server).await {
        Ok(Ok(Err(error))) if result.is_ok() => result = Err(CoordinatorError::Http(error)),
        Ok(Err(error)) if result.is_ok() => result = Err(CoordinatorError::Task { cause: error.to_string() }),
        _ => {}
    }
    result
}

async fn end_jobs_first(jobs: JobsTask, stop: CancellationToken, engines_stop: CancellationToken) {
    stop.cancelled().await;
    jobs.stop(JOBS_TIMEOUT).await;
    engines_stop.cancel();
}

/// What connects the driver to the API.
struct Channels {
    commands: mpsc::Receiver<crate::serving::ServingCommand>,
    status: watch::Sender<Arc<ClusterStatus>>,
    served: watch::Sender<Option<Arc<crate::serving::ServedModel>>>,
}

async fn serve(
    options: &CoordinatorOptions,
    grpc: TcpListener,
    url: String,
    channels: Channels,
    shutdown: CancellationToken,
    reporter: Reporter,
) -> Result<(), CoordinatorError> {
    let model = match &options.model {
        None => None,
        Some(argument) => match shutdown.run_until_cancelled(model::load(argument, &options.home)).await {
            None => return Ok(()),
            Some(model) => Some(model?),
        },
    };
    let defaults = defaults(options);
    if let Some(model) = &model {
        loading::check(model, &defaults)?;
    }
    let adapters = open_adapters(options, model.as_ref()).await?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let name = options.name.clone().unwrap_or_else(host_name);
    let started_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let rank = Rank { started_ms, id: NodeId(id.clone()) };
    let hello = Hello::new(&options.cluster.0, &rank.id, &name);
    let listener = local_address(&grpc, DEFAULT_LISTEN);

    let stop = CancellationToken::new();
    let (joined, joined_out) = mpsc::channel(FOUND);
    let join = tokio::spawn(grpc::serve(grpc, hello.clone(), joined, stop.clone()));
    let announcement = Announcement { cluster: options.cluster.0.clone(), name, rank: rank.clone(), listener };
    let (found, found_out) = mpsc::channel(FOUND);
    let discovery = Discovery::start(&announcement, hello.clone(), found);

    let start = model.as_ref().map(|model| Arc::clone(&model.facts));
    let driver = Driver::new(Parts {
        settings: settings(options, &id),
        defaults,
        start,
        adapters,
        model,
        home: options.home.clone(),
        hello,
        rank,
        join_addresses: reachable(listener, &own_addresses()),
        url,
        commands: channels.commands,
        status: channels.status,
        served: channels.served,
        joined: joined_out,
        found: found_out,
        reporter,
    });
    let result = driver.run(shutdown).await;
    stop.cancel();
    discovery.stop().await;
    match timeout(PART_TIMEOUT, join).await {
        Ok(Ok(Err(error))) => result.and(Err(CoordinatorError::Grpc(error))),
        _ => result,
    }
}

/// Those that the options name; all of them fit.
async fn open_adapters(options: &CoordinatorOptions, model: Option<&model::LoadedModel>) -> Result<Vec<OpenAdapter>, CoordinatorError> {
    let Some(facts) = model.map(|model| Arc::clone(&model.facts)) else {
        return if options.adapters.is_empty() { Ok(Vec::new()) } else { Err(ServeAdapterError::NothingServed.into()) };
    };
    let wanted = options.adapters.clone();
    let open = move || {
        let mut open: Vec<OpenAdapter> = Vec::new();
        let mut registry = Registry::default();
        for AdapterArgument { name, path } in wanted {
            let there: Vec<&str> = open.iter().map(|adapter| adapter.facts.name.as_str()).collect();
            registry.reserve(&name, &facts, &there)?;
            registry.read(&name);
            open.push(OpenAdapter::open(&name, &path, &facts)?);
        }
        Ok::<_, ServeAdapterError>(open)
    };
    let open = tokio::task::spawn_blocking(open).await.map_err(|error| ServeAdapterError::Task { cause: error.to_string() })?;
    Ok(open?)
}

/// The responder and the task that listens to it. Without multicast, only `--join` finds workers.
struct Discovery(Option<(Mdns, JoinHandle<()>)>);

impl Discovery {
    fn start(announcement: &Announcement, hello: Hello, found: mpsc::Sender<crate::discovery::mdns::Found>) -> Self {
        match Mdns::start(Some(announcement)) {
            Ok((mdns, services)) => Self(Some((mdns, tokio::spawn(watch_mdns(services, hello, found))))),
            Err(error) => {
                tracing::warn!(%error, "multicast DNS cannot be used; workers have to be started with --join");
                Self(None)
            }
        }
    }

    async fn stop(self) {
        let Some((mdns, task)) = self.0 else { return };
        mdns.stop().await;
        let abort = task.abort_handle();
        if timeout(PART_TIMEOUT, task).await.is_err() {
            abort.abort();
        }
    }
}

fn settings(options: &CoordinatorOptions, id: &str) -> Settings {
    Settings {
        cluster: options.cluster.0.clone(),
        run: id.chars().take(8).collect(),
        min_workers: options.min_workers,
        wait: Some(options.wait_for_workers),
    }
}

/// How models are spread unless somebody asks for another way.
fn defaults(options: &CoordinatorOptions) -> InstanceSettings {
    InstanceSettings {
        strategy: options.strategy,
        split: options.split.clone(),
        stages: options.stages.clone(),
        collective: options.collective,
        optimize: options.optimize,
        context_tokens: options.context_tokens,
        caches: options.caches,
    }
}

fn starting(options: &CoordinatorOptions) -> ClusterStatus {
    ClusterStatus {
        links: Vec::new(),
        cluster: options.cluster.0.clone(),
        instance: InstanceState::WaitingForWorkers { found: 0, wanted: options.min_workers },
        plan: None,
        adapters: Vec::new(),
        jobs: Vec::new(),
        workers: Vec::new(),
        load: EngineLoad::default(),
        join_addresses: Vec::new(),
    }
}

async fn bind(address: SocketAddr, flag: &'static str) -> Result<TcpListener, CoordinatorError> {
    net::listen(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => CoordinatorError::PortInUse { flag, address },
        _ => CoordinatorError::Listen { flag, address, source },
    })
}

async fn bind_grpc(listen: Option<SocketAddr>) -> Result<TcpListener, CoordinatorError> {
    if let Some(address) = listen {
        return bind(address, "--listen").await;
    }
    match bind(DEFAULT_LISTEN, "--listen").await {
        Err(CoordinatorError::PortInUse { .. }) => bind(SocketAddr::new(DEFAULT_LISTEN.ip(), 0), "--listen").await,
        bound => bound,
    }
}

/// Short, as people call the machine.
fn host_name() -> String {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    match name.split('.').next() {
        Some(short) if !short.is_empty() => short.to_owned(),
        _ => "coordinator".into(),
    }
}

fn local_address(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

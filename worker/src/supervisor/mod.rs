//! The supervisor: speaks for one Mac, keeps the wanted engines alive, and survives whatever happens to them.
//!
//! `plan` and `hold` decide and are pure; `driver` carries out; `service`, `announce` and `join` talk to coordinators.

mod announce;
mod driver;
mod effort;
mod error;
mod facts;
mod hold;
mod home;
mod join;
mod lines;
mod links;
mod local;
mod measure;
mod plan;
mod process;
mod service;
mod store;
#[cfg(test)]
mod tests;

pub use error::WorkerError;
pub use home::{HomeError, weight_store, weight_stores};
pub use measure::Measurement;
pub(crate) use process::COMMON_TEMPORARY_VARIABLE;

use driver::{Driver, Launch, Observation, Request};
use facts::{Facts, Machine};
use links::{Situation, Surveyor, answer::FRAME_BYTES_MAX};
use local::Local;
use mlx_cluster_common::{VERSION, ids::ClusterName, units::Bytes};
use mlx_cluster_hub::HubSettings;
use mlx_cluster_proto::{
    net,
    wire::{weights_server::WeightsServer, worker_server::WorkerServer},
};
use service::WorkerService;
use std::{
    fmt::{self, Display},
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use store::{Store, WeightsService};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Largest message from a worker that asks for weights: the names of a batch of tensors.
const ASKED_BYTES_MAX: usize = 4 << 20;
const REQUESTS_MAX: usize = 64;
const CLUSTER_CHARS_MAX: usize = 63;
/// For connections to end once all streams on them have ended.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// What `mlx-cluster worker` was told.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    pub cluster: ClusterName,
    /// Without one, the host's name is used.
    pub name: Option<String>,
    /// Without one, all IPv4 addresses and a port that the system chooses.
    pub listen: Option<SocketAddr>,
    /// `host:port` of a coordinator that multicast does not reach.
    pub join: Option<String>,
    pub memory_limit: Option<Bytes>,
    /// The data folder, the same each time so that the worker stays the same node. Several workers can share it.
    pub home: PathBuf,
    /// The program that is started as `<program> engine` and `<program> engine --probe`; without one, this program.
    pub engine_command: Option<PathBuf>,
    /// Log at the start what is otherwise printed on stdout: for a worker inside another command.
    pub quiet: bool,
}

/// Speaks for this Mac until `shutdown`; then ends its engines, says goodbye and returns within a few seconds.
pub async fn run(options: WorkerOptions, shutdown: CancellationToken) -> Result<(), WorkerError> {
    let cluster = &options.cluster.0;
    if cluster.is_empty() || cluster.chars().count() > CLUSTER_CHARS_MAX || cluster.chars().any(char::is_control) {
        return Err(WorkerError::ClusterName { name: cluster.escape_debug().to_string() });
    }
    let named = options.name.as_deref().map(|name| {
        let refused = || WorkerError::Name { name: name.escape_debug().to_string() };
        local::checked_name(name).ok_or_else(refused)
    });
    let named = named.transpose()?;
    let identity = home::claim(&options.home)?;
    let name = named.unwrap_or_else(|| local::default_name(sysinfo::System::host_name().ok(), identity.number));
    let address = options.listen.unwrap_or((Ipv4Addr::UNSPECIFIED, 0).into());
    let listen_error = |source| WorkerError::Listen { address, source };
    let listener = net::listen(address).await.map_err(listen_error)?;
    let listen = listener.local_addr().map_err(listen_error)?;
    let local = Local { id: identity.id.clone(), name, cluster: options.cluster.clone(), listen };
    let models = home::models(&options.home, identity.number);
    serve(options, local, models, listener, shutdown).await
}

/// [`run`] with its identity, the folder of its weight store and its listener.
async fn serve(
    options: WorkerOptions,
    local: Local,
    models: PathBuf,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let command = match options.engine_command {
        Some(command) => command,
        None => std::env::current_exe().map_err(|source| WorkerError::Program { source })?,
    };
    let local = Arc::new(local);
    let notices = Notices { quiet: options.quiet };
    notices.introduce(&local);
    let stop = CancellationToken::new();
    let (requests, received) = mpsc::channel(REQUESTS_MAX);
    let (observing, observed) = watch::channel(Observation::default());
    let folder = options.home.join("engines").join(&local.id.0);
    let launch = Launch { command: command.clone(), folder, listen: local.listen.ip(), worker: local.name.clone() };
    let hub = HubSettings::from_env().with_home(&options.home);
    let store = Arc::new(Store::new(local.name.clone(), local.id.clone(), local.cluster.clone(), models, hub));
    let (situating, situation) = watch::channel(Situation::default());
    let (driver, events) = Driver::new(launch, Arc::clone(&store), unix_ms(), observing, situating);

    let (mut needed, others) = (JoinSet::new(), TaskTracker::new());
    let supervising = driver.run(events, received, stop.clone());
    needed.spawn(async move {
        supervising.await;
        ("the supervisor", String::new())
    });
    let measuring = measure_node(command, options.home, options.memory_limit, notices, requests.clone());
    others.spawn(stop.clone().run_until_cancelled_owned(measuring));
    match announce::announce(&local) {
        Ok(announcement) => {
            others.spawn(announcement.stand(stop.clone()));
        }
        Err(error) => tracing::warn!(%error, "this worker cannot be announced over multicast DNS; start it with --join HOST:PORT"),
    }
    if let Some(address) = options.join {
        others.spawn(join::keep_joined(address, local.clone(), observed.clone(), stop.clone()));
    }
    let turn = Arc::new(Semaphore::new(1));
    let surveyor = Surveyor { local: local.clone(), situation, requests: requests.clone(), turn: turn.clone() };
    others.spawn(stop.clone().run_until_cancelled_owned(surveyor.run()));
    let service = WorkerService { local, requests, observed, sessions: others.clone(), turn };
    let weights = WeightsService::new(store, others.clone(), stop.clone());
    needed.spawn(accept(service, weights, listener, stop.clone()));
    let ended = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        Some(result) = needed.join_next() => {
            let (part, cause) = result.unwrap_or_else(|error| ("a task", error.to_string()));
            Err(WorkerError::EndedEarly { part, cause })
        }
    };
    stop.cancel();
    others.close();
    // Each of them has a deadline of its own from here on.
    while needed.join_next().await.is_some() {}
    others.wait().await;
    ended
}

/// Serves until `stop`, and a little longer for streams that are ending.
async fn accept(service: WorkerService, weights: WeightsService, listener: TcpListener, stop: CancellationToken) -> (&'static str, String) {
    let service = WorkerServer::new(service).max_decoding_message_size(FRAME_BYTES_MAX);
    let weights = WeightsServer::new(weights).max_decoding_message_size(ASKED_BYTES_MAX);
    let router = net::server().add_service(service).add_service(weights);
    let serving = router.serve_with_incoming_shutdown(net::incoming(listener), stop.clone().cancelled_owned());
    let too_late = async {
        stop.cancelled().await;
        sleep(DRAIN_DEADLINE).await;
    };
    let cause = tokio::select! {
        result = serving => result.err().map(|error| error.to_string()).unwrap_or_default(),
        () = too_late => String::new(),
    };
    ("the gRPC server", cause)
}

/// Finds out what this node is, tells the user and then the driver.
async fn measure_node(command: PathBuf, home: PathBuf, memory_limit: Option<Bytes>, notices: Notices, requests: mpsc::Sender<Request>) {
    let machine = Machine::look();
    let limit = measure::wired_limit().await;
    let key = format!("{VERSION} {} {}{limit}", machine.chip, machine.total_memory.0);
    let measured = measure::measure(&command, &home, &key).await;
    let speed = match &measured {
        Ok(found) => {
            format!("{} of memory and {:.1} GFLOP/s", PerSecond(found.memory_bandwidth), found.matmul_rate / 1e9)
        }
        Err(error) => format!("speed unknown, because it could not be measured ({error})"),
    };
    let facts = Facts::new(machine, memory_limit, measured.unwrap_or_default());
    notices.say(format_args!("memory: {} of {} for models; {speed}", facts.usable_memory, facts.machine.total_memory));
    // Nobody is there to hear it when the worker ends.
    let _ = requests.send(Request::Facts(facts)).await;
}

/// What the person who started this is told.
#[derive(Debug, Clone, Copy)]
struct Notices {
    quiet: bool,
}

impl Notices {
    fn introduce(self, local: &Local) {
        self.say(format_args!("worker {} (node {}) of cluster {}", local.name, local.id, local.cluster));
        self.say(format_args!("listening on {}; others reach it at {}", local.listen, local.addresses(None).join(", ")));
        self.say(match local.listen.ip().is_loopback() {
            true => "the ports of this worker and its engines are open to programs on this machine only",
            false => {
                "the ports of this worker and its engines are open to the local network, without encryption, until pairing comes: use a network that you trust"
            }
        });
    }

    fn say(self, line: impl Display) {
        match self.quiet {
            true => tracing::info!("{line}"),
            // Whether somebody reads it does not matter to the work.
            false => drop(writeln!(std::io::stdout(), "{line}")),
        }
    }
}

/// Bytes per second, for people.
struct PerSecond(f64);

impl Display for PerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Bytes(self.0 as u64))
    }
}

/// Numbers attempts higher than any earlier process of this node did.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or_default()
}

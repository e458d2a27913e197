//! `mlx-cluster worker`: what runs on every Mac.

use crate::{home::home, signals};
use mlx_cluster_common::units::Bytes;
use mlx_cluster_worker::supervisor::{self, WorkerOptions};
use std::net::SocketAddr;

/// The cluster of who names none.
pub(crate) const DEFAULT_CLUSTER: &str = "default";

/// Offer this Mac to the cluster: hold the layers that a coordinator gives it.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster worker
  mlx-cluster worker --name mini --memory-limit 12GB --join 192.168.1.20:7001")]
pub(crate) struct WorkerArgs {
    /// Nodes of the same name form a cluster
    #[arg(long, default_value = DEFAULT_CLUSTER, value_parser = cluster_name)]
    cluster: String,
    /// How this worker is called; the host's name unless given
    #[arg(long)]
    name: Option<String>,
    /// Where to listen; all addresses and a free port unless given
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// A coordinator that multicast does not reach
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    join: Option<String>,
    /// Memory that models may use, such as 24GB; what the GPU may use unless given
    #[arg(long, value_name = "SIZE")]
    memory_limit: Option<Bytes>,
}

pub(crate) async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    let options = WorkerOptions {
        cluster: args.cluster.as_str().into(),
        name: args.name,
        listen: args.listen,
        join: args.join,
        memory_limit: args.memory_limit,
        home: home()?,
        engine_command: None,
        quiet: false,
    };
    signals::until_stopped(async |stop| Ok(supervisor::run(options, stop).await?)).await
}

/// A cluster's name as it can stand in an announcement.
pub(crate) fn cluster_name(text: &str) -> Result<String, String> {
    let fits = (1..=63).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned()).ok_or_else(|| "a cluster's name has 1 to 63 printable characters".to_owned())
}

fn host_port(text: &str) -> Result<String, String> {
    let is_port = |(host, port): (&str, &str)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0);
    text.rsplit_once(':')
        .is_some_and(is_port)
        .then(|| text.to_owned())
        .ok_or_else(|| "write HOST:PORT, such as 192.168.1.20:7001".to_owned())
}

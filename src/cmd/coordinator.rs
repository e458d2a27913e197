//! `mlx-cluster coordinator`: finds the workers, plans, serves.

use super::worker::{DEFAULT_CLUSTER, cluster_name};
use crate::{
    caches::CacheArgs,
    client::Client,
    home::home,
    progress::{self, Detail},
    signals,
    target::DEFAULT_HTTP,
};
use mlx_cluster_common::plan::{Collective, Optimize, Strategy, ToldStage};
use mlx_cluster_coordinator::{
    CoordinatorOptions,
    adapters::AdapterArgument,
    report::{self, Reporter},
};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Find the workers of a cluster, spread a model over them and serve it.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster coordinator --model mlx-community/Qwen3-30B-A3B-4bit --min-workers 2 --strategy pipeline
  mlx-cluster coordinator --model ./my-model --split 20,8 --context 32768 --http 0.0.0.0:8080")]
pub(crate) struct CoordinatorArgs {
    /// A folder (the same path on every worker) or a repository on the Hugging Face hub; without it the coordinator is idle
    #[arg(long, value_name = "PATH|REPO")]
    model: Option<String>,
    /// An adapter that requests can ask for as MODEL:NAME, by the folder that mlx-lm wrote; its name is the folder's unless given. Can be repeated
    #[arg(long, value_name = "[NAME=]PATH", requires = "model")]
    adapter: Vec<AdapterArgument>,
    /// Nodes of the same name form a cluster
    #[arg(long, default_value = DEFAULT_CLUSTER, value_parser = cluster_name)]
    cluster: String,
    /// How this coordinator is called; the host's name unless given
    #[arg(long)]
    name: Option<String>,
    /// Where the API listens
    #[arg(long, value_name = "ADDR:PORT", default_value = DEFAULT_HTTP)]
    http: SocketAddr,
    /// Where `worker --join` finds this coordinator; port 7070 of all addresses, or a free one, unless given
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Plan only when so many workers are there
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    min_workers: u32,
    /// auto: what is predicted to be fastest, with as few workers as that takes; pipeline: all that are there, one after the other; tensor: all
    /// that are there, each matrix split
    #[arg(long, value_name = "auto|pipeline|tensor", default_value = "auto")]
    strategy: Strategy,
    /// Layers for each worker, the one with the most memory first, instead of in proportion to their memory
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    split: Option<Vec<u32>>,
    /// Which workers hold which layers: `+` joins workers that split each matrix of their layers, `*2` gives one of them twice as much
    #[arg(long, value_name = "A+B:0-11,C:12-27", value_delimiter = ',', conflicts_with = "split")]
    stages: Option<Vec<ToldStage>>,
    /// What the workers of a tensor-parallel group talk over: ring (TCP), jaccl (RDMA on Thunderbolt, set up in the workers' environment), or
    /// auto: jaccl where it is set up
    #[arg(long, value_name = "auto|ring|jaccl", default_value = "auto")]
    collective: Collective,
    /// What `auto` chooses for: latency, the speed of one request; throughput, of many together
    #[arg(long, value_name = "latency|throughput", default_value = "latency")]
    optimize: Optimize,
    /// Longest sequence, prompt and answer together; what the model was made for unless given
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    #[command(flatten)]
    caches: CacheArgs,
    /// Give up when the workers are not there after so long
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,
}

pub(crate) async fn run(args: CoordinatorArgs) -> anyhow::Result<()> {
    let has_model = args.model.is_some();
    let http = args.http;
    let options = CoordinatorOptions {
        model: args.model,
        adapters: args.adapter,
        cluster: args.cluster.as_str().into(),
        name: args.name,
        http,
        listen: args.listen,
        min_workers: args.min_workers as usize,
        strategy: args.strategy,
        split: args.split,
        stages: args.stages,
        collective: args.collective,
        optimize: args.optimize,
        context_tokens: args.context,
        caches: args.caches.options()?,
        home: home()?,
        wait_for_workers: Duration::from_secs(args.wait),
        quiet: false,
    };
    signals::until_stopped(async |stop: CancellationToken| {
        let lines = report::lines();
        let reporter: Reporter = Arc::new(move |report| progress::suspended(|| lines(report)));
        let work = mlx_cluster_coordinator::run_with(options, stop.clone(), reporter);
        let watching = async {
            if has_model {
                show_progress(http).await;
            }
            std::future::pending().await
        };
        tokio::select! {
            ended = work => Ok(ended?),
            never = watching => never,
        }
    })
    .await
}

/// Watches the API of this very process, as `status --wait` would.
async fn show_progress(http: SocketAddr) {
    let ip = if http.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::LOCALHOST) } else { http.ip() };
    let Ok(client) = Client::new(&format!("http://{}", SocketAddr::new(ip, http.port()))) else { return };
    // The coordinator itself says whether it is ready, or why it fails.
    let _ = progress::until_ready(&client, Detail::Transfers).await;
}

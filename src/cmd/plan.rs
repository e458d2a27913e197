//! `mlx-cluster plan`: what a coordinator would do, without any engine.

use super::worker::{DEFAULT_CLUSTER, cluster_name};
use crate::{
    caches::CacheArgs,
    failure::{Exit, Failure},
    signals,
};
use mlx_cluster_common::{
    plan::{Optimize, Strategy, ToldStage},
    units::Bytes,
};
use mlx_cluster_coordinator::{ClusterFacts, PlanNodes, PlanOnlyOptions, plan_only, read_cluster_file};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Print which worker would hold which layers, also for Macs that you do not have yet.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster plan --model mlx-community/Qwen3-30B-A3B-4bit --memory 64GB,24GB
  mlx-cluster plan --model ./my-model --memory 64GB,24GB --split 30,18 --context 32768
  mlx-cluster plan --model ./my-model --with cluster.toml --optimize throughput
  mlx-cluster plan --model ./my-model                 (over the free workers that are there)")]
pub(crate) struct PlanArgs {
    /// A folder or a repository on the Hugging Face hub
    #[arg(long, value_name = "PATH|REPO")]
    model: String,
    /// Machines with so much memory for models each; the free workers of the cluster unless given
    #[arg(long, value_name = "SIZE,SIZE,…", value_delimiter = ',')]
    memory: Vec<Bytes>,
    /// Machines and links from a file, see docs/planner.md
    #[arg(long, value_name = "CLUSTER.TOML", conflicts_with_all = ["memory", "cluster", "wait"])]
    with: Option<PathBuf>,
    /// The cluster whose workers are asked
    #[arg(long, default_value = DEFAULT_CLUSTER, value_parser = cluster_name, conflicts_with = "memory")]
    cluster: String,
    /// How long to wait for their answers, and for what they measure between them
    #[arg(long, value_name = "SECONDS", default_value_t = 5, conflicts_with = "memory")]
    wait: u64,
    /// auto: what is predicted to be fastest, with as few workers as that takes; pipeline: all of them, one after the other; tensor: all of them, each matrix split
    #[arg(long, value_name = "auto|pipeline|tensor", default_value = "auto")]
    strategy: Strategy,
    /// Layers for each worker, the one with the most memory first
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    split: Option<Vec<u32>>,
    /// Which workers hold which layers: `+` joins workers that split each matrix of their layers, `*2` gives one of them twice as much
    #[arg(long, value_name = "A+B:0-11,C:12-27", value_delimiter = ',', conflicts_with = "split")]
    stages: Option<Vec<ToldStage>>,
    /// What `auto` chooses for: latency, the speed of one request; throughput, of many together
    #[arg(long, value_name = "latency|throughput", default_value = "latency")]
    optimize: Optimize,
    /// Longest sequence, prompt and answer together
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    #[command(flatten)]
    caches: CacheArgs,
    /// Print the plan as one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<()> {
    let nodes = match (&args.with, args.memory.is_empty()) {
        (Some(path), _) => PlanNodes::Facts(cluster_file(path)?),
        (None, true) => PlanNodes::Discover { cluster: args.cluster.as_str().into(), wait: Duration::from_secs(args.wait) },
        (None, false) => PlanNodes::Memory(args.memory),
    };
    let options = PlanOnlyOptions {
        model: args.model,
        strategy: args.strategy,
        split: args.split,
        stages: args.stages,
        optimize: args.optimize,
        context_tokens: args.context,
        caches: args.caches.options()?,
        nodes,
    };
    let plan = signals::until_stopped(async |stop| match stop.run_until_cancelled(plan_only(options)).await {
        Some(plan) => Ok(plan?),
        None => Err(crate::target::interrupted()),
    });
    let plan = plan.await?;
    match args.json {
        true => println!("{}", serde_json::to_string(&plan)?),
        false => println!("{plan}"),
    }
    Ok(())
}

fn cluster_file(path: &Path) -> anyhow::Result<ClusterFacts> {
    let wrong = |cause: String| Failure::new(Exit::BadFile, format!("{}: {cause}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    Ok(read_cluster_file(&text).map_err(|error| wrong(error.to_string()))?)
}

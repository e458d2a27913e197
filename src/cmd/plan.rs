//! `mlx-cluster plan`: what a coordinator would do, without any worker.

use crate::{home::home, signals};
use mlx_cluster_common::{plan::Strategy, units::Bytes};

/// Print which worker would hold which layers, also for Macs that you do not have yet.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster plan --model mlx-community/Qwen3-30B-A3B-4bit --memory 64GB,24GB
  mlx-cluster plan --model ./my-model --memory 64GB,24GB --split 30,18 --context 32768")]
pub(crate) struct PlanArgs {
    /// A folder or a repository on the Hugging Face hub
    #[arg(long, value_name = "PATH|REPO")]
    model: String,
    /// Memory that models may use on each worker; this machine's unless given
    #[arg(long, value_name = "SIZE,SIZE,…", value_delimiter = ',')]
    memory: Vec<Bytes>,
    /// auto: as few stages as the model needs; pipeline: all workers
    #[arg(long, value_name = "auto|pipeline", default_value = "auto")]
    strategy: Strategy,
    /// Layers for each worker
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    split: Option<Vec<u32>>,
    /// Longest sequence, prompt and answer together
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
}

pub(crate) async fn run(args: PlanArgs) -> anyhow::Result<()> {
    let _ = (home()?, args);
    signals::until_stopped(async |_| Ok(())).await
}

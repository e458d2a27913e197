//! `mlx-cluster engine`: what a worker starts for each shard; not for people.

use std::process::ExitCode;

/// Hold one shard; started by a worker
#[derive(clap::Args)]
pub(crate) struct EngineArgs {
    /// Measure this machine instead
    #[arg(long)]
    probe: bool,
}

pub(crate) fn run(args: &EngineArgs) -> ExitCode {
    match args.probe {
        true => mlx_cluster_worker::engine::probe(),
        false => mlx_cluster_worker::engine::run(),
    }
}

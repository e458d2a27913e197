//! The command line of mlx-cluster: one binary, one verb a file in [`cmd`].

mod caches;
mod client;
mod cmd;
mod failure;
mod home;
mod local_cluster;
mod logging;
mod progress;
mod signals;
mod target;
mod training_report;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = cmd::Cli::parse();
    match cmd::dispatch(cli) {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}

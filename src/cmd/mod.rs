//! The verbs, and which runtime each one gets.

mod chat;
mod coordinator;
mod engine;
mod evaluate;
mod fuse;
mod generate;
mod jobs;
mod models;
mod plan;
mod status;
mod train;
mod worker;

use crate::logging::{self, Verbosity};
use anyhow::Context;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Turns the Macs you own into one machine for large language models.
#[derive(Parser)]
#[command(name = "mlx-cluster", version, arg_required_else_help = true, after_help = AFTER_HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const AFTER_HELP: &str = "\
Example, two Macs:
  studio$ mlx-cluster worker
  mini$   mlx-cluster worker
  studio$ mlx-cluster coordinator --model mlx-community/Qwen3-30B-A3B-4bit --min-workers 2 --strategy pipeline
  studio$ mlx-cluster chat

Example, this Mac alone:
  mlx-cluster generate --model mlx-community/Qwen3-0.6B-4bit --prompt 'Why is the sky blue?'

Exit status: 0 done, 2 wrong usage, 3 a bad file or config, 4 network, 5 no access, 6 not enough memory or disk, 1 anything else.";

#[derive(Subcommand)]
enum Verb {
    Worker(worker::WorkerArgs),
    Coordinator(coordinator::CoordinatorArgs),
    Generate(generate::GenerateArgs),
    Chat(chat::ChatArgs),
    Train(Box<train::TrainArgs>),
    Jobs(jobs::JobsArgs),
    Plan(plan::PlanArgs),
    Models(models::ModelsArgs),
    Status(status::StatusArgs),
    Fuse(fuse::FuseArgs),
    Evaluate(evaluate::EvaluateArgs),
    #[command(hide = true)]
    Engine(engine::EngineArgs),
}

/// Runs the verb to its end.
pub(crate) fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let verb = match cli.verb {
        // An engine starts its own threads and logs by itself.
        Verb::Engine(args) => return Ok(engine::run(&args)),
        verb => verb,
    };
    let verbosity = match verb {
        Verb::Worker(_) | Verb::Coordinator(_) => Verbosity::Service,
        _ => Verbosity::Tool,
    };
    logging::start(verbosity);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the async runtime")?;
    let done = runtime.block_on(async {
        match verb {
            Verb::Worker(args) => worker::run(args).await,
            Verb::Coordinator(args) => coordinator::run(args).await,
            Verb::Generate(args) => generate::run(args).await,
            Verb::Chat(args) => chat::run(args).await,
            Verb::Train(args) => train::run(*args).await,
            Verb::Jobs(args) => jobs::run(args).await,
            Verb::Plan(args) => plan::run(args).await,
            Verb::Models(args) => models::run(args).await,
            Verb::Status(args) => status::run(args).await,
            Verb::Evaluate(args) => evaluate::run(args).await,
            Verb::Fuse(args) => fuse::run(args).await,
            Verb::Engine(_) => Ok(()),
        }
    });
    // A thread that still reads the terminal must not keep the process.
    runtime.shutdown_background();
    done.map(|()| ExitCode::SUCCESS)
}

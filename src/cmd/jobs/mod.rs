//! `mlx-cluster jobs`: the fine-tuning jobs of a coordinator.

mod table;

use super::train::{
    attach::{Shown, attach},
    make_paths_absolute,
    place::Place,
    yaml,
};
use crate::{
    client::{Client, jobs::state_of},
    failure::{Exit, Failure},
    signals,
    target::{DEFAULT_URL, interrupted},
};
use anyhow::Context;
use clap::Subcommand;
use mlx_cluster_coordinator::training::store::JobId;
use serde_json::{Map, Value};
use std::{path::PathBuf, time::Duration};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

const POLL: Duration = Duration::from_millis(200);

/// List, follow, stop and resume fine-tuning jobs.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster jobs list
  mlx-cluster jobs logs 20260314-1a2b3c --follow
  mlx-cluster jobs stop 20260314-1a2b3c
  mlx-cluster jobs resume 20260314-1a2b3c")]
pub(crate) struct JobsArgs {
    /// The coordinator to ask
    #[arg(long, alias = "url", env = "MLX_CLUSTER_URL", value_name = "URL", global = true)]
    coordinator: Option<String>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show all jobs, the oldest first
    List {
        /// Print everything as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a job with its plan
    Show {
        #[arg(value_name = "ID", value_parser = job_id)]
        id: JobId,
        /// Print everything as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what happened to a job so far
    Logs {
        #[arg(value_name = "ID", value_parser = job_id)]
        id: JobId,
        /// Go on until the job ends
        #[arg(long, short)]
        follow: bool,
    },
    /// Stop a job, with a checkpoint
    Stop {
        #[arg(value_name = "ID", value_parser = job_id)]
        id: JobId,
    },
    /// Go on with a job from its last checkpoint, to the same bits as without a stop
    Resume(ResumeArgs),
    /// Print the reports of a job, a JSON object a line
    Metrics {
        #[arg(value_name = "ID", value_parser = job_id)]
        id: JobId,
    },
}

#[derive(clap::Args)]
#[command(after_help = "\
With no coordinator running and none named, this machine alone runs the job.

Example:
  mlx-cluster jobs resume 20260314-1a2b3c
  mlx-cluster jobs resume 20260314-1a2b3c --config longer.yaml")]
struct ResumeArgs {
    #[arg(value_name = "ID", value_parser = job_id)]
    id: JobId,
    /// Start a new optimizer, from the weights of the checkpoint
    #[arg(long)]
    warm_start: bool,
    /// A YAML or JSON file with options that change, such as `iters`
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Return at once
    #[arg(long)]
    detach: bool,
}

fn job_id(text: &str) -> Result<JobId, String> {
    JobId::parse(text).ok_or_else(|| "this is not the id of a job; `mlx-cluster jobs list` shows them".to_owned())
}

pub(crate) async fn run(args: JobsArgs) -> anyhow::Result<()> {
    let url = args.coordinator;
    if let Verb::Resume(resumption) = args.verb {
        return signals::until_stopped(async |stop| resume(url.as_deref(), resumption, &stop).await).await;
    }
    let client = Client::new(url.as_deref().unwrap_or(DEFAULT_URL))?;
    match args.verb {
        Verb::List { json: true } => println!("{}", serde_json::to_string_pretty(&client.jobs().await?)?),
        Verb::List { json: false } => print!("{}", table::list(&client.jobs().await?)),
        Verb::Show { id, json: true } => println!("{}", serde_json::to_string_pretty(&client.job(&id).await?)?),
        Verb::Show { id, json: false } => print!("{}", table::job(&client.job(&id).await?)),
        Verb::Logs { id, follow } => return signals::until_stopped(async |stop| logs(&client, &id, follow, &stop).await).await,
        Verb::Stop { id } => return signals::until_stopped(async |stop| end(&client, &id, &stop).await).await,
        Verb::Metrics { id } => print!("{}", client.job_metrics(&id).await?),
        Verb::Resume(_) => {}
    }
    Ok(())
}

async fn logs(client: &Client, id: &JobId, follow: bool, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut shown = Shown::log();
    let told = client.job_events(id, 0, follow, |event| {
        shown.take(event);
        Ok(())
    });
    tokio::select! {
        told = told => told,
        () = stop.cancelled() => Err(interrupted()),
    }
}

/// Waits until the job has ended.
async fn end(client: &Client, id: &JobId, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut job = client.stop_job(id).await?;
    while state_of(&job).is_some_and(|state| state.is_active()) {
        tokio::select! {
            () = sleep(POLL) => job = client.job(id).await?,
            () = stop.cancelled() => return Err(interrupted()),
        }
    }
    println!("job {id} {} at iteration {}", job["state"].as_str().unwrap_or_default(), job["iteration"]);
    Ok(())
}

async fn resume(url: Option<&str>, args: ResumeArgs, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut changes: Map<String, Value> = args.config.as_deref().map(yaml::read).transpose()?.unwrap_or_default();
    make_paths_absolute(&mut changes, &std::env::current_dir().context("cannot read the working directory")?);
    let mut place = Place::reach(url, stop).await?;
    let resumed = async {
        if args.detach && place.local.is_some() {
            return Err(Failure::new(Exit::Usage, "there is no coordinator that could go on: leave --detach out, or start one").into());
        }
        let job = place.client.resume_job(&args.id, args.warm_start, &changes).await?;
        match args.detach {
            true => {
                println!("{}", job.id);
                Ok(())
            }
            false => attach(&mut place, &job, stop).await,
        }
    }
    .await;
    let closed = place.close().await;
    resumed.and(closed)
}

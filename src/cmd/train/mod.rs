//! `mlx-cluster train`: the flags of `mlx_lm.lora`, and the config that they make together with a file.

pub(crate) mod attach;
pub(crate) mod place;
mod report;
pub(crate) mod yaml;

use crate::{
    failure::{Exit, Failure},
    signals,
};
use anyhow::Context;
use attach::attach;
use mlx_cluster_common::{
    training::{TrainStrategy, TrainingConfig},
    units::Bytes,
};
use place::Place;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf, absolute};
use tokio_util::sync::CancellationToken;

/// Fine-tune a model on the workers of a cluster.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
The job is run by a coordinator and goes on when this is interrupted; with none running and none named, this machine alone runs it.
Flags win over the file; its keys are those of mlx-lm's lora.py, and what neither says has mlx-lm's default.

Example:
  mlx-cluster train --config lora.yaml
  mlx-cluster train --model mlx-community/Qwen3-0.6B-4bit --train --data ./data --iters 600 --strategy pipeline"
)]
pub(crate) struct TrainArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// A YAML or JSON file with the options of the job
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The coordinator that runs the job
    #[arg(long, alias = "url", env = "MLX_CLUSTER_URL", value_name = "URL")]
    coordinator: Option<String>,
    /// Start the job and return at once
    #[arg(long)]
    detach: bool,
    /// How the job is spread: data, a copy of the model on each worker; pipeline, some layers on each; tensor, a part of each matrix
    #[arg(long, value_name = "auto|data|pipeline|tensor", default_value = "auto")]
    strategy: TrainStrategy,
    /// Layers for each stage of a pipeline, the worker with the most memory first, instead of as predicted to be fastest
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    split: Option<Vec<u32>>,
    /// A folder or a repository on the Hugging Face hub
    #[arg(long, value_name = "PATH|REPO", help_heading = MODEL)]
    model: Option<String>,
    /// What is trained: low-rank adapters, those with magnitudes, or all parameters
    #[arg(long, value_name = "lora|dora|full", help_heading = MODEL)]
    fine_tune_type: Option<String>,
    /// How many of the model's last layers are trained; -1 for all
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = MODEL)]
    num_layers: Option<i64>,
    /// Start from these weights, with a new optimizer
    #[arg(long, value_name = "FILE", help_heading = MODEL)]
    resume_adapter_file: Option<String>,
    /// Where the adapter is written, or read from to test it
    #[arg(long, value_name = "FOLDER", help_heading = MODEL)]
    adapter_path: Option<String>,
    /// Train
    #[arg(long, help_heading = DATA)]
    train: bool,
    /// Evaluate on the test set, after training where there is some
    #[arg(long, help_heading = DATA)]
    test: bool,
    /// A folder with {train,valid,test}.jsonl, or a data set on the hub
    #[arg(long, value_name = "FOLDER|REPO", help_heading = DATA)]
    data: Option<String>,
    /// Only the answer counts in the loss
    #[arg(long, help_heading = DATA)]
    mask_prompt: bool,
    /// Short examples share rows
    #[arg(long, help_heading = DATA)]
    packing: bool,
    /// Longer examples are cut
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true, help_heading = DATA)]
    max_seq_length: Option<i64>,
    /// Of the order of the examples, of new adapters and of dropout
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = DATA)]
    seed: Option<i64>,
    /// adam, adamw, muon, sgd or adafactor
    #[arg(long, value_name = "NAME", help_heading = STEPS)]
    optimizer: Option<String>,
    /// Without effect where the file has an `lr_schedule`
    #[arg(long, value_name = "X", allow_negative_numbers = true, value_parser = finite, help_heading = STEPS)]
    learning_rate: Option<f64>,
    /// Examples in a batch
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = STEPS)]
    batch_size: Option<i64>,
    /// Batches to train for
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = STEPS)]
    iters: Option<i64>,
    /// Batches for each update of the parameters
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = STEPS)]
    grad_accumulation_steps: Option<i64>,
    /// Keep only the inputs of the layers, and compute the rest again
    #[arg(long, help_heading = STEPS)]
    grad_checkpoint: bool,
    /// Give spare memory back after a step when it is more than this
    #[arg(long, value_name = "SIZE", help_heading = STEPS)]
    clear_cache_threshold: Option<Bytes>,
    /// Batches of an evaluation; -1 for the whole set
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = REPORTS)]
    val_batches: Option<i64>,
    /// Batches of the test; -1 for the whole set
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = REPORTS)]
    test_batches: Option<i64>,
    /// Batches from one report of the loss to the next
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = REPORTS)]
    steps_per_report: Option<i64>,
    /// Batches from one evaluation to the next
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = REPORTS)]
    steps_per_eval: Option<i64>,
    /// Batches from one checkpoint to the next
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = REPORTS)]
    save_every: Option<i64>,
    /// tensorboard writes event files beside metrics.jsonl
    #[arg(long, value_name = "tensorboard", help_heading = REPORTS)]
    report_to: Option<String>,
    /// What TensorBoard calls the run: the folder for event files within the adapter's
    #[arg(long, value_name = "NAME", help_heading = REPORTS)]
    project_name: Option<String>,
}

#[derive(clap::Subcommand)]
enum Verb {
    Report(report::ReportArgs),
}

const MODEL: &str = "Model and adapter";
const DATA: &str = "Data";
const STEPS: &str = "Steps";
const REPORTS: &str = "Reports and checkpoints";

/// JSON has no NaN.
fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "not a number".to_owned())
}

pub(crate) async fn run(args: TrainArgs) -> anyhow::Result<()> {
    if let Some(Verb::Report(args)) = &args.verb {
        return report::run(args);
    }
    let config = config(&args)?;
    signals::until_stopped(async |stop: CancellationToken| {
        let mut place = Place::reach(args.coordinator.as_deref(), &stop).await?;
        let trained = train(&mut place, &config, &args, &stop).await;
        let closed = place.close().await;
        trained.and(closed)
    })
    .await
}

async fn train(place: &mut Place, config: &TrainingConfig, args: &TrainArgs, stop: &CancellationToken) -> anyhow::Result<()> {
    if args.detach && place.local.is_some() {
        return Err(Failure::new(Exit::Usage, "there is no coordinator that could go on: leave --detach out, or start one").into());
    }
    let job = place.client.start_job(&config.adapter_config(), args.strategy, args.split.as_deref()).await?;
    if args.detach {
        println!("{}", job.id);
        return Ok(());
    }
    eprintln!("job {} at {}", job.id, place.client.url());
    attach(place, &job, stop).await
}

/// The job that the flags and their file describe. Paths are made absolute, since the coordinator works with them.
fn config(args: &TrainArgs) -> anyhow::Result<TrainingConfig> {
    let folder = std::env::current_dir().context("cannot read the working directory")?;
    config_in(args, &folder).map_err(Into::into)
}

/// `folder` is what relative paths start from, those in the file too, as in mlx-lm.
fn config_in(args: &TrainArgs, folder: &Path) -> Result<TrainingConfig, Failure> {
    let mut keys = match &args.config {
        Some(path) => yaml::read(&folder.join(path))?,
        None => Map::new(),
    };
    keys.extend(flags(args));
    make_absolute(&mut keys, folder);
    TrainingConfig::parse(&keys).map_err(|error| match &args.config {
        Some(path) => Failure::new(Exit::BadFile, format!("{}: {error}", path.display())),
        None => Failure::new(Exit::Usage, error.to_string()),
    })
}

/// The flags that were given, by their keys. As in mlx-lm, a switch can be turned on by its flag and not off.
fn flags(args: &TrainArgs) -> impl Iterator<Item = (String, Value)> {
    let on = |switch: bool| if switch { Value::Bool(true) } else { Value::Null };
    let given = [
        ("config", json!(args.config.as_deref().map(Path::to_string_lossy))),
        ("model", json!(args.model)),
        ("train", on(args.train)),
        ("test", on(args.test)),
        ("data", json!(args.data)),
        ("fine_tune_type", json!(args.fine_tune_type)),
        ("optimizer", json!(args.optimizer)),
        ("mask_prompt", on(args.mask_prompt)),
        ("packing", on(args.packing)),
        ("num_layers", json!(args.num_layers)),
        ("batch_size", json!(args.batch_size)),
        ("iters", json!(args.iters)),
        ("val_batches", json!(args.val_batches)),
        ("learning_rate", json!(args.learning_rate)),
        ("steps_per_report", json!(args.steps_per_report)),
        ("steps_per_eval", json!(args.steps_per_eval)),
        ("grad_accumulation_steps", json!(args.grad_accumulation_steps)),
        ("resume_adapter_file", json!(args.resume_adapter_file)),
        ("adapter_path", json!(args.adapter_path)),
        ("save_every", json!(args.save_every)),
        ("test_batches", json!(args.test_batches)),
        ("max_seq_length", json!(args.max_seq_length)),
        ("grad_checkpoint", on(args.grad_checkpoint)),
        ("clear_cache_threshold", json!(args.clear_cache_threshold)),
        ("report_to", json!(args.report_to)),
        ("project_name", json!(args.project_name)),
        ("seed", json!(args.seed)),
    ];
    given.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.to_owned(), value))
}

fn make_absolute(keys: &mut Map<String, Value>, folder: &Path) {
    if keys.get("adapter_path").is_none_or(Value::is_null) {
        keys.insert("adapter_path".to_owned(), json!("adapters"));
    }
    make_paths_absolute(keys, folder);
}

/// Those that are given. A model or data set that is not here is on the hub.
pub(crate) fn make_paths_absolute(keys: &mut Map<String, Value>, folder: &Path) {
    for (key, may_be_on_the_hub) in [("model", true), ("data", true), ("adapter_path", false), ("resume_adapter_file", false)] {
        if let Some(path) = keys.get_mut(key) {
            make_path_absolute(path, folder, may_be_on_the_hub);
        }
    }
    let sets = match keys.get_mut("hf_dataset") {
        Some(Value::Array(sets)) => sets.as_mut_slice(),
        Some(set) => std::slice::from_mut(set),
        None => &mut [],
    };
    for path in sets.iter_mut().filter_map(|set| set.get_mut("path")) {
        make_path_absolute(path, folder, true);
    }
}

/// What is no text is refused with the rest; an empty path has a meaning of its own.
fn make_path_absolute(path: &mut Value, folder: &Path, may_be_on_the_hub: bool) {
    let Some(given) = path.as_str().filter(|path| !path.is_empty()) else { return };
    let whole = folder.join(given);
    // A file too, so that it is refused as one.
    if (!may_be_on_the_hub || whole.exists())
        && let Ok(whole) = absolute(whole)
    {
        *path = Value::String(whole.to_string_lossy().into_owned());
    }
}

#[cfg(test)]
mod tests;

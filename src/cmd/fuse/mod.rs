//! `mlx-cluster fuse`: an adapter becomes part of its base, as a model folder that mlx-lm and this program load.

mod finite;
mod output;

use crate::{
    failure::{Exit, Failure},
    home::home,
    signals,
    target::interrupted,
};
use indicatif::{ProgressBar, ProgressStyle};
use mlx_cluster_common::{architectures::read_spec, config::parse_json, training::FusePlan, units::Bytes, weights::WeightMap};
use mlx_cluster_hub::{AdapterFiles, HubSettings, ModelRef, Progress, Snapshot};
use output::{Base, Output};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use tokio_util::sync::CancellationToken;

/// Make a trained adapter part of its base model, and write the result as a model folder.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster fuse --model mlx-community/Qwen3-0.6B-4bit --adapter-path adapters --save-path fused_model
  mlx-cluster fuse --adapter-path adapters --dequantize      (of the model that the adapter was trained on)
  mlx-cluster coordinator --model ./fused_model

The result keeps the base's files, names and quantisation; only tensors that the adapter changes are other ones. Python's mlx-lm loads it as it
loads the base. It is written under a hidden name beside --save-path and gets its own name when it is complete.")]
pub(crate) struct FuseArgs {
    /// The base, a folder or a repository on the Hugging Face hub; the one that the adapter was trained on unless given
    #[arg(long, value_name = "PATH|REPO")]
    model: Option<String>,
    /// The adapter's folder, with adapters.safetensors and adapter_config.json
    #[arg(long, value_name = "FOLDER", default_value = "adapters")]
    adapter_path: PathBuf,
    /// Where the result goes: a folder that is not there yet, or empty
    #[arg(long, value_name = "FOLDER", default_value = "fused_model")]
    save_path: PathBuf,
    /// Write every parameter as floats, without the base's quantisation
    #[arg(long)]
    dequantize: bool,
}

pub(crate) async fn run(args: FuseArgs) -> anyhow::Result<()> {
    signals::until_stopped(async |stop| fuse(args, stop).await).await
}

async fn fuse(args: FuseArgs, stop: CancellationToken) -> anyhow::Result<()> {
    // What can be wrong without the base is said before anything is fetched.
    let target = output::free_target(&args.save_path)?;
    let adapter = AdapterFiles::open(&args.adapter_path).map_err(bad_file)?;
    let Some(model) = args.model.clone().or_else(|| adapter.adapter.config.model.clone()) else {
        let message = "adapter_config.json does not say which model the adapter was trained on: give it as --model";
        return Err(Failure::new(Exit::Usage, message).into());
    };
    let base = match stop.run_until_cancelled(fetch(&model)).await {
        Some(base) => base?,
        None => return Err(interrupted()),
    };
    // The blocking task looks at `stop` itself, so that what it began is removed before the process ends.
    let done = tokio::task::spawn_blocking(move || write(&args, &target, &model, &base, &adapter, &stop)).await?;
    println!("{}", done?);
    Ok(())
}

/// The base with all of its files on this machine.
async fn fetch(model: &str) -> anyhow::Result<Base> {
    let model = ModelRef::parse(model).map_err(|error| Failure::new(Exit::BadFile, error.to_string()))?;
    let settings = HubSettings::from_env().with_home(&home()?);
    let snapshot = Snapshot::open(&model, &settings, &|_| {}).await?;
    let description = snapshot.describe().await?;
    let files: Vec<String> = description.files.keys().cloned().collect();
    let total: u64 = description.files.values().map(|file| file.header.file_bytes).sum();
    let bar = bar(total);
    let done = Mutex::new(BTreeMap::new());
    let show = |progress: Progress<'_>| {
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.insert(progress.file.to_owned(), progress.done_bytes);
        bar.set_position(done.values().sum());
    };
    snapshot.fetch_weights(&files, &show).await?;
    bar.finish_and_clear();
    Ok(Base { folder: snapshot.folder().to_path_buf(), index: description.weight_index(&model.to_string())?, description })
}

/// Writes the result, and says in a sentence what it is.
fn write(
    args: &FuseArgs,
    target: &Path,
    model: &str,
    base: &Base,
    files: &AdapterFiles,
    stop: &CancellationToken,
) -> anyhow::Result<String> {
    let spec = read_spec(&parse_json(&base.description.config)?).map_err(bad_file)?;
    let map = WeightMap::assign(&spec, &base.index).map_err(bad_file)?;
    let adapter = &files.adapter.clone().without_unused(&map, &base.index);
    adapter.check_against(&spec, &map, model).map_err(bad_file)?;
    let plan = FusePlan::new(&spec, &map, adapter, args.dequantize).map_err(bad_file)?;
    finite::check(files, stop)?;
    let output = Output::begin(target, base, &plan)?;
    let bar = bar(output.bytes());
    let bytes = output.bytes();
    output.write(&files.folder, &adapter.tensors, stop, &|bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let (kind, changes) = (adapter.config.fine_tune.name(), adapter.changes().len());
    let layout = match &plan {
        FusePlan::AsPublished(_) => "",
        FusePlan::Canonical(_) => ", all parameters as floats",
    };
    Ok(format!("{} holds {model} with {changes} {kind} changes fused, {}{layout}", args.save_path.display(), Bytes(bytes)))
}

fn bad_file(error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::BadFile, error.to_string())
}

fn bar(total_bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bytes}/{total_bytes} {wide_bar} {bytes_per_sec} {eta}");
    ProgressBar::new(total_bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

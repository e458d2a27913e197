//! `mlx-cluster models pull`: fetches weights before anybody needs them.

use crate::{
    failure::{Exit, Failure},
    home::home,
    signals,
};
use indicatif::{ProgressBar, ProgressStyle};
use mlx_cluster_common::{architectures::read_spec, config::parse_json, units::Bytes, weights::WeightMap};
use mlx_cluster_hub::{Description, HubSettings, ModelRef, ModelStore, Progress, RepoRef, Snapshot};
use mlx_cluster_worker::supervisor::weight_store;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Fetch a model: all of it into the cache that all Hugging Face tools share, or some layers into the weight store of this machine's worker.
#[derive(clap::Args)]
pub(super) struct PullArgs {
    /// owner/name, optionally @branch or @commit
    model: RepoRef,
    /// Only what a stage with these layers needs, as `plan` shows them
    #[arg(long, value_name = "FIRST-LAST", value_parser = layers)]
    layers: Option<Range<u32>>,
}

fn layers(text: &str) -> Result<Range<u32>, String> {
    let wrong = || format!("`{text}` is no range of layers: write it as 0-11, or 7 for one layer");
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.parse::<u32>().map_err(|_| wrong())?, last.parse::<u32>().map_err(|_| wrong())?);
    last.checked_add(1).filter(|end| first < *end).map(|end| first..end).ok_or_else(wrong)
}

pub(super) async fn run(args: PullArgs) -> anyhow::Result<()> {
    signals::until_stopped(async |stop| match stop.run_until_cancelled(pull(args)).await {
        Some(done) => done,
        None => Err(crate::target::interrupted()),
    })
    .await
}

async fn pull(args: PullArgs) -> anyhow::Result<()> {
    let home = home()?;
    let settings = HubSettings::from_env().with_home(&home);
    let bar = Bar::new();
    let snapshot = Snapshot::open(&ModelRef::Repo(args.model), &settings, &|_| {}).await?;
    let description = snapshot.describe().await?;
    match args.layers {
        None => {
            let files: Vec<_> = description.files.keys().cloned().collect();
            snapshot.fetch_weights(&files, &|progress| bar.file(&progress)).await?;
            bar.bar.finish_and_clear();
            println!("{} is in {}", snapshot.model(), snapshot.folder().display());
        }
        Some(layers) => pull_layers(&snapshot, &description, layers, &home, &bar).await?,
    }
    Ok(())
}

async fn pull_layers(snapshot: &Snapshot, description: &Description, layers: Range<u32>, home: &Path, bar: &Bar) -> anyhow::Result<()> {
    let usage = |message: String| Failure::new(Exit::Usage, message);
    let ModelRef::Repo(repo) = snapshot.model() else { return Err(usage("a folder needs no pull".to_owned()).into()) };
    let spec = read_spec(&parse_json(&description.config)?)?;
    if layers.end > spec.n_layers() {
        return Err(usage(format!("{repo} has layers 0-{}", spec.n_layers().saturating_sub(1))).into());
    }
    let map = WeightMap::assign(&spec, &description.weight_index(&repo.to_string())?)?;
    let parameters = spec.parts_of(layers).into_iter().filter_map(|part| map.parts.get(&part)).flatten();
    let wanted: BTreeSet<_> = parameters.flat_map(|parameter| parameter.sources()).collect();
    let store = ModelStore::new(&weight_store(home), repo).ok_or_else(|| usage(format!("{repo} is at no commit")))?;
    let _lock = store.lock(LOCK_PATIENCE).await?;
    let bytes = store.pull(snapshot, description, &wanted, &|done, total| bar.show(done, total)).await?;
    bar.bar.finish_and_clear();
    println!("{} of {repo} are in {}", Bytes(bytes), store.folder().display());
    Ok(())
}

/// One line for all files together.
struct Bar {
    bar: ProgressBar,
    files: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bytes}/{total_bytes} {wide_bar} {bytes_per_sec} {eta}") {
            bar.set_style(style);
        }
        Self { bar, files: Mutex::default() }
    }

    fn file(&self, progress: &Progress<'_>) {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.insert(progress.file.to_owned(), (progress.done_bytes, progress.total_bytes));
        let (done, total) = files.values().fold((0, 0), |(done, total), file| (done + file.0, total + file.1));
        self.show(done, total);
    }

    fn show(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_written_as_plans_show_them() {
        assert_eq!((layers("0-11"), layers("7")), (Ok(0..12), Ok(7..8)));
        for wrong in ["", "-", "3-2", "a-b", "0-4294967295", "1-2-3"] {
            assert!(layers(wrong).is_err(), "{wrong}");
        }
    }
}

//! The weight store: makes sure that the files of a shard are on this node, and says where.

use super::{
    home,
    plan::{Event, Failure, Run},
};
use mlx_cluster_common::{
    architectures::read_spec,
    config::ConfigError,
    engine::{EngineSpec, ModelSource},
    units::Bytes,
    weights::{WeightError, WeightMap},
};
use mlx_cluster_hub::{HubError, HubErrorKind, HubSettings, JsonFileError, ModelRef, ModelRefError, Progress, RepoRef, Snapshot};
use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};
use tokio::sync::mpsc;

const CONFIG_FILE: &str = "config.json";

/// Why a shard's files are not here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error(
        "worker {worker} has no folder {folder}: copy the model there under the same path, or give the coordinator a hub repository id"
    )]
    NoFolder { worker: String, folder: String },
    #[error("folder {folder} on worker {worker} has no {CONFIG_FILE}: copy the whole model there")]
    NoConfig { worker: String, folder: String },
    #[error(transparent)]
    Repo(#[from] ModelRefError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightError),
    #[error("layers {}..{} are wanted of {model}, which has {n_layers}: start the coordinator again", wanted.start, wanted.end)]
    Layers { model: String, wanted: Range<u32>, n_layers: u32 },
    #[error("{model} on worker {worker} is not what the coordinator planned with: give the same commit to both")]
    Fingerprint { model: String, worker: String },
}

impl StoreError {
    /// Whether trying again cannot help.
    fn is_hopeless(&self) -> bool {
        match self {
            StoreError::Hub(error) => !matches!(error.kind(), HubErrorKind::Network | HubErrorKind::Resources),
            _ => true,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) worker: String,
    /// The worker's data folder; the models themselves are in Hugging Face's cache.
    pub(crate) home: PathBuf,
    pub(crate) hub: HubSettings,
}

impl Store {
    /// Fetches what is missing for a shard; the outcome and what happens until then arrive as events.
    pub(crate) async fn fetch(&self, run: Run, spec: &EngineSpec, events: mpsc::Sender<Event>) {
        let tally = Mutex::new(Tally::default());
        let progress = |progress: Progress<'_>| {
            let (done, total) = tally.lock().unwrap_or_else(PoisonError::into_inner).add(&progress);
            let file = progress.file.to_owned();
            // Progress that nobody has time for is not worth waiting.
            let _ = events.try_send(Event::Fetching { run, file, done, total });
        };
        let event = match self.provide(spec, &tally, &progress).await {
            Ok(folder) => Event::Fetched { run, folder },
            Err(error) => {
                let hopeless = error.is_hopeless();
                Event::FetchFailed { run, failure: Failure { cause: error.to_string(), hopeless, lost: None } }
            }
        };
        // Nobody is there to hear it when the worker itself ends.
        let _ = events.send(event).await;
    }

    async fn provide(&self, spec: &EngineSpec, tally: &Mutex<Tally>, progress: OnProgress<'_>) -> Result<PathBuf, StoreError> {
        match &spec.model {
            ModelSource::Folder(folder) => self.folder(folder),
            ModelSource::Repo { id, revision } => {
                let repo: RepoRef = format!("{id}@{revision}").parse()?;
                self.repo(repo, spec, tally, progress).await
            }
        }
    }

    fn folder(&self, folder: &str) -> Result<PathBuf, StoreError> {
        let (path, worker) = (Path::new(folder), self.worker.clone());
        let folder = folder.to_owned();
        if !path.is_dir() {
            return Err(StoreError::NoFolder { worker, folder });
        }
        if !path.join(CONFIG_FILE).is_file() {
            return Err(StoreError::NoConfig { worker, folder });
        }
        Ok(path.to_path_buf())
    }

    async fn repo(&self, repo: RepoRef, spec: &EngineSpec, tally: &Mutex<Tally>, progress: OnProgress<'_>) -> Result<PathBuf, StoreError> {
        let record = ShardRecord::of(&self.home, &repo, &spec.layers, spec.fingerprint);
        let model = ModelRef::Repo(repo);
        if let Some(files) = record.as_ref().and_then(ShardRecord::read) {
            let snapshot = Snapshot::attach(&model, &self.hub).await?;
            if snapshot.file(CONFIG_FILE).is_some() {
                snapshot.fetch_weights(&files, progress).await?;
                return Ok(snapshot.folder().to_path_buf());
            }
        }
        let snapshot = Snapshot::open(&model, &self.hub, progress).await?;
        let files = self.files_of(&snapshot, spec, tally).await?;
        snapshot.fetch_weights(&files, progress).await?;
        if let Some(record) = record {
            record.write(&files);
        }
        Ok(snapshot.folder().to_path_buf())
    }

    /// The weight files that hold the layers of this shard.
    async fn files_of(&self, snapshot: &Snapshot, spec: &EngineSpec, tally: &Mutex<Tally>) -> Result<Vec<String>, StoreError> {
        let model_spec = read_spec(&snapshot.config()?)?;
        let model = snapshot.model().to_string();
        if spec.layers.end > model_spec.n_layers() {
            return Err(StoreError::Layers { model, wanted: spec.layers.clone(), n_layers: model_spec.n_layers() });
        }
        let index = snapshot.weight_index().await?;
        let config_path = snapshot.folder().join(CONFIG_FILE);
        let config = std::fs::read(&config_path).map_err(|source| HubError::Disk { action: "read", path: config_path, source })?;
        if index.fingerprint(&config) != spec.fingerprint {
            return Err(StoreError::Fingerprint { model, worker: self.worker.clone() });
        }
        let map = WeightMap::assign(&model_spec, &index)?;
        let files = map.files(&model_spec.parts_of(spec.layers.clone()), &index);
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in index.tensors.values().filter(|entry| files.contains(&entry.file)) {
            tally.expect(&entry.file, entry.bytes);
        }
        Ok(files.into_iter().collect())
    }
}

type OnProgress<'a> = mlx_cluster_hub::OnProgress<'a>;

/// How far the transfer of several files has come, all together.
#[derive(Debug, Default)]
struct Tally {
    files: BTreeMap<String, FileTally>,
}

#[derive(Debug, Default)]
struct FileTally {
    done_bytes: u64,
    total_bytes: u64,
}

impl Tally {
    /// Counts bytes that a file will bring, before its size is known.
    fn expect(&mut self, file: &str, bytes: u64) {
        self.files.entry(file.to_owned()).or_default().total_bytes += bytes;
    }

    /// Takes in a report on one file; what is done and what there is to do, of all files.
    fn add(&mut self, progress: &Progress<'_>) -> (Bytes, Bytes) {
        let file = FileTally { done_bytes: progress.done_bytes, total_bytes: progress.total_bytes };
        self.files.insert(progress.file.to_owned(), file);
        let sum = |bytes: fn(&FileTally) -> u64| self.files.values().map(|file| Bytes(bytes(file))).sum();
        (sum(|file| file.done_bytes), sum(|file| file.total_bytes))
    }
}

/// Which files a shard of one commit needs, remembered so that an engine can be started again without asking the hub.
#[derive(Debug)]
struct ShardRecord {
    path: PathBuf,
}

impl ShardRecord {
    /// None for a branch or tag, which may mean other files tomorrow.
    fn of(home: &Path, repo: &RepoRef, layers: &Range<u32>, fingerprint: u64) -> Option<Self> {
        let (owner, name, commit) = (repo.owner(), repo.name(), repo.commit()?);
        let file = format!("{owner}--{name}--{commit}--{}-{}--{fingerprint:016x}.json", layers.start, layers.end);
        Some(Self { path: home.join("shards").join(file) })
    }

    fn read(&self) -> Option<Vec<String>> {
        serde_json::from_slice(&std::fs::read(&self.path).ok()?).ok()
    }

    /// Without it the next start takes longer, nothing else.
    fn write(&self, files: &[String]) {
        let written = self.path.parent().map_or(Ok(()), std::fs::create_dir_all);
        let written = written.and_then(|()| home::write_whole(&self.path, &serde_json::to_vec(files)?));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "cannot remember which files this shard needs");
        }
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;

//! The weight store: makes sure that the tensors of a shard are on this node, and says where.

mod fetching;
mod live;
mod owners;
mod peers;
mod report;
mod serve;

pub(crate) use fetching::Patience;
pub(crate) use serve::WeightsService;

use super::plan::{Event, Failure, Run};
use fetching::{Fetching, Order};
use live::LiveModel;
use mlx_cluster_common::{
    architectures::read_spec,
    config::{ConfigError, parse_json},
    engine::{EngineSpec, ModelSource, WeightPeer},
    ids::{ClusterName, NodeId},
    spec::ModelSpec,
    weights::{WeightError, WeightMap},
};
use mlx_cluster_hub::{
    Description, Descriptions, HubError, HubErrorKind, HubSettings, ModelRef, ModelRefError, ModelStore, RepoRef, Snapshot, StoreLock,
};
use mlx_cluster_proto::wire::Hello;
use peers::PeerClient;
use report::Report;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

const CONFIG_FILE: &str = "config.json";
const DESCRIPTION_POLL: Duration = Duration::from_millis(200);
/// For another process of this machine that changes the same model's store.
const LOCK_PATIENCE: Duration = Duration::from_secs(60);

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
    #[error("config.json of {model} is not JSON: {source}")]
    Json { model: String, source: serde_json::Error },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightError),
    #[error("layers {}..{} are wanted of {model}, which has {n_layers}: start the coordinator again", wanted.start, wanted.end)]
    Layers { model: String, wanted: Range<u32>, n_layers: u32 },
    #[error("{model} on worker {worker} is not what the coordinator planned with: give the same commit to both")]
    Fingerprint { model: String, worker: String },
    #[error("{model}: give the coordinator a commit, not a branch")]
    NoCommit { model: String },
    #[error(
        "tensor `{tensor}` of {model} is on no worker of the plan, and none of them may or can ask the hub: unset HF_HUB_OFFLINE on one of them, or check its network"
    )]
    Nowhere { tensor: String, model: String },
}

impl StoreError {
    /// Whether trying again cannot help.
    fn is_hopeless(&self) -> bool {
        match self {
            StoreError::Hub(error) => !matches!(error.kind(), HubErrorKind::Network | HubErrorKind::Resources),
            StoreError::Nowhere { .. } => false,
            _ => true,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) worker: String,
    pub(crate) node: NodeId,
    pub(crate) cluster: ClusterName,
    /// Where the tensors of models are kept.
    pub(crate) models: PathBuf,
    pub(crate) hub: HubSettings,
    pub(crate) patience: Patience,
    /// By repository and commit.
    live: Mutex<BTreeMap<String, Arc<LiveModel>>>,
}

impl Store {
    pub(crate) fn new(worker: String, node: NodeId, cluster: ClusterName, models: PathBuf, hub: HubSettings) -> Self {
        Self { worker, node, cluster, models, hub, patience: Patience::default(), live: Mutex::default() }
    }

    /// Fetches what is missing for a shard; the outcome and what happens until then arrive as events.
    pub(crate) async fn fetch(&self, run: Run, spec: &EngineSpec, events: mpsc::Sender<Event>) {
        let event = match self.provide(run, spec, &events).await {
            Ok(folder) => Event::Fetched { run, folder },
            Err(error) => {
                let hopeless = error.is_hopeless();
                Event::FetchFailed { run, failure: Failure { cause: error.to_string(), hopeless, lost: None } }
            }
        };
        // Nobody is there to hear it when the worker itself ends.
        let _ = events.send(event).await;
    }

    async fn provide(&self, run: Run, spec: &EngineSpec, events: &mpsc::Sender<Event>) -> Result<PathBuf, StoreError> {
        match &spec.model {
            ModelSource::Folder(folder) => self.folder(folder),
            ModelSource::Repo { id, revision } => {
                let repo: RepoRef = format!("{id}@{revision}").parse()?;
                self.repo(repo, run, spec, events).await
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

    async fn repo(&self, repo: RepoRef, run: Run, spec: &EngineSpec, events: &mpsc::Sender<Event>) -> Result<PathBuf, StoreError> {
        let model = repo.to_string();
        let store = ModelStore::new(&self.models, &repo).ok_or_else(|| StoreError::NoCommit { model: model.clone() })?;
        let lock = store.lock(LOCK_PATIENCE).await?;
        let snapshot = Snapshot::attach(&ModelRef::Repo(repo.clone()), &self.hub).await;
        let (description, snapshot) = self.description(&repo, spec, snapshot).await?;
        let (shards, layers) = self.shards(&model, &description, spec)?;
        let live = self.open(repo, store, description).await?;
        let wanted = shards.get(layers).cloned().unwrap_or_default();
        let (done, total) = tally(&live, &wanted);
        live.store.check_free_space(total - done)?;
        let report = Arc::new(Report::new(run, events.clone(), done, total));
        let hub = (!self.hub.offline).then_some(snapshot).flatten().map(Arc::new);
        let order = self.order(&live, spec, shards, layers, lock);
        let fetching = Fetching::new(Arc::clone(&live), report, hub, self.patience, order);
        let lock = fetching.run().await?;
        let name = format!("{}-{}", spec.layers.start, spec.layers.end);
        blocking(move || {
            let contents = live.contents().clone();
            live.store.check_whole_files(&live.description, &contents)?;
            let wanted = wanted.iter().map(String::as_str).collect();
            let folder = live.store.shard(&name, &live.description, &contents, &wanted);
            drop(lock);
            Ok(folder?)
        })
        .await?
    }

    /// What the model consists of: as it is known here, or to another worker, or to the hub, which the first worker of the plan asks for
    /// all. With it the model's snapshot, where there is one.
    async fn description(
        &self,
        repo: &RepoRef,
        spec: &EngineSpec,
        snapshot: Result<Snapshot, HubError>,
    ) -> Result<(Description, Option<Snapshot>), StoreError> {
        if let Some(description) = self.kept(repo).await? {
            return Ok((description, snapshot.ok()));
        }
        let others = self.others(repo, spec);
        let is_first = spec.weight_peers.first().is_none_or(|first| first.node == self.node);
        let until = Instant::now() + if is_first && !self.hub.offline { Duration::ZERO } else { self.patience.description };
        loop {
            for (_, client) in &others {
                if let Some(description) = described(client).await {
                    self.keep(repo, description.clone()).await?;
                    return Ok((description, snapshot.ok()));
                }
            }
            if others.is_empty() || Instant::now() >= until {
                break;
            }
            sleep(DESCRIPTION_POLL).await;
        }
        let snapshot = snapshot?;
        Ok((snapshot.describe().await?, Some(snapshot)))
    }

    /// The tensors that each worker of the plan needs, and which of them is this one.
    fn shards(&self, model: &str, description: &Description, spec: &EngineSpec) -> Result<(Vec<BTreeSet<String>>, usize), StoreError> {
        let config = parse_json(&description.config).map_err(|source| StoreError::Json { model: model.to_owned(), source })?;
        let model_spec = read_spec(&config)?;
        let n_layers = model_spec.n_layers();
        if spec.layers.end > n_layers {
            return Err(StoreError::Layers { model: model.to_owned(), wanted: spec.layers.clone(), n_layers });
        }
        let index = description.weight_index(model).map_err(HubError::from)?;
        if index.fingerprint(&description.config) != spec.fingerprint {
            return Err(StoreError::Fingerprint { model: model.to_owned(), worker: self.worker.clone() });
        }
        let map = WeightMap::assign(&model_spec, &index)?;
        let of = |peer: &WeightPeer| tensors_of(&model_spec, &map, &peer.layers);
        let mut shards: Vec<_> = spec.weight_peers.iter().map(of).collect();
        let me = spec.weight_peers.iter().position(|peer| peer.node == self.node).unwrap_or_else(|| {
            // A coordinator that names no sources leaves a worker to itself.
            shards.push(BTreeSet::new());
            shards.len() - 1
        });
        shards[me] = tensors_of(&model_spec, &map, &spec.layers);
        Ok((shards, me))
    }

    fn order(&self, live: &LiveModel, spec: &EngineSpec, wanted: Vec<BTreeSet<String>>, me: usize, lock: StoreLock) -> Order {
        Order { me, peers: self.others(&live.repo, spec), wanted, lock }
    }

    /// The other workers, with their places in the list.
    fn others(&self, repo: &RepoRef, spec: &EngineSpec) -> Vec<(usize, PeerClient)> {
        let hello = Hello::new(&self.cluster.0, &self.node, &self.worker);
        let others = spec.weight_peers.iter().enumerate().filter(|(_, peer)| peer.node != self.node);
        others.map(|(place, peer)| (place, PeerClient::new(peer.clone(), hello.clone(), repo))).collect()
    }

    /// A model of which something is here, or may come to be; None for one that this worker knows nothing of.
    pub(crate) async fn known(&self, repo: &RepoRef) -> Result<Option<Arc<LiveModel>>, StoreError> {
        if let Some(live) = self.live().get(&repo.to_string()) {
            return Ok(Some(Arc::clone(live)));
        }
        let Some(store) = ModelStore::new(&self.models, repo) else { return Ok(None) };
        match self.kept(repo).await? {
            Some(description) => Ok(Some(self.open(repo.clone(), store, description).await?)),
            None => Ok(None),
        }
    }

    /// The model as it is on the disk now, for those who fetch it and those who ask for it.
    async fn open(&self, repo: RepoRef, store: ModelStore, description: Description) -> Result<Arc<LiveModel>, StoreError> {
        let known = self.live().get(&repo.to_string()).cloned();
        if let Some(live) = known {
            return blocking(move || live.look_again().map(|()| live)).await?.map_err(StoreError::from);
        }
        let (name, cached) = (repo.to_string(), self.hub.cached_folder(&repo));
        let live = Arc::new(blocking(move || LiveModel::open(repo, store, description, cached)).await??);
        Ok(Arc::clone(self.live().entry(name).or_insert(live)))
    }

    fn live(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<LiveModel>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn kept(&self, repo: &RepoRef) -> Result<Option<Description>, StoreError> {
        let Some(kept) = self.hub.descriptions.as_deref().map(Descriptions::new) else { return Ok(None) };
        let repo = repo.clone();
        Ok(blocking(move || kept.read(&repo)).await?)
    }

    async fn keep(&self, repo: &RepoRef, description: Description) -> Result<(), StoreError> {
        let Some(kept) = self.hub.descriptions.as_deref().map(Descriptions::new) else { return Ok(()) };
        let repo = repo.clone();
        Ok(blocking(move || kept.write(&repo, &description)).await??)
    }
}

/// What another worker knows about the model, if it knows anything.
async fn described(client: &PeerClient) -> Option<Description> {
    let inventory = async { client.inventory(&mut client.connect().await?).await };
    if !inventory.await.ok()?.described {
        return None;
    }
    match client.describe().await {
        Ok(description) => Some(description),
        Err(error) => {
            tracing::warn!(%error, "what the model consists of is asked for elsewhere");
            None
        }
    }
}

/// What the parts of these layers are made of.
fn tensors_of(spec: &ModelSpec, map: &WeightMap, layers: &Range<u32>) -> BTreeSet<String> {
    if layers.is_empty() {
        return BTreeSet::new();
    }
    let parameters = spec.parts_of(layers.clone()).into_iter().filter_map(|part| map.parts.get(&part)).flatten();
    parameters.flat_map(|parameter| parameter.sources()).map(str::to_owned).collect()
}

/// Bytes of these tensors that are here, and of all of them.
fn tally(live: &LiveModel, wanted: &BTreeSet<String>) -> (u64, u64) {
    let (all, contents) = (live.description.tensors(), live.contents());
    let bytes = |name: &String| all.get(name.as_str()).map_or(0, |(_, slot)| slot.bytes);
    let done = wanted.iter().filter(|name| contents.tensors.contains_key(*name)).map(bytes).sum();
    (done, wanted.iter().map(bytes).sum())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, HubError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| HubError::Task { cause: error.to_string() })
}

#[cfg(test)]
mod tests;

//! A model's files at one commit: which of them are here, and how the others get here.

use crate::{
    OnProgress, Progress,
    cache::{RepoCache, check_free_space},
    description::{Description, Descriptions, WeightFile},
    download::Download,
    error::HubError,
    headers::{WeightFileError, parse_head, read_head, read_header},
    index::{IndexError, WEIGHT_INDEX_FILE, WeightFiles, folder_weight_files, is_weight_file_name},
    json_file::{JsonFileError, read_config},
    model_ref::{ModelRef, RepoRef},
    range::read_remote_head,
    remote::{Remote, RemoteFile},
    settings::HubSettings,
    store::TensorRanges,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use mlx_cluster_common::weights::WeightIndex;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};
use tokio::sync::OnceCell;

/// Requests that run at the same time; more does not make a home connection faster.
const CONCURRENT_REQUESTS: usize = 4;
/// Headers are small, so that the way there and back is what takes time.
const CONCURRENT_HEADERS: usize = 8;
const CONFIG_FILE: &str = "config.json";
/// What is needed beside the weights, as far as a model has it. Everything else stays on the hub.
const METADATA_FILES: [&str; 6] =
    [CONFIG_FILE, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"];

/// The files of one model, in a folder of this machine.
#[derive(Debug)]
pub struct Snapshot {
    model: ModelRef,
    folder: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// A folder that somebody filled; nothing can be added.
    Folder,
    /// The cache alone, because HF_HUB_OFFLINE forbids more or the hub is out of reach.
    Cache {
        repo: RepoRef,
        settings: Box<HubSettings>,
    },
    Hub(Box<HubSource>),
}

#[derive(Debug)]
struct HubSource {
    remote: Remote,
    commit: String,
    /// The top folder of the repository, asked for once.
    files: OnceCell<Vec<RemoteFile>>,
}

impl Snapshot {
    /// Finds the model and fetches its metadata files (config, tokenizer, template, index), not its weights.
    ///
    /// When the hub is out of reach and the whole model is in the cache, the cached one is used.
    pub async fn open(model: &ModelRef, settings: &HubSettings, progress: OnProgress<'_>) -> Result<Self, HubError> {
        let snapshot = Self::attach(model, settings).await?;
        if let Source::Hub(hub) = &snapshot.source
            && let Err(error) = hub.fetch_metadata(&snapshot.folder, is_metadata, progress).await
        {
            return if error.hub_is_away() { snapshot.fall_back_to_cache(error).await } else { Err(error) };
        }
        if !snapshot.folder.join(CONFIG_FILE).is_file() {
            return Err(snapshot.missing(CONFIG_FILE));
        }
        Ok(snapshot)
    }

    /// The same model on another machine, without its metadata files. With a commit as the revision (as in
    /// [`model`](Self::model) of an open snapshot) the network is not touched before something is missing.
    pub async fn attach(model: &ModelRef, settings: &HubSettings) -> Result<Self, HubError> {
        let repo = match model {
            ModelRef::Folder(folder) => return Self::at_folder(folder),
            ModelRef::Repo(repo) => repo,
        };
        if settings.offline {
            return Self::in_cache(repo, settings);
        }
        let remote = Remote::new(repo, settings)?;
        let commit = match repo.commit() {
            Some(commit) => commit.to_owned(),
            None => match remote.resolve_commit().await {
                Ok(commit) => commit,
                Err(error) if error.hub_is_away() => {
                    let Ok(cached) = Self::in_cache(repo, settings) else { return Err(error) };
                    return cached.fall_back_to_cache(error).await;
                }
                Err(error) => return Err(error),
            },
        };
        let folder = remote.cache.snapshot(&commit);
        let model = ModelRef::Repo(repo.at_commit(&commit));
        let hub = HubSource { remote, commit, files: OnceCell::new() };
        Ok(Self { model, folder, source: Source::Hub(Box::new(hub)) })
    }

    /// The model at the commit that was found: what to tell other machines, so that all use the same files.
    pub fn model(&self) -> &ModelRef {
        &self.model
    }

    /// Where the files are. Of a repository, only what was fetched.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of a file that is here; None when it is not.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        let path = self.folder.join(name);
        path.is_file().then_some(path)
    }

    /// `config.json`.
    pub fn config(&self) -> Result<Value, JsonFileError> {
        read_config(&self.folder.join(CONFIG_FILE))
    }

    /// All tensors of the model, from the headers of its files: read here where the file is here, else by ranges from the hub.
    pub async fn weight_index(&self) -> Result<WeightIndex, HubError> {
        Ok(self.describe().await?.weight_index(&self.model.to_string())?)
    }

    /// Config and headers, from what is kept here, from the files, or from the hub; then it is kept.
    pub async fn describe(&self) -> Result<Description, HubError> {
        let kept = self.descriptions();
        if let Some((kept, repo)) = kept.clone()
            && let Some(description) = blocking(move || kept.read(&repo)).await?
        {
            return Ok(description);
        }
        let description = match &self.source {
            Source::Hub(hub) => self.describe_hub(hub).await?,
            Source::Folder | Source::Cache { .. } => {
                let folder = self.folder.clone();
                let files = blocking(move || folder_weight_files(&folder)).await?;
                let files = files.map_err(|error| self.name_what_is_not_cached(error))?;
                Description { config: self.config_bytes().await?, files }
            }
        };
        let Some((kept, repo)) = kept else { return Ok(description) };
        let (description, written) = blocking(move || {
            let written = kept.write(&repo, &description);
            (description, written)
        })
        .await?;
        if let Err(error) = written {
            tracing::warn!(%error, "cannot keep what the model consists of; the hub is asked again next time");
        }
        Ok(description)
    }

    fn descriptions(&self) -> Option<(Descriptions, RepoRef)> {
        let settings = match &self.source {
            Source::Hub(hub) => &hub.remote.settings,
            Source::Cache { settings, .. } => settings,
            Source::Folder => return None,
        };
        let ModelRef::Repo(repo) = &self.model else { return None };
        Some((Descriptions::new(settings.descriptions.as_deref()?), repo.clone()))
    }

    async fn describe_hub(&self, hub: &HubSource) -> Result<Description, HubError> {
        hub.fetch_metadata(&self.folder, is_descriptive, &|_| {}).await?;
        let model = self.model.to_string();
        let listed = hub.files().await?.iter().map(|file| file.name.clone());
        let weights = WeightFiles::find(&model, &self.folder, &listed.collect())?;
        let files: Vec<_> = weights.files.iter().map(|file| self.weight_file(hub, file)).collect();
        let files: BTreeMap<_, _> = stream::iter(files).buffered(CONCURRENT_HEADERS).try_collect().await?;
        let description = Description { config: self.config_bytes().await?, files };
        weights.check(&model, &description.weight_index(&model)?)?;
        Ok(description)
    }

    async fn config_bytes(&self) -> Result<Vec<u8>, HubError> {
        let path = self.folder.join(CONFIG_FILE);
        tokio::fs::read(&path).await.map_err(|source| HubError::Disk { action: "read", path, source })
    }

    async fn weight_file(&self, hub: &HubSource, name: &str) -> Result<(String, WeightFile), HubError> {
        let path = self.folder.join(name);
        let here = blocking({
            let path = path.clone();
            move || read_head(&path)
        });
        let file = match here.await? {
            Ok((head, file_bytes)) if parse_head(name, &head, file_bytes).is_ok() => {
                // The cache names what it holds by its ETag.
                let blob = std::fs::canonicalize(&path).ok();
                let etag = blob.and_then(|blob| Some(blob.file_name()?.to_str()?.to_owned())).filter(|etag| etag != name);
                WeightFile::new(name, head, file_bytes, etag)?
            }
            _ => {
                let facts = hub.remote.facts(&hub.commit, name).await?;
                let (head, file_bytes) = read_remote_head(&hub.remote, &hub.commit, name).await?;
                WeightFile::new(name, head, file_bytes, Some(facts.etag))?
            }
        };
        Ok((name.to_owned(), file))
    }

    /// Reads tensors from the hub; None where the hub is not used.
    pub fn ranges(&self) -> Option<TensorRanges<'_>> {
        match &self.source {
            Source::Hub(hub) => Some(TensorRanges::new(&hub.remote, &hub.commit)),
            Source::Folder | Source::Cache { .. } => None,
        }
    }

    /// Makes sure that these weight files are here, whole and verified. Fetches what is missing, resuming what was begun.
    pub async fn fetch_weights(&self, files: &[String], progress: OnProgress<'_>) -> Result<(), HubError> {
        let mut missing = Vec::new();
        for file in files.iter().collect::<BTreeSet<_>>() {
            if !is_weight_file_name(file) {
                return Err(HubError::BadFileName { file: file.chars().take(80).flat_map(char::escape_debug).collect() });
            }
            let path = self.folder.join(file);
            match (blocking(move || read_header(&path)).await?, &self.source) {
                (Ok(header), _) => progress(Progress { file, done_bytes: header.file_bytes, total_bytes: header.file_bytes }),
                (Err(_), Source::Hub(_)) => missing.push(file.as_str()),
                (Err(WeightFileError::Unreadable { .. }), _) => return Err(self.missing(file)),
                (Err(error), _) => return Err(error.into()),
            }
        }
        match &self.source {
            Source::Hub(hub) if !missing.is_empty() => hub.download(&missing, progress).await,
            _ => Ok(()),
        }
    }

    fn at_folder(folder: &Path) -> Result<Self, HubError> {
        let absolute = std::path::absolute(folder);
        let folder = absolute.map_err(|source| HubError::Disk { action: "find", path: folder.to_path_buf(), source })?;
        if !folder.is_dir() {
            return Err(JsonFileError::Missing { path: folder.join(CONFIG_FILE) }.into());
        }
        Ok(Self { model: ModelRef::Folder(folder.clone()), folder, source: Source::Folder })
    }

    fn in_cache(repo: &RepoRef, settings: &HubSettings) -> Result<Self, HubError> {
        let cache = RepoCache::new(&settings.cache_dir, repo);
        let folder = cache.cached_commit(repo).map(|commit| (cache.snapshot(&commit), commit));
        let Some((folder, commit)) = folder.filter(|(folder, _)| folder.is_dir()) else {
            return Err(not_cached(repo, settings, CONFIG_FILE));
        };
        let source = Source::Cache { repo: repo.clone(), settings: Box::new(settings.clone()) };
        Ok(Self { model: ModelRef::Repo(repo.at_commit(&commit)), folder, source })
    }

    /// `self` without the hub, if nothing is missing; otherwise `reason`, for which the hub cannot be used.
    async fn fall_back_to_cache(self, reason: HubError) -> Result<Self, HubError> {
        let source = match self.source {
            Source::Hub(hub) => Source::Cache { repo: hub.remote.repo, settings: Box::new(hub.remote.settings) },
            source => source,
        };
        let cached = Self { source, ..self };
        if cached.file(CONFIG_FILE).is_none() || cached.weight_index().await.is_err() {
            return Err(reason);
        }
        tracing::warn!(%reason, model = %cached.model, "using the cached copy of the model");
        Ok(cached)
    }

    fn name_what_is_not_cached(&self, error: HubError) -> HubError {
        match (&self.source, error) {
            (Source::Cache { repo, settings }, HubError::Index(IndexError::FileMissing { file, .. })) => not_cached(repo, settings, &file),
            (Source::Cache { repo, settings }, HubError::Index(IndexError::NoWeights { .. })) => {
                not_cached(repo, settings, "model.safetensors")
            }
            (_, error) => error,
        }
    }

    pub(crate) fn missing(&self, file: &str) -> HubError {
        match &self.source {
            Source::Cache { repo, settings } => not_cached(repo, settings, file),
            _ if file == CONFIG_FILE => JsonFileError::Missing { path: self.folder.join(file) }.into(),
            _ => IndexError::FileMissing { model: self.model.to_string(), file: file.to_owned() }.into(),
        }
    }
}

impl HubSource {
    async fn files(&self) -> Result<&[RemoteFile], HubError> {
        Ok(self.files.get_or_try_init(|| self.remote.list(&self.commit)).await?)
    }

    async fn fetch_metadata(&self, folder: &Path, wanted: fn(&str) -> bool, progress: OnProgress<'_>) -> Result<(), HubError> {
        let files = self.files().await?;
        if !files.iter().any(|file| file.name == CONFIG_FILE) {
            return Err(self.without_config(files));
        }
        let is_here = |file: &RemoteFile| std::fs::metadata(folder.join(&file.name)).is_ok_and(|found| found.len() == file.bytes);
        let (mut small, mut large) = (Vec::new(), Vec::new());
        for file in files.iter().filter(|file| wanted(&file.name)) {
            if is_here(file) {
                progress(Progress { file: &file.name, done_bytes: file.bytes, total_bytes: file.bytes });
            } else if file.large {
                large.push(file.name.as_str());
            } else {
                small.push(self.fetch_small(file, progress));
            }
        }
        stream::iter(small).buffer_unordered(CONCURRENT_REQUESTS).try_collect::<()>().await?;
        self.download(&large, progress).await?;
        self.remote.cache.write_ref(&self.remote.repo, &self.commit)
    }

    async fn fetch_small(&self, file: &RemoteFile, progress: OnProgress<'_>) -> Result<(), HubError> {
        self.remote.cache.forget(&self.commit, &file.name);
        self.remote.fetch_small(&self.commit, file).await?;
        progress(Progress { file: &file.name, done_bytes: file.bytes, total_bytes: file.bytes });
        Ok(())
    }

    async fn download(&self, files: &[&str], progress: OnProgress<'_>) -> Result<(), HubError> {
        let facts: Vec<_> = files.iter().map(|file| self.remote.facts(&self.commit, file)).collect();
        let facts: Vec<_> = stream::iter(facts).buffered(CONCURRENT_REQUESTS).try_collect().await?;
        let downloads: Vec<_> = files
            .iter()
            .zip(&facts)
            .map(|(file, facts)| Download { remote: &self.remote, commit: &self.commit, file, facts, progress })
            .collect();
        let needed_bytes = downloads.iter().map(Download::missing_bytes).sum();
        check_free_space(&self.remote.settings.cache_dir, needed_bytes)?;
        let running: Vec<_> = downloads.iter().map(Download::run).collect();
        stream::iter(running).buffer_unordered(CONCURRENT_REQUESTS).try_collect::<()>().await
    }

    fn without_config(&self, files: &[RemoteFile]) -> HubError {
        let gguf = files.iter().find(|file| file.name.ends_with(".gguf"));
        let holds = gguf.map_or_else(String::new, |file| format!(", only GGUF files such as {}", file.name));
        HubError::FileNotInRepo { repo: self.remote.repo.id(), file: CONFIG_FILE.to_owned(), holds }
    }
}

fn is_metadata(name: &str) -> bool {
    METADATA_FILES.contains(&name) || name.starts_with("chat_template.") || name.ends_with(".safetensors.index.json")
}

/// What is needed to know which tensors there are.
fn is_descriptive(name: &str) -> bool {
    name == CONFIG_FILE || name == WEIGHT_INDEX_FILE
}

fn not_cached(repo: &RepoRef, settings: &HubSettings, file: &str) -> HubError {
    HubError::Offline { repo: repo.to_string(), file: file.to_owned(), cache_dir: settings.cache_dir.clone() }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, HubError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| HubError::Task { cause: error.to_string() })
}

//! A data set's repository at one commit: which files it has, and how they get here.

use crate::{
    OnProgress, Progress,
    cache::{RepoCache, check_free_space},
    download::Download,
    error::HubError,
    index::is_plain_file_name,
    model_ref::{RepoKind, RepoRef},
    remote::{Remote, RemoteFile},
    settings::HubSettings,
};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// The files in the top folder of a data set on the hub; those that are cached, where the hub is not used.
#[derive(Debug)]
pub struct DatasetRepo {
    repo: RepoRef,
    folder: PathBuf,
    files: Vec<String>,
    /// Paths of those in folders, which cannot be fetched.
    deeper: Vec<String>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Hub {
        remote: Box<Remote>,
        commit: String,
        listed: Vec<RemoteFile>,
    },
    /// HF_HUB_OFFLINE, or the hub is out of reach.
    Cache {
        cache_dir: PathBuf,
        /// Endpoint and cause, when it is out of reach.
        away: Option<(String, String)>,
    },
}

impl DatasetRepo {
    /// Asks the hub what there is. Without the hub, and when it is out of reach, what is cached is all there is.
    ///
    /// # Errors
    /// A repository that does not exist or may not be read, and a hub that is out of reach when nothing is cached.
    pub async fn open(repo: &RepoRef, settings: &HubSettings) -> Result<Self, HubError> {
        if settings.offline {
            let offline = || HubError::Offline { repo: repo.to_string(), file: "data".to_owned(), cache_dir: settings.cache_dir.clone() };
            return Self::in_cache(repo, settings, None).ok_or_else(offline);
        }
        match Self::on_hub(repo, settings).await {
            Err(error) if error.hub_is_away() => {
                let away = (settings.endpoint.clone(), error.to_string());
                let Some(cached) = Self::in_cache(repo, settings, Some(away)) else { return Err(error) };
                tracing::warn!(reason = %error, data = %repo, "using the cached copy of the data set");
                Ok(cached)
            }
            opened => opened,
        }
    }

    async fn on_hub(repo: &RepoRef, settings: &HubSettings) -> Result<Self, HubError> {
        let remote = Remote::of_kind(RepoKind::Dataset, repo, settings)?;
        let commit = match repo.commit() {
            Some(commit) => commit.to_owned(),
            None => remote.resolve_commit().await?,
        };
        let (listed, deeper): (Vec<_>, Vec<_>) =
            remote.tree(&commit, true).await?.into_iter().partition(|file| is_plain_file_name(&file.name));
        let files = listed.iter().map(|file| file.name.clone()).collect();
        let deeper = deeper.into_iter().map(|file| file.name).collect();
        let folder = remote.cache.snapshot(&commit);
        Ok(Self { repo: repo.clone(), folder, files, deeper, source: Source::Hub { remote: Box::new(remote), commit, listed } })
    }

    fn in_cache(repo: &RepoRef, settings: &HubSettings, away: Option<(String, String)>) -> Option<Self> {
        let cache = RepoCache::of_kind(RepoKind::Dataset, &settings.cache_dir, repo);
        let folder = cache.snapshot(&cache.cached_commit(repo)?);
        let entries = std::fs::read_dir(&folder).ok()?.filter_map(Result::ok);
        let names = entries.filter(|entry| entry.path().is_file()).map(|entry| entry.file_name());
        let mut files: Vec<String> = names.map(OsString::into_string).filter_map(Result::ok).collect();
        files.sort();
        let source = Source::Cache { cache_dir: settings.cache_dir.clone(), away };
        Some(Self { repo: repo.clone(), folder, files, deeper: Vec::new(), source })
    }

    /// Names in the top folder.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Paths of files in other folders; only those in the top folder can be fetched.
    pub fn deeper(&self) -> &[String] {
        &self.deeper
    }

    /// Why `file` is not among [`files`](Self::files), when the hub may have it all the same.
    pub fn not_cached(&self, file: &str) -> Option<HubError> {
        match &self.source {
            Source::Hub { .. } => None,
            Source::Cache { away: Some((endpoint, cause)), .. } => {
                Some(HubError::Unreachable { endpoint: endpoint.clone(), cause: cause.clone() })
            }
            Source::Cache { cache_dir, away: None } => {
                Some(HubError::Offline { repo: self.repo.to_string(), file: file.to_owned(), cache_dir: cache_dir.clone() })
            }
        }
    }

    /// Paths of these files, which are fetched where they are not here yet, and verified.
    ///
    /// # Errors
    /// Names that are not in [`files`](Self::files), and all that can go wrong on the network and the disk.
    pub async fn fetch(&self, names: &[String], progress: OnProgress<'_>) -> Result<Vec<PathBuf>, HubError> {
        for name in names {
            if !self.files.contains(name) {
                return Err(HubError::FileNotInRepo { repo: self.repo.id(), file: name.clone(), holds: String::new() });
            }
            self.fetch_one(name, progress).await?;
        }
        if let Source::Hub { remote, commit, .. } = &self.source {
            remote.cache.write_ref(&self.repo, commit)?;
        }
        Ok(names.iter().map(|name| self.folder.join(name)).collect())
    }

    async fn fetch_one(&self, name: &str, progress: OnProgress<'_>) -> Result<(), HubError> {
        let path = self.folder.join(name);
        let Source::Hub { remote, commit, listed } = &self.source else { return Ok(()) };
        let Some(file) = listed.iter().find(|file| file.name == name) else { return Ok(()) };
        if !is_here(&path, file) {
            // Also of files that lie in git: hf-hub does not resume.
            let facts = remote.facts(commit, name).await?;
            let download = Download { remote, commit, file: name, facts: &facts, progress };
            check_free_space(&remote.settings.cache_dir, download.missing_bytes())?;
            download.run().await?;
        }
        progress(Progress { file: name, done_bytes: file.bytes, total_bytes: file.bytes });
        Ok(())
    }
}

fn is_here(path: &Path, file: &RemoteFile) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.len() == file.bytes)
}

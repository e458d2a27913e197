//! The cache layout that all Hugging Face tools share: blobs by ETag, snapshots as links to them, references and locks.
//!
//! `models--owner--name/{blobs/ETAG, blobs/ETAG.incomplete, snapshots/COMMIT/FILE -> ../../blobs/ETAG, refs/main}`, and
//! `.locks/models--owner--name/ETAG.lock` beside it; `datasets--owner--name` for data sets.

use crate::{
    error::HubError,
    model_ref::{RepoKind, RepoRef, is_commit},
};
use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const LOCK_POLL: Duration = Duration::from_millis(200);

/// The part of the cache that belongs to one repository.
#[derive(Debug, Clone)]
pub(crate) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(cache_dir: &Path, repo: &RepoRef) -> Self {
        Self::of_kind(RepoKind::Model, cache_dir, repo)
    }

    pub(crate) fn of_kind(kind: RepoKind, cache_dir: &Path, repo: &RepoRef) -> Self {
        let folder = format!("{}--{}--{}", kind.plural(), repo.owner(), repo.name());
        Self { root: cache_dir.join(&folder), locks: cache_dir.join(".locks").join(folder) }
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    pub(crate) fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The commit that this revision had when it was last fetched.
    pub(crate) fn cached_commit(&self, repo: &RepoRef) -> Option<String> {
        if let Some(commit) = repo.commit() {
            return Some(commit.to_owned());
        }
        let text = fs::read_to_string(self.root.join("refs").join(repo.revision())).ok()?;
        let commit = text.trim();
        is_commit(commit).then(|| commit.to_owned())
    }

    pub(crate) fn write_ref(&self, repo: &RepoRef, commit: &str) -> Result<(), HubError> {
        if repo.commit().is_some() {
            return Ok(());
        }
        let path = self.root.join("refs").join(repo.revision());
        create_parent(&path)?;
        fs::write(&path, commit).map_err(|source| HubError::Disk { action: "write", path, source })
    }

    /// Makes `file` of the snapshot a link to the blob. The blob must be complete.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        let target = Path::new("../../blobs").join(etag);
        create_parent(&pointer)?;
        if fs::read_link(&pointer).is_ok_and(|found| found == target) {
            return Ok(());
        }
        // Renamed into place, so that another process never sees the snapshot without the file.
        let fresh = pointer.with_file_name(format!(".{file}.{}", std::process::id()));
        let linked = std::os::unix::fs::symlink(&target, &fresh).and_then(|()| fs::rename(&fresh, &pointer));
        linked.map_err(|source| HubError::Disk { action: "link", path: pointer, source })
    }

    /// Removes a file of the snapshot together with its content, so that the next attempt starts afresh.
    pub(crate) fn forget(&self, commit: &str, file: &str) {
        let pointer = self.snapshot(commit).join(file);
        if let Ok(blob) = fs::canonicalize(&pointer) {
            let _ = fs::remove_file(blob);
        }
        let _ = fs::remove_file(pointer);
    }

    /// Waits until no other process fetches this blob; `waiting` is called with the bytes that the other one has so far.
    ///
    /// # Errors
    /// [`HubError::Locked`] when those bytes have not changed for `patience`.
    pub(crate) async fn lock(&self, etag: &str, patience: Duration, waiting: impl Fn(u64)) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let disk_error = |source| HubError::Disk { action: "lock", path: path.clone(), source };
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(disk_error)?;
        let (mut since, mut last_bytes) = (Instant::now(), 0);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(disk_error(source)),
            }
            let bytes = fs::metadata(self.incomplete(etag)).map_or(0, |metadata| metadata.len());
            if bytes != last_bytes {
                (since, last_bytes) = (Instant::now(), bytes);
                waiting(bytes);
            }
            if since.elapsed() > patience {
                return Err(HubError::Locked { lock: path, waited: since.elapsed() });
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
    }
}

/// Refuses to start a download that cannot end: `needed_bytes` against what is free where the cache is.
pub(crate) fn check_free_space(cache_dir: &Path, needed_bytes: u64) -> Result<(), HubError> {
    let disk_error = |source| HubError::Disk { action: "use", path: cache_dir.to_path_buf(), source };
    fs::create_dir_all(cache_dir).map_err(disk_error)?;
    let free_bytes = free_disk_bytes(cache_dir).map_err(disk_error)?;
    if needed_bytes > free_bytes {
        return Err(HubError::DiskFull { folder: cache_dir.to_path_buf(), needed_bytes, free_bytes });
    }
    Ok(())
}

/// Bytes that may still be written where a folder is.
pub fn free_disk_bytes(folder: &Path) -> std::io::Result<u64> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|source| HubError::Disk { action: "create", path: parent.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn a_reference_remembers_its_commit() {
        let folder = tempfile::tempdir().unwrap();
        let repo: RepoRef = "a/b@refs/pr/1".parse().unwrap();
        let cache = RepoCache::new(folder.path(), &repo);
        assert_eq!(cache.cached_commit(&repo), None);
        cache.write_ref(&repo, COMMIT).unwrap();
        assert_eq!(cache.cached_commit(&repo).as_deref(), Some(COMMIT));
        fs::write(folder.path().join("models--a--b/refs/refs/pr/1"), "../../../etc").unwrap();
        assert_eq!(cache.cached_commit(&repo), None);
    }

    #[test]
    fn a_link_is_replaced_and_forgotten_with_its_blob() {
        let folder = tempfile::tempdir().unwrap();
        let repo: RepoRef = "a/b".parse().unwrap();
        let cache = RepoCache::new(folder.path(), &repo);
        create_parent(&cache.blob("x")).unwrap();
        for etag in ["x", "y", "y"] {
            fs::write(cache.blob(etag), etag).unwrap();
            cache.link(COMMIT, "config.json", etag).unwrap();
            assert_eq!(fs::read_to_string(cache.snapshot(COMMIT).join("config.json")).unwrap(), etag);
        }
        cache.forget(COMMIT, "config.json");
        assert!(!cache.blob("y").exists() && cache.blob("x").exists());
        assert_eq!(fs::read_dir(cache.snapshot(COMMIT)).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_lock_that_makes_no_progress_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(folder.path(), &"a/b".parse().unwrap());
        let held = cache.lock("x", Duration::ZERO, |_| ()).await.unwrap();
        let error = cache.lock("x", Duration::from_millis(1), |_| ()).await.unwrap_err();
        assert!(matches!(&error, HubError::Locked { lock, .. } if lock.ends_with("models--a--b/x.lock")), "{error}");
        drop(held);
        cache.lock("x", Duration::ZERO, |_| ()).await.unwrap();
    }

    #[test]
    fn a_disk_that_is_too_small_is_named() {
        let folder = tempfile::tempdir().unwrap();
        check_free_space(folder.path(), 1).unwrap();
        let error = check_free_space(folder.path(), u64::MAX).unwrap_err();
        assert!(matches!(error, HubError::DiskFull { .. }), "{error}");
    }
}

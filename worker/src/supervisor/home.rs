//! The data folder: the id that makes a worker the same node each time, held by one process at a time.

use mlx_cluster_common::ids::NodeId;
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    path::{Path, PathBuf},
};

const WORKERS_MAX: u32 = 64;
const ID_CHARS: usize = 32;

/// Why a worker has no identity.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    #[error("cannot {action} {path}: {source}; set MLX_CLUSTER_HOME to a folder that you may write to")]
    Disk { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{WORKERS_MAX} workers run with the data folder {home} already: stop some of them")]
    Full { home: PathBuf },
}

/// Who a worker is, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) id: NodeId,
    /// 1 for the first worker on this machine, 2 for another one beside it.
    pub(crate) number: u32,
    _lock: File,
}

/// Takes the first identity of the data folder that no other process has; the folder is made where it is missing.
pub(crate) fn claim(home: &Path) -> Result<Identity, HomeError> {
    for number in 1..=WORKERS_MAX {
        let folder = home.join("workers").join(number.to_string());
        fs::create_dir_all(&folder).map_err(|source| HomeError::Disk { action: "make", path: folder.clone(), source })?;
        if let Some(lock) = try_lock(&folder.join("lock"))? {
            let id = read_or_make_id(&folder.join("id"))?;
            return Ok(Identity { id, number, _lock: lock });
        }
    }
    Err(HomeError::Full { home: home.to_path_buf() })
}

/// Where the worker of this number keeps the tensors of models.
pub(crate) fn models(home: &Path, number: u32) -> PathBuf {
    home.join("workers").join(number.to_string()).join("models")
}

/// Where the worker that is alone on its machine keeps the tensors of models.
pub fn weight_store(home: &Path) -> PathBuf {
    models(home, 1)
}

/// The weight stores of all workers that ran with this data folder, by their numbers.
pub fn weight_stores(home: &Path) -> Vec<(u32, PathBuf)> {
    (1..=WORKERS_MAX).map(|number| (number, models(home, number))).filter(|(_, folder)| folder.is_dir()).collect()
}

/// The lock of this file, which ends with the process; None when another process has it.
pub(crate) fn try_lock(path: &Path) -> Result<Option<File>, HomeError> {
    let disk = |action| move |source| HomeError::Disk { action, path: path.to_path_buf(), source };
    let file = OpenOptions::new().create(true).write(true).truncate(false).open(path).map_err(disk("open"))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(source)) => Err(disk("lock")(source)),
    }
}

/// Replaces a file as a whole, so that no reader sees half of it.
pub(crate) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&temporary, content)?;
    fs::rename(&temporary, path)
}

fn read_or_make_id(path: &Path) -> Result<NodeId, HomeError> {
    let kept = fs::read_to_string(path).unwrap_or_default();
    let kept = kept.trim();
    if kept.len() == ID_CHARS && kept.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(kept.into());
    }
    let id = uuid::Uuid::new_v4().simple().to_string();
    write_whole(path, id.as_bytes()).map_err(|source| HomeError::Disk { action: "write", path: path.to_path_buf(), source })?;
    Ok(NodeId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_lasts_and_is_held_once() {
        let home = tempfile::tempdir().expect("a folder");
        let first = claim(home.path()).expect("an identity");
        let second = claim(home.path()).expect("another one");
        assert_eq!((first.number, second.number), (1, 2));
        assert_ne!(first.id, second.id);
        let id = first.id.clone();
        drop(first);
        let again = claim(home.path()).expect("the first one");
        assert_eq!((again.number, again.id), (1, id));
    }

    #[test]
    fn a_damaged_id_is_replaced() {
        let home = tempfile::tempdir().expect("a folder");
        let id = claim(home.path()).expect("an identity").id;
        fs::write(home.path().join("workers/1/id"), "x").expect("written");
        let other = claim(home.path()).expect("an identity").id;
        assert!(other != id && other.0.len() == ID_CHARS);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let message = claim(file.path()).expect_err("not a folder").to_string();
        assert!(message.contains("MLX_CLUSTER_HOME") && message.contains("workers/1"), "{message}");
    }
}

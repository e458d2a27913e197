//! Files that are whole or not there: written aside, forced to the disk, and renamed.

use mlx_cluster_common::units::Bytes;
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

/// What the disk refuses.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot {action} {}: {source}", path.display())]
    Disk { action: &'static str, path: PathBuf, source: io::Error },
    #[error("the disk of {} is full: {} are needed, {} are free; free some space, then go on", folder.display(), Bytes(*needed_bytes), Bytes(*free_bytes))]
    DiskFull { folder: PathBuf, needed_bytes: u64, free_bytes: u64 },
}

impl FileError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::DiskFull { .. })
    }

    /// Whether what was to be read is not there.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Disk { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// A full disk that was noticed while writing, as one that was noticed before: `needed_bytes` are those of all that was to be written.
    pub(super) fn of_writing(self, folder: &Path, needed_bytes: u64) -> Self {
        match self {
            Self::Disk { source, .. } if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                Self::DiskFull { folder: folder.to_path_buf(), needed_bytes, free_bytes: free_bytes(folder).unwrap_or_default() }
            }
            other => other,
        }
    }
}

/// Carries out one operation on the disk.
pub(super) fn attempt<T>(action: &'static str, path: &Path, operation: impl FnOnce() -> io::Result<T>) -> Result<T, FileError> {
    failpoint::check().and_then(|()| operation()).map_err(|source| FileError::Disk { action, path: path.to_path_buf(), source })
}

/// Replaces a file, so that a reader sees the old contents or the new, also after a loss of power.
pub(super) fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    replace(path, contents.len() as u64, |file| file.write_all(contents))
}

/// As [`write_atomically`], with contents of about `bytes` that `write` gives.
pub(super) fn replace(path: &Path, bytes: u64, write: impl FnOnce(&mut Output) -> io::Result<()>) -> Result<(), FileError> {
    let (folder, aside) = (parent(path), aside(path));
    let written = (|| {
        let mut output = Output::create(&aside)?;
        attempt("write", &aside, || write(&mut output))?;
        output.finish()?;
        attempt("rename", &aside, || fs::rename(&aside, path))?;
        sync_folder(folder)
    })();
    written.map_err(|error| {
        // What is left is overwritten the next time.
        let _ = attempt("remove", &aside, || fs::remove_file(&aside));
        error.of_writing(folder, bytes)
    })
}

/// Copies a file, whole or not at all.
pub(super) fn copy_atomically(from: &Path, to: &Path) -> Result<(), FileError> {
    let mut source = attempt("open", from, || File::open(from))?;
    let bytes = attempt("read", from, || source.metadata())?.len();
    replace(to, bytes, |file| io::copy(&mut source, file).map(drop))
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    path: PathBuf,
}

impl Output {
    pub(super) fn create(path: &Path) -> Result<Self, FileError> {
        Ok(Self { file: attempt("create", path, || File::create(path))?, path: path.to_path_buf() })
    }

    /// Forces it to the disk.
    pub(super) fn finish(self) -> Result<(), FileError> {
        attempt("write", &self.path, || self.file.sync_all())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = failpoint::check() {
            // As a full disk does it: a part is written.
            self.file.write_all(&bytes[..bytes.len() / 2])?;
            return Err(error);
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Makes renames and removals in a folder last.
pub(super) fn sync_folder(folder: &Path) -> Result<(), FileError> {
    attempt("write", folder, || File::open(folder).and_then(|folder| folder.sync_all()))
}

/// Makes a folder, and those above it, where they are missing.
pub(super) fn make_folder(folder: &Path) -> Result<(), FileError> {
    if folder.is_dir() {
        return Ok(());
    }
    attempt("make", folder, || fs::create_dir_all(folder))?;
    sync_folder(parent(folder))
}

/// Refuses to begin what cannot end.
pub(super) fn check_free(folder: &Path, needed_bytes: u64) -> Result<(), FileError> {
    let free_bytes = attempt("look at the disk of", folder, || free_bytes(folder))?;
    if needed_bytes > free_bytes {
        return Err(FileError::DiskFull { folder: folder.to_path_buf(), needed_bytes, free_bytes });
    }
    Ok(())
}

fn free_bytes(folder: &Path) -> io::Result<u64> {
    if let Some(free_bytes) = failpoint::free_bytes() {
        return Ok(free_bytes);
    }
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

#[cfg(not(test))]
mod failpoint {
    pub(super) fn check() -> std::io::Result<()> {
        Ok(())
    }

    pub(super) fn free_bytes() -> Option<u64> {
        None
    }
}

/// Where a test makes the disk fail.
#[cfg(test)]
pub(super) mod failpoint {
    use std::{cell::Cell, io};

    /// What happens once so many operations went well.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(in crate::training) enum Failure {
        /// One operation finds the disk full.
        Full,
        /// Nothing reaches the disk any more, as after a kill.
        Killed,
    }

    thread_local! {
        static ARMED: Cell<Option<(u64, Failure)>> = const { Cell::new(None) };
        static REACHED: Cell<bool> = const { Cell::new(false) };
        static FREE: Cell<Option<u64>> = const { Cell::new(None) };
    }

    pub(in crate::training) fn arm(operations: u64, failure: Failure) {
        ARMED.set(Some((operations, failure)));
        REACHED.set(false);
    }

    /// False when the failure was reached.
    pub(in crate::training) fn disarm() -> bool {
        ARMED.set(None);
        !REACHED.get()
    }

    pub(in crate::training) fn set_free_bytes(bytes: Option<u64>) {
        FREE.set(bytes);
    }

    pub(super) fn check() -> io::Result<()> {
        match ARMED.get() {
            Some((0, failure)) => {
                REACHED.set(true);
                match failure {
                    Failure::Killed => Err(io::Error::other("killed")),
                    Failure::Full => {
                        ARMED.set(None);
                        Err(io::ErrorKind::StorageFull.into())
                    }
                }
            }
            Some((left, failure)) => {
                ARMED.set(Some((left - 1, failure)));
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(super) fn free_bytes() -> Option<u64> {
        FREE.get()
    }
}

#[cfg(test)]
mod tests {
    use super::{failpoint::Failure, *};

    #[test]
    fn a_file_is_the_old_one_or_the_new_one_wherever_the_disk_fails() {
        for failure in [Failure::Full, Failure::Killed] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("job.json");
            write_atomically(&path, b"old").unwrap();
            for operations in 0.. {
                failpoint::arm(operations, failure);
                let written = write_atomically(&path, b"the new one");
                let survived = failpoint::disarm();
                let found = fs::read(&path).unwrap();
                assert!(found == b"old" || found == b"the new one", "{failure:?} after {operations}");
                match written {
                    Ok(()) => assert_eq!((found.as_slice(), survived), (b"the new one".as_slice(), true)),
                    Err(error) => assert_eq!(error.is_disk_full(), failure == Failure::Full, "{error}"),
                }
                if survived {
                    assert!(operations > 4, "few operations were checked");
                    break;
                }
                write_atomically(&path, b"old").unwrap();
            }
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_full_disk_is_named_with_what_is_needed_and_free() {
        let folder = tempfile::tempdir().unwrap();
        failpoint::set_free_bytes(Some(2_000_000));
        let refused = check_free(folder.path(), 3_000_000).unwrap_err().to_string();
        failpoint::set_free_bytes(None);
        assert!(refused.contains("3.0 MB are needed, 2.0 MB are free"), "{refused}");
        assert!(check_free(folder.path(), 1).is_ok());
    }
}

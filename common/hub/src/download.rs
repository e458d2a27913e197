//! Fetches one large file into the cache: resumes where an earlier attempt stopped, verifies size and SHA-256, then links it.

use crate::{
    OnProgress, Progress,
    error::HubError,
    range::content_range,
    remote::{FileFacts, Remote},
};
use reqwest::StatusCode;
use sha2::{Digest, Sha256};
use std::{
    io::{Read, SeekFrom},
    path::{Path, PathBuf},
};
use tokio::{
    fs::{File, OpenOptions},
    io::{AsyncSeekExt, AsyncWriteExt},
};

/// Progress is reported once for this many bytes.
const REPORT_BYTES: u64 = 1 << 20;
const HASH_BUFFER_BYTES: usize = 1 << 20;

/// One file of one commit, on its way into the cache.
pub(crate) struct Download<'a> {
    pub(crate) remote: &'a Remote,
    pub(crate) commit: &'a str,
    pub(crate) file: &'a str,
    pub(crate) facts: &'a FileFacts,
    pub(crate) progress: OnProgress<'a>,
}

impl Download<'_> {
    /// Ends with the complete, verified file in the snapshot. Several processes may do this at once; one of them fetches.
    pub(crate) async fn run(&self) -> Result<(), HubError> {
        let cache = &self.remote.cache;
        let etag = &self.facts.etag;
        let lock = cache.lock(etag, self.remote.settings.lock_timeout, |bytes| self.report(bytes)).await?;
        if !self.is_stored() {
            if self.fetch().await? == Outcome::DamagedPart {
                tracing::warn!(file = self.file, "the part that was there did not belong to this file; starting from its first byte");
                self.fetch().await?;
            }
            let (from, to) = (cache.incomplete(etag), cache.blob(etag));
            std::fs::rename(&from, &to).map_err(|source| HubError::Disk { action: "rename", path: from, source })?;
        }
        self.report(self.facts.bytes);
        drop(lock);
        cache.link(self.commit, self.file, etag)
    }

    /// Bytes that still have to come over the network.
    pub(crate) fn missing_bytes(&self) -> u64 {
        if self.is_stored() {
            return 0;
        }
        let part = std::fs::metadata(self.remote.cache.incomplete(&self.facts.etag)).map_or(0, |metadata| metadata.len());
        self.facts.bytes.saturating_sub(part)
    }

    fn is_stored(&self) -> bool {
        std::fs::metadata(self.remote.cache.blob(&self.facts.etag)).is_ok_and(|metadata| metadata.len() == self.facts.bytes)
    }

    /// Completes the `.incomplete` file. Fails for good only after several attempts in a row that brought no new byte.
    async fn fetch(&self) -> Result<Outcome, HubError> {
        let mut part = Part::open(self.remote.cache.incomplete(&self.facts.etag), self.facts.bytes).await?;
        let resumed = part.bytes > 0;
        let (mut failures, mut best) = (0, part.bytes);
        while part.bytes < self.facts.bytes {
            let Err(error) = self.attempt(&mut part).await else { continue };
            if part.bytes > best {
                (failures, best) = (0, part.bytes);
            }
            failures += 1;
            if !error.is_transient() || failures > self.remote.settings.retries {
                part.close().await?;
                return Err(self.give_up(error, best));
            }
            tracing::debug!(file = self.file, bytes = part.bytes, %error, failures, "trying again");
            tokio::time::sleep(self.remote.delay(&error, failures)).await;
        }
        let (path, got) = part.close().await?;
        match self.facts.sha256() {
            Some(expected) if !expected.eq_ignore_ascii_case(&got) => {
                let _ = std::fs::remove_file(path);
                if resumed {
                    return Ok(Outcome::DamagedPart);
                }
                Err(HubError::WrongHash { file: self.file.to_owned(), got, expected: expected.to_owned() })
            }
            _ => Ok(Outcome::Complete),
        }
    }

    /// One request: appends what comes to the part. Ok when the file is complete.
    async fn attempt(&self, part: &mut Part) -> Result<(), HubError> {
        let range = (part.bytes > 0).then(|| format!("bytes={}-", part.bytes));
        let mut response = self.remote.get(self.commit, self.file, range).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let expected = Some((part.bytes, self.facts.bytes));
                if content_range(&response) != expected {
                    return Err(self.wrong_size(content_range(&response).map_or(0, |(_, total)| total)));
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                part.restart().await?;
                return Err(self.interrupted(0, "the hub refused to continue; starting over"));
            }
            _ => {
                if response.content_length().is_some_and(|total| total != self.facts.bytes) {
                    return Err(self.wrong_size(response.content_length().unwrap_or(0)));
                }
                part.restart().await?;
            }
        }
        let mut reported = part.bytes;
        self.report(part.bytes);
        while part.bytes < self.facts.bytes {
            let chunk = response.chunk().await.map_err(|error| self.remote.transport_error(&error))?;
            let Some(chunk) = chunk else { return Err(self.interrupted(part.bytes, "the connection was closed")) };
            if chunk.len() as u64 > self.facts.bytes - part.bytes {
                return Err(self.wrong_size(part.bytes + chunk.len() as u64));
            }
            part.append(&chunk).await?;
            if part.bytes - reported >= REPORT_BYTES {
                reported = part.bytes;
                self.report(part.bytes);
            }
        }
        Ok(())
    }

    fn report(&self, done_bytes: u64) {
        (self.progress)(Progress { file: self.file, done_bytes, total_bytes: self.facts.bytes });
    }

    fn wrong_size(&self, got_bytes: u64) -> HubError {
        HubError::WrongSize { file: self.file.to_owned(), got_bytes, expected_bytes: self.facts.bytes }
    }

    fn interrupted(&self, done_bytes: u64, cause: &str) -> HubError {
        HubError::Interrupted { file: self.file.to_owned(), done_bytes, total_bytes: self.facts.bytes, cause: cause.to_owned() }
    }

    fn give_up(&self, error: HubError, done_bytes: u64) -> HubError {
        match error {
            HubError::Unreachable { cause, .. } if done_bytes > 0 => self.interrupted(done_bytes, &cause),
            HubError::Unavailable { status, .. } if done_bytes > 0 => self.interrupted(done_bytes, &format!("status {status}")),
            error => error,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Complete,
    /// The bytes of an earlier attempt were wrong; they are gone now.
    DamagedPart,
}

/// The `.incomplete` file: a prefix of the wanted file, with the hash of that prefix.
struct Part {
    path: PathBuf,
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Part {
    /// Opens or creates the file, and hashes what it has; a file longer than `limit_bytes` is emptied.
    async fn open(path: PathBuf, limit_bytes: u64) -> Result<Self, HubError> {
        let opened = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).await;
        let file = opened.map_err(|source| HubError::Disk { action: "open", path: path.clone(), source })?;
        let to_hash = path.clone();
        let hashed = tokio::task::spawn_blocking(move || hash_file(&to_hash)).await;
        let hashed = hashed.map_err(|error| HubError::Task { cause: error.to_string() })?;
        let (hash, bytes) = hashed.map_err(|source| HubError::Disk { action: "read", path: path.clone(), source })?;
        let mut part = Self { path, file, hash, bytes };
        if bytes > limit_bytes {
            part.restart().await?;
        }
        part.seek_to_end().await?;
        Ok(part)
    }

    async fn append(&mut self, chunk: &[u8]) -> Result<(), HubError> {
        self.file.write_all(chunk).await.map_err(|source| self.disk_error("write", source))?;
        self.hash.update(chunk);
        self.bytes += chunk.len() as u64;
        Ok(())
    }

    async fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).await.map_err(|source| self.disk_error("empty", source))?;
        (self.hash, self.bytes) = (Sha256::new(), 0);
        self.seek_to_end().await
    }

    async fn seek_to_end(&mut self) -> Result<(), HubError> {
        let sought = self.file.seek(SeekFrom::Start(self.bytes)).await;
        sought.map(|_| ()).map_err(|source| self.disk_error("seek in", source))
    }

    /// Brings everything to the disk; returns the path and the SHA-256 of the content in hexadecimal.
    async fn close(mut self) -> Result<(PathBuf, String), HubError> {
        self.file.flush().await.map_err(|source| self.disk_error("write", source))?;
        self.file.sync_all().await.map_err(|source| self.disk_error("write", source))?;
        let hash = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((self.path, hash))
    }

    fn disk_error(&self, action: &'static str, source: std::io::Error) -> HubError {
        HubError::Disk { action, path: self.path.clone(), source }
    }
}

fn hash_file(path: &Path) -> std::io::Result<(Sha256, u64)> {
    let mut file = std::fs::File::open(path)?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; HASH_BUFFER_BYTES];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok((hash, bytes));
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
    }
}

//! Writes one batch: data into the `.part`, and for each tensor that is complete a line into the `.digests`.

use super::{DIGESTS, Digest, PART, WEIGHTS, batch::Batch, batch::hexadecimal};
use crate::{error::HubError, headers::TensorSlot};
use sha2::{Digest as _, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

const HASH_BUFFER_BYTES: usize = 1 << 20;

/// A batch on its way into the store.
#[derive(Debug)]
pub struct BatchWriter {
    batch: Batch,
    part: PathBuf,
    data: File,
    journal: File,
    head_bytes: u64,
    /// Of the tensors that are complete, in order.
    digests: Vec<Digest>,
    /// Bytes of the tensors that are complete.
    sealed_bytes: u64,
    /// Of the tensor that is being written.
    tail_bytes: u64,
    tail_hash: Sha256,
}

/// A tensor is not what its sender says it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tensor `{tensor}` arrived damaged: its SHA-256 is {got}, the sender says {expected}")]
pub struct Damaged {
    pub tensor: String,
    pub got: String,
    pub expected: String,
}

impl BatchWriter {
    /// Takes up what is there of the batch, as far as it agrees with its digests.
    pub(super) fn open(folder: &Path, batch: Batch) -> Result<Self, HubError> {
        let part = folder.join(format!("{}.{PART}", batch.stem()));
        Self::open_at(&part, batch).map_err(|source| HubError::Disk { action: "write", path: part, source })
    }

    fn open_at(part: &Path, batch: Batch) -> io::Result<Self> {
        let open = |path: &Path| File::options().create(true).truncate(false).read(true).write(true).open(path);
        let (mut data, mut journal) = (open(part)?, open(&part.with_extension(DIGESTS))?);
        let head = batch.head();
        let mut found = Vec::new();
        (&mut data).take(head.len() as u64).read_to_end(&mut found)?;
        if found != head {
            data.set_len(0)?;
            data.seek(SeekFrom::Start(0))?;
            data.write_all(&head)?;
            journal.set_len(0)?;
        }
        let mut lines = String::new();
        if journal.read_to_string(&mut lines).is_err() {
            lines.clear();
        }
        let mut writer = Self {
            batch,
            part: part.to_path_buf(),
            data,
            journal,
            head_bytes: head.len() as u64,
            digests: Vec::new(),
            sealed_bytes: 0,
            tail_bytes: 0,
            tail_hash: Sha256::new(),
        };
        writer.take_up(&lines)?;
        Ok(writer)
    }

    /// Compares the data that is there with what was noted about it, and hashes what comes after.
    fn take_up(&mut self, lines: &str) -> io::Result<()> {
        let mut noted_bytes = 0;
        // A line without its end was being written when the process ended.
        let whole = lines.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let tensors = self.batch.tensors.clone();
        for (line, (name, slot)) in whole.zip(&tensors) {
            let (hash, bytes) = self.hash_on(slot.bytes)?;
            let digest: Digest = hash.clone().finalize().into();
            if bytes < slot.bytes || line != journal_line(&digest, slot.bytes, name) {
                break;
            }
            noted_bytes += line.len() as u64;
            self.digests.push(digest);
            self.sealed_bytes += bytes;
            self.data.seek(SeekFrom::Start(self.head_bytes + self.sealed_bytes))?;
        }
        self.data.seek(SeekFrom::Start(self.head_bytes + self.sealed_bytes))?;
        if let Some((_, slot)) = tensors.get(self.digests.len()) {
            let noted = lines.matches('\n').count() > self.digests.len();
            // A tensor that was noted and does not agree begins anew; what nobody vouched for yet goes on.
            (self.tail_hash, self.tail_bytes) = if noted { (Sha256::new(), 0) } else { self.hash_on(slot.bytes)? };
        }
        self.data.set_len(self.head_bytes + self.position())?;
        self.data.seek(SeekFrom::Start(self.head_bytes + self.position()))?;
        self.journal.set_len(noted_bytes)?;
        self.journal.seek(SeekFrom::Start(noted_bytes))?;
        Ok(())
    }

    /// The hash of up to `limit` bytes from where the file stands.
    fn hash_on(&mut self, limit: u64) -> io::Result<(Sha256, u64)> {
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        let mut buffer = vec![0; HASH_BUFFER_BYTES.min(limit as usize)];
        while bytes < limit {
            let room = buffer.len().min((limit - bytes) as usize);
            let count = self.data.read(&mut buffer[..room])?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            bytes += count as u64;
        }
        Ok((hash, bytes))
    }

    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The tensors that are not complete yet.
    pub fn remaining(&self) -> &[(String, TensorSlot)] {
        &self.batch.tensors[self.digests.len()..]
    }

    /// Bytes of the tensors that are complete.
    pub fn sealed_bytes(&self) -> u64 {
        self.sealed_bytes
    }

    /// Bytes of the batch that are there.
    pub fn position(&self) -> u64 {
        self.sealed_bytes + self.tail_bytes
    }

    pub fn is_complete(&self) -> bool {
        self.digests.len() == self.batch.tensors.len()
    }

    /// Bytes that the current tensor still needs; None when there is none.
    pub fn missing_of_tensor(&self) -> Option<u64> {
        let (_, slot) = self.batch.tensors.get(self.digests.len())?;
        Some(slot.bytes - self.tail_bytes)
    }

    /// Appends to the current tensor as much as belongs to it, and says how much that was.
    pub fn append(&mut self, data: &[u8]) -> Result<usize, HubError> {
        let room = self.missing_of_tensor().unwrap_or(0);
        let data = &data[..data.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
        self.data.write_all(data).map_err(|source| self.disk("write", source))?;
        self.tail_hash.update(data);
        self.tail_bytes += data.len() as u64;
        Ok(data.len())
    }

    /// Notes that the current tensor, all of whose bytes are there, is complete. Where it does not have the `expected` digest it is thrown
    /// away.
    pub fn seal(&mut self, expected: Option<&Digest>) -> Result<Result<(), Damaged>, HubError> {
        let Some((name, slot)) = self.batch.tensors.get(self.digests.len()) else { return Ok(Ok(())) };
        let digest: Digest = std::mem::take(&mut self.tail_hash).finalize().into();
        let line = journal_line(&digest, slot.bytes, name);
        if expected.is_some_and(|expected| *expected != digest) {
            let expected = expected.map(hexadecimal).unwrap_or_default();
            let damaged = Damaged { tensor: name.clone(), got: hexadecimal(&digest), expected };
            self.restart_tensor()?;
            return Ok(Err(damaged));
        }
        self.sealed_bytes += slot.bytes;
        self.tail_bytes = 0;
        self.journal.write_all(line.as_bytes()).map_err(|source| self.disk("write", source))?;
        self.digests.push(digest);
        Ok(Ok(()))
    }

    /// Appends what comes from a source whose bytes need no digest: tensor after tensor, as long as there are some.
    pub(super) fn append_all(&mut self, mut data: &[u8]) -> Result<(), HubError> {
        loop {
            data = &data[self.append(data)?..];
            if self.missing_of_tensor() != Some(0) {
                return Ok(());
            }
            // Without an expected digest nothing can differ from it.
            drop(self.seal(None)?);
        }
    }

    fn restart_tensor(&mut self) -> Result<(), HubError> {
        (self.tail_bytes, self.tail_hash) = (0, Sha256::new());
        let start = self.head_bytes + self.sealed_bytes;
        let emptied = self.data.set_len(start).and_then(|()| self.data.seek(SeekFrom::Start(start)));
        emptied.map(|_| ()).map_err(|source| self.disk("empty", source))
    }

    /// Brings the complete batch to the disk, under its final name.
    pub fn finish(self) -> Result<(), HubError> {
        let (from, to) = (self.part.clone(), self.part.with_extension(WEIGHTS));
        let synced = self.journal.sync_all().and_then(|()| self.data.sync_all());
        synced.and_then(|()| fs::rename(&from, &to)).map_err(|source| self.disk("write", source))
    }

    /// Ends the batch with those of its tensors that are complete; none leave nothing.
    pub fn settle(mut self) -> Result<(), HubError> {
        if self.is_complete() {
            return self.finish();
        }
        let old = [self.part.clone(), self.part.with_extension(DIGESTS)];
        let removed = |source| HubError::Disk { action: "remove", path: self.part.clone(), source };
        if self.digests.is_empty() {
            return old.iter().try_for_each(fs::remove_file).map_err(removed);
        }
        let count = self.digests.len();
        let kept = Batch { file: self.batch.file.clone(), tensors: self.batch.tensors[..count].to_vec() };
        let fresh = self.part.with_file_name(format!("{}.{WEIGHTS}", kept.stem()));
        let head = kept.head_of(count, self.head_bytes as usize);
        let written = self.data.set_len(self.head_bytes + self.sealed_bytes);
        let written = written.and_then(|()| self.data.seek(SeekFrom::Start(0))).and_then(|_| self.data.write_all(&head));
        let written = written.and_then(|()| self.data.sync_all()).and_then(|()| self.journal.sync_all());
        let written = written.and_then(|()| fs::rename(&old[1], fresh.with_extension(DIGESTS)));
        written.and_then(|()| fs::rename(&old[0], fresh)).map_err(|source| self.disk("write", source))
    }

    fn disk(&self, action: &'static str, source: io::Error) -> HubError {
        HubError::Disk { action, path: self.part.clone(), source }
    }
}

/// `SHA-256 BYTES NAME`; names hold no line breaks once they are escaped.
pub(super) fn journal_line(digest: &Digest, bytes: u64, name: &str) -> String {
    format!("{} {bytes} {}\n", hexadecimal(digest), name.escape_debug())
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;

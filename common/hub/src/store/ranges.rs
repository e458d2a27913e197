//! Fills batches from the hub, by ranges of bytes of the published files.

use super::writer::BatchWriter;
use crate::{description::WeightFile, error::HubError, range::whole_content_range, remote::Remote};
use reqwest::{Response, StatusCode};
use std::ops::Range;

/// Reads tensors of a model at a commit from the hub.
#[derive(Debug)]
pub struct TensorRanges<'a> {
    remote: &'a Remote,
    commit: &'a str,
}

impl<'a> TensorRanges<'a> {
    pub(crate) fn new(remote: &'a Remote, commit: &'a str) -> Self {
        Self { remote, commit }
    }

    /// Completes a batch of `file`, resuming where it stands. `progress` is told how many bytes came. Fails for good only after several
    /// attempts in a row that brought no new byte.
    pub async fn fill(&self, writer: &mut BatchWriter, file: &WeightFile, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<(), HubError> {
        self.check_unchanged(&writer.batch().file, file).await?;
        let (mut failures, mut best) = (0, writer.position());
        writer.append_all(&[])?;
        while !writer.is_complete() {
            let Err(error) = self.attempt(writer, file, progress).await else { continue };
            if writer.position() > best {
                (failures, best) = (0, writer.position());
            }
            failures += 1;
            if !error.is_transient() || failures > self.remote.settings.retries {
                return Err(error);
            }
            tracing::debug!(file = writer.batch().file, %error, failures, "trying again");
            tokio::time::sleep(self.remote.delay(&error, failures)).await;
        }
        Ok(())
    }

    /// A commit cannot change; a hub, or a mirror, that says otherwise is not believed.
    async fn check_unchanged(&self, name: &str, file: &WeightFile) -> Result<(), HubError> {
        let facts = self.remote.facts(self.commit, name).await?;
        let same = file.etag.as_ref().is_none_or(|etag| *etag == facts.etag) && facts.bytes == file.header.file_bytes;
        if same { Ok(()) } else { Err(self.changed(name)) }
    }

    /// One request: appends what comes.
    async fn attempt(&self, writer: &mut BatchWriter, file: &WeightFile, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<(), HubError> {
        let Some(range) = writer.batch().next_range(writer.position()) else {
            return writer.append_all(&[]);
        };
        let name = writer.batch().file.clone();
        let asked = format!("bytes={}-{}", range.start, range.end - 1);
        let mut response = self.remote.get(self.commit, &name, Some(asked)).await?;
        self.check_range(&response, &name, &range, file.header.file_bytes)?;
        let mut left = range.end - range.start;
        while left > 0 {
            let chunk = response.chunk().await.map_err(|error| self.remote.transport_error(&error))?;
            let Some(chunk) = chunk else {
                let (done_bytes, total_bytes) = (writer.position(), writer.batch().bytes());
                return Err(HubError::Interrupted { file: name, done_bytes, total_bytes, cause: "the connection was closed".to_owned() });
            };
            if chunk.len() as u64 > left {
                return Err(self.wrong_range(&name, &range, "more bytes than were asked for"));
            }
            left -= chunk.len() as u64;
            writer.append_all(&chunk)?;
            progress(chunk.len() as u64);
        }
        Ok(())
    }

    /// Only exactly what was asked for is taken.
    fn check_range(&self, response: &Response, name: &str, range: &Range<u64>, file_bytes: u64) -> Result<(), HubError> {
        match (response.status(), whole_content_range(response)) {
            (StatusCode::PARTIAL_CONTENT, Some((got, total))) if got == *range && total == file_bytes => {
                let length = response.content_length().unwrap_or(range.end - range.start);
                let fits = length == range.end - range.start;
                if fits { Ok(()) } else { Err(self.wrong_range(name, range, &format!("{length} bytes"))) }
            }
            (StatusCode::PARTIAL_CONTENT, Some((_, total))) if total != file_bytes => Err(self.changed(name)),
            (StatusCode::PARTIAL_CONTENT, Some((got, _))) => {
                Err(self.wrong_range(name, range, &format!("bytes {} to {}", got.start, got.end - 1)))
            }
            (StatusCode::PARTIAL_CONTENT, None) => Err(self.wrong_range(name, range, "a range that it does not name")),
            (StatusCode::RANGE_NOT_SATISFIABLE, _) => Err(self.wrong_range(name, range, "that there are none")),
            _ if range.start == 0 && range.end == file_bytes => Ok(()),
            _ => Err(HubError::RangesIgnored { endpoint: self.remote.settings.endpoint.clone(), file: name.to_owned() }),
        }
    }

    fn wrong_range(&self, name: &str, range: &Range<u64>, got: &str) -> HubError {
        HubError::WrongRange {
            endpoint: self.remote.settings.endpoint.clone(),
            file: name.to_owned(),
            first: range.start,
            last: range.end - 1,
            got: got.to_owned(),
        }
    }

    fn changed(&self, name: &str) -> HubError {
        HubError::Changed { repo: self.remote.repo.id(), commit: self.commit.to_owned(), file: name.to_owned() }
    }
}

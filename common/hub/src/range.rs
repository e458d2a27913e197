//! Headers of weight files that are still on the hub, by HTTP ranges, so that a plan needs none of the weights.

use crate::{
    error::HubError,
    headers::{LENGTH_BYTES, header_length},
    remote::Remote,
};
use reqwest::{Response, StatusCode, header::CONTENT_RANGE};
use std::ops::Range;

/// Enough for the length, and to tell what a file is that is none of ours; not so much that bytes of tensors come too.
const FIRST_BYTES: u64 = 64;

/// What lies before the data of one file at a commit, and the length of the file.
pub(crate) async fn read_remote_head(remote: &Remote, commit: &str, file: &str) -> Result<(Vec<u8>, u64), HubError> {
    let (mut bytes, file_bytes) = remote.retrying(|| fetch(remote, commit, file, 0, FIRST_BYTES)).await?;
    let needed = LENGTH_BYTES + header_length(file, &bytes, file_bytes)?;
    let have = bytes.len() as u64;
    if have < needed {
        let (rest, _) = remote.retrying(|| fetch(remote, commit, file, have, needed - have)).await?;
        bytes.extend_from_slice(&rest);
    }
    bytes.truncate(needed as usize);
    if (bytes.len() as u64) < needed {
        return Err(interrupted(file, bytes.len() as u64, needed, "the hub sent less than it was asked for"));
    }
    Ok((bytes, file_bytes))
}

/// Up to `count` bytes from `start`, and the length of the whole file.
async fn fetch(remote: &Remote, commit: &str, file: &str, start: u64, count: u64) -> Result<(Vec<u8>, u64), HubError> {
    let range = format!("bytes={start}-{}", start + count - 1);
    let response = remote.get(commit, file, Some(range)).await?;
    let not_a_hub = |cause: &str| HubError::NotAHub { endpoint: remote.settings.endpoint.clone(), cause: format!("{cause} of {file}") };
    let (skip, file_bytes) = match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let (from, total) = content_range(&response).ok_or_else(|| not_a_hub("an unusable range"))?;
            if from != start {
                return Err(not_a_hub("another range"));
            }
            (0, total)
        }
        StatusCode::RANGE_NOT_SATISFIABLE => return Ok((Vec::new(), start)),
        // A mirror that ignores ranges sends everything; reading stops where enough has come.
        _ => (start, response.content_length().ok_or_else(|| not_a_hub("no length"))?),
    };
    let bytes = read_part(remote, response, skip, count.min(file_bytes.saturating_sub(start))).await?;
    Ok((bytes, file_bytes))
}

async fn read_part(remote: &Remote, mut response: Response, skip: u64, count: u64) -> Result<Vec<u8>, HubError> {
    let mut to_skip = skip;
    let mut bytes = Vec::with_capacity(count as usize);
    while (bytes.len() as u64) < count {
        let Some(chunk) = response.chunk().await.map_err(|error| remote.transport_error(&error))? else { break };
        let skipped = to_skip.min(chunk.len() as u64);
        to_skip -= skipped;
        let wanted = (chunk.len() as u64 - skipped).min(count - bytes.len() as u64);
        bytes.extend_from_slice(&chunk[skipped as usize..(skipped + wanted) as usize]);
    }
    Ok(bytes)
}

/// First byte and total length out of `Content-Range: bytes 0-7/100`.
pub(crate) fn content_range(response: &Response) -> Option<(u64, u64)> {
    let (range, total) = whole_content_range(response)?;
    Some((range.start, total))
}

/// The bytes and the total length out of `Content-Range: bytes 0-7/100`.
pub(crate) fn whole_content_range(response: &Response) -> Option<(Range<u64>, u64)> {
    let value = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = value.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let end = last.parse::<u64>().ok()?.checked_add(1)?;
    Some((first.parse().ok()?..end, total.parse().ok()?))
}

fn interrupted(file: &str, done_bytes: u64, total_bytes: u64, cause: &str) -> HubError {
    HubError::Interrupted { file: file.to_owned(), done_bytes, total_bytes, cause: cause.to_owned() }
}

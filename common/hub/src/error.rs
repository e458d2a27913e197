//! What can go wrong between a model's name and its files on disk, each with the next step to take.

use crate::{headers::WeightFileError, index::IndexError, json_file::JsonFileError, model_ref::RepoKind};
use mlx_cluster_common::units::Bytes;
use std::{path::PathBuf, time::Duration};

/// Why the files of a model could not be found or fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    WeightFile(#[from] WeightFileError),
    #[error(
        "{file} of {repo} is not in the cache {cache_dir}, and HF_HUB_OFFLINE forbids fetching it: unset HF_HUB_OFFLINE once to download it, or copy the files into a folder and give that folder"
    )]
    Offline { repo: String, file: String, cache_dir: PathBuf },
    #[error("the hub {endpoint} cannot be reached ({cause}): check the network, point HF_ENDPOINT to a mirror, or give a folder")]
    Unreachable { endpoint: String, cause: String },
    #[error("the hub {endpoint} answers {status} for {what}: try again later")]
    Unavailable { endpoint: String, status: u16, what: String },
    #[error("the hub {endpoint} limits requests{}: try again later, or set HF_TOKEN for a higher limit", wait(retry_after))]
    RateLimited { endpoint: String, retry_after: Option<Duration> },
    #[error("{endpoint} does not answer like a hub ({cause}): check HF_ENDPOINT, or whether the network wants a log-in first")]
    NotAHub { endpoint: String, cause: String },
    #[error("the hub {endpoint} refuses {what} with status {status}: {message}")]
    Refused { endpoint: String, what: String, status: u16, message: String },
    #[error("the hub {endpoint} shows no {kind} `{repo}`, and there is no folder of that name: check the spelling; {}", private(*has_token))]
    RepoNotFound { endpoint: String, kind: RepoKind, repo: String, has_token: bool },
    #[error("`{repo}` is gated: accept its licence at {endpoint}/{repo}, {}", gated(*has_token))]
    Gated { endpoint: String, repo: String, has_token: bool },
    #[error(
        "the hub {endpoint} rejects the token: set HF_TOKEN to a valid one from {endpoint}/settings/tokens, or unset it for public models"
    )]
    BadToken { endpoint: String },
    #[error("`{repo}` has no branch, tag or commit `{revision}`: see {endpoint}/{repo}/commits/main")]
    RevisionNotFound { endpoint: String, repo: String, revision: String },
    #[error("`{repo}` holds no {file}{holds}: give a model in Hugging Face's layout with safetensors weights")]
    FileNotInRepo { repo: String, file: String, holds: String },
    #[error("`{file}` is not a plain .safetensors file name")]
    BadFileName { file: String },
    #[error("the download of {file} stopped at {} of {} ({cause}): start again, it continues where it stopped", Bytes(*done_bytes), Bytes(*total_bytes))]
    Interrupted { file: String, done_bytes: u64, total_bytes: u64, cause: String },
    #[error("{file} arrived with {got_bytes} bytes instead of {expected_bytes} and was thrown away: try again")]
    WrongSize { file: String, got_bytes: u64, expected_bytes: u64 },
    #[error(
        "{file} arrived damaged and was thrown away (SHA-256 {got} instead of {expected}): try again; if it happens again, check HF_ENDPOINT, proxies and the disk"
    )]
    WrongHash { file: String, got: String, expected: String },
    #[error("{} more are needed in {folder}, {} are free: free some space, or set HF_HOME (for the shared cache) or MLX_CLUSTER_HOME (for the weight store) to a larger disk", Bytes(*needed_bytes), Bytes(*free_bytes))]
    DiskFull { folder: PathBuf, needed_bytes: u64, free_bytes: u64 },
    #[error("another process has been holding {lock} for {}s without progress: stop it, or remove that file", waited.as_secs())]
    Locked { lock: PathBuf, waited: Duration },
    #[error(
        "the hub {endpoint} was asked for bytes {first} to {last} of {file} and sends {got}: try again; if it happens again, check HF_ENDPOINT and proxies"
    )]
    WrongRange { endpoint: String, file: String, first: u64, last: u64, got: String },
    #[error(
        "the hub {endpoint} sends the whole of {file} where a part was asked for: point HF_ENDPOINT to a hub that honours ranges, or fetch the whole model with `mlx-cluster models pull`"
    )]
    RangesIgnored { endpoint: String, file: String },
    #[error(
        "{file} of {repo} is not what it was when its download began, though commit {commit} is the same: check HF_ENDPOINT, then `mlx-cluster models remove {repo}` and start again"
    )]
    Changed { repo: String, commit: String, file: String },
    #[error("tensor `{tensor}` is not in the weight store: start again, it is fetched then")]
    TensorNotHere { tensor: String },
    #[error("cannot {action} {path}: {source}")]
    Disk { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("the hub client cannot be set up for HF_ENDPOINT={endpoint}: {cause}")]
    BadEndpoint { endpoint: String, cause: String },
    #[error("an internal task failed: {cause}; please report this")]
    Task { cause: String },
}

/// The coarse cause, from which an exit code or an HTTP status follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubErrorKind {
    /// What was asked for does not exist.
    NotFound,
    /// A file is missing, damaged or of the wrong kind.
    BadFile,
    Network,
    /// A token is missing or has too few rights.
    Access,
    /// Disk space, permissions, locks.
    Resources,
}

impl HubError {
    pub fn kind(&self) -> HubErrorKind {
        match self {
            Self::RepoNotFound { .. } | Self::RevisionNotFound { .. } | Self::FileNotInRepo { .. } => HubErrorKind::NotFound,
            Self::Json(_) | Self::Index(_) | Self::WeightFile(_) | Self::BadFileName { .. } | Self::Changed { .. } => HubErrorKind::BadFile,
            Self::Gated { .. } | Self::BadToken { .. } => HubErrorKind::Access,
            Self::DiskFull { .. } | Self::Locked { .. } | Self::Disk { .. } | Self::Task { .. } | Self::TensorNotHere { .. } => {
                HubErrorKind::Resources
            }
            Self::Offline { .. }
            | Self::Unreachable { .. }
            | Self::Unavailable { .. }
            | Self::RateLimited { .. }
            | Self::NotAHub { .. }
            | Self::Refused { .. }
            | Self::Interrupted { .. }
            | Self::WrongSize { .. }
            | Self::WrongRange { .. }
            | Self::RangesIgnored { .. }
            | Self::WrongHash { .. }
            | Self::BadEndpoint { .. } => HubErrorKind::Network,
        }
    }

    /// Whether the hub does not answer as it should, for reasons that say nothing about the model.
    pub(crate) fn hub_is_away(&self) -> bool {
        matches!(self, Self::NotAHub { .. }) || self.is_transient()
    }

    /// Whether the same request may succeed a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Unavailable { .. }
                | Self::RateLimited { .. }
                | Self::Interrupted { .. }
                | Self::WrongRange { .. }
                | Self::RangesIgnored { .. }
        )
    }
}

fn wait(retry_after: &Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |delay| format!(" for {} s", delay.as_secs()))
}

fn private(has_token: bool) -> &'static str {
    if has_token { "if it is private, set HF_TOKEN to a token that may read it" } else { "if it is private, set HF_TOKEN" }
}

fn gated(has_token: bool) -> &'static str {
    if has_token { "with the account that HF_TOKEN belongs to" } else { "then set HF_TOKEN to a token of that account" }
}

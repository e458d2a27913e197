//! `state.json` of a checkpoint: how far the job was, what it was made with, and what its files are.

use super::CheckpointError;
use mlx_cluster_common::training::TrainingConfig;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// How far a job was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointState {
    /// Batches done. The next one is the data's position, too.
    pub iteration: u64,
    /// Updates of the parameters done.
    pub updates: u64,
    /// Targets that counted in the losses of reports so far.
    pub trained_tokens: u64,
    pub since_report: SinceReport,
    pub seed: u32,
    /// Of the examples that are trained on.
    pub data_fingerprint: String,
    pub config: TrainingConfig,
}

/// Sums since the last report, so that the next one says what it would have said.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SinceReport {
    /// Of the batches' mean losses.
    pub losses: f64,
    /// Targets that counted.
    pub tokens: u64,
    pub steps: u64,
    /// Of training, without evaluations.
    pub seconds: f64,
    /// Of those, how many the engines waited for each other.
    pub waiting_seconds: f64,
}

impl CheckpointState {
    /// Refuses to go on where other numbers would come out.
    pub fn check_config(&self, config: &TrainingConfig) -> Result<(), CheckpointError> {
        self.refuse(config.differences(&self.config))
    }

    /// As [`Self::check_config`], for the data, by [`DataSet::fingerprint`](crate::training::data::DataSet::fingerprint).
    pub fn check_data(&self, fingerprint: &str) -> Result<(), CheckpointError> {
        let same = self.data_fingerprint == fingerprint;
        self.refuse(if same { Vec::new() } else { vec!["the training examples are not those that it was made with".into()] })
    }

    fn refuse(&self, differences: Vec<String>) -> Result<(), CheckpointError> {
        match differences.is_empty() {
            true => Ok(()),
            false => Err(CheckpointError::Different { iteration: self.iteration, differences }),
        }
    }
}

/// What a file of the checkpoint must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileDigest {
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

/// What is sealed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Contents {
    pub(super) state: CheckpointState,
    /// By name.
    pub(super) files: BTreeMap<String, FileDigest>,
}

/// The file: its contents, and their SHA-256 as they stand there.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    sha256: String,
    contents: Box<RawValue>,
}

impl Contents {
    pub(super) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let contents = RawValue::from_string(serde_json::to_string_pretty(self)?)?;
        serde_json::to_vec(&Sealed { sha256: hex(&Sha256::digest(contents.get())), contents })
    }

    /// None when it is not what was written.
    pub(super) fn from_json(json: &[u8]) -> Option<Self> {
        let sealed: Sealed = serde_json::from_slice(json).ok()?;
        let is_whole = hex(&Sha256::digest(sealed.contents.get())) == sealed.sha256;
        is_whole.then(|| serde_json::from_str(sealed.contents.get()).ok())?
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

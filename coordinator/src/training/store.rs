//! The folder of jobs: `jobs/<id>/` under the coordinator's home, with `job.json` and all that a job leaves.

use super::{
    checkpoint::{CheckpointError, Checkpoints},
    events::{EventLog, JobEvent},
    files::{FileError, attempt, make_folder, write_atomically},
};
use mlx_cluster_common::training::{TrainStrategy, TrainingConfig};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

/// Hexadecimal digits of an id that are drawn.
const DRAWN_DIGITS: usize = 6;

/// What a job is called: the day on which it was started, and six digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(String);

impl JobId {
    /// None for what cannot be an id, a path for one.
    pub fn parse(text: &str) -> Option<Self> {
        let is_good = !text.is_empty() && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        is_good.then(|| Self(text.to_owned()))
    }

    fn draw() -> Self {
        let drawn = uuid::Uuid::new_v4().simple().to_string();
        Self(format!("{}-{}", chrono::Local::now().format("%Y%m%d"), &drawn[..DRAWN_DIGITS]))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// Where a job stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum JobState {
    /// Others are before it.
    Queued,
    Running,
    /// It can be resumed.
    Stopped {
        cause: String,
    },
    Finished,
    /// It can be resumed once the cause is dealt with.
    Failed {
        cause: String,
    },
}

impl JobState {
    pub fn name(&self) -> &'static str {
        match self {
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Stopped { .. } => "stopped",
            JobState::Finished => "finished",
            JobState::Failed { .. } => "failed",
        }
    }

    /// Whether something is still to happen without anybody asking.
    pub fn is_active(&self) -> bool {
        matches!(self, JobState::Queued | JobState::Running)
    }

    pub fn cause(&self) -> Option<&str> {
        match self {
            JobState::Stopped { cause } | JobState::Failed { cause } => Some(cause),
            _ => None,
        }
    }
}

/// What `job.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    pub id: JobId,
    #[serde(flatten)]
    pub state: JobState,
    /// Unix seconds.
    pub created: u64,
    /// Nanoseconds after them: several jobs can be made in one second, and run in their order.
    #[serde(default)]
    pub created_ns: u32,
    /// Batches done, as of the last report.
    pub iteration: u64,
    pub strategy: TrainStrategy,
    /// Layers of each stage of a pipeline, as told.
    #[serde(default)]
    pub split: Option<Vec<u32>>,
    /// The checkpoint's weights with a new optimizer.
    pub warm_start: bool,
    /// Rows of a micro-batch in the first plan. Later plans keep to it, so that sums are made in the same order and bits stay the same.
    #[serde(default)]
    pub micro_rows: Option<u32>,
    /// How it was spread last, for people.
    pub plan: Option<String>,
    /// Of the examples that it is trained on, once they are read.
    pub data_fingerprint: Option<String>,
    pub config: TrainingConfig,
}

impl JobRecord {
    /// By age, the oldest first.
    fn order(&self) -> (u64, u32, &JobId) {
        (self.created, self.created_ns, &self.id)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("{} is not the record of a job: {cause}", path.display())]
    BadRecord { path: PathBuf, cause: serde_json::Error },
}

/// All jobs under a home. Everything here blocks on the disk.
#[derive(Debug, Clone)]
pub struct JobStore {
    folder: PathBuf,
}

impl JobStore {
    pub fn open(home: &Path) -> Result<Self, StoreError> {
        let folder = home.join("jobs");
        make_folder(&folder)?;
        Ok(Self { folder })
    }

    /// A new job, queued.
    pub fn create(
        &self,
        config: TrainingConfig,
        strategy: TrainStrategy,
        split: Option<Vec<u32>>,
    ) -> Result<(JobFolder, JobRecord), StoreError> {
        let (id, path) = loop {
            let id = JobId::draw();
            let path = self.folder.join(id.as_str());
            match attempt("make", &path, || fs::create_dir(&path)) {
                Err(FileError::Disk { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
                made => break (id, made.map(|()| path)?),
            }
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let record = JobRecord {
            id,
            state: JobState::Queued,
            created: since.as_secs(),
            created_ns: since.subsec_nanos(),
            iteration: 0,
            strategy,
            split,
            warm_start: false,
            micro_rows: None,
            plan: None,
            data_fingerprint: None,
            config,
        };
        let folder = JobFolder { path };
        folder.write(&record)?;
        Ok((folder, record))
    }

    /// None when there is no such job.
    pub fn folder(&self, id: &JobId) -> Option<JobFolder> {
        let path = self.folder.join(id.as_str());
        path.join(RECORD_FILE).is_file().then_some(JobFolder { path })
    }

    /// The oldest first. What cannot be read is left out, with a line in the log.
    pub fn list(&self) -> Result<Vec<JobRecord>, StoreError> {
        let entries = || fs::read_dir(&self.folder)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
        let names = attempt("list", &self.folder, entries)?;
        let folders = names.iter().filter_map(|name| self.folder(&JobId::parse(name.to_str()?)?));
        let read = |folder: JobFolder| folder.read().inspect_err(|error| tracing::warn!(%error, "a job is left out")).ok();
        let mut records: Vec<JobRecord> = folders.filter_map(read).collect();
        records.sort_by(|a, b| a.order().cmp(&b.order()));
        Ok(records)
    }

    /// Marks jobs whose coordinator is gone as stopped, and tells so; those that another coordinator of this home runs are left alone.
    pub fn adopt(&self) -> Result<(), StoreError> {
        for mut record in self.list()?.into_iter().filter(|record| record.state.is_active()) {
            let Some(folder) = self.folder(&record.id) else { continue };
            let Some(_lock) = folder.lock()? else { continue };
            record.state = JobState::Stopped { cause: "the coordinator ended".into() };
            folder.write(&record)?;
            EventLog::open(folder.path())?.report(JobEvent::Ended { state: record.state, iteration: record.iteration });
        }
        Ok(())
    }
}

const RECORD_FILE: &str = "job.json";

/// The folder of one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFolder {
    path: PathBuf,
}

/// Held by the coordinator that runs a job; let go when it ends in any way.
#[derive(Debug)]
pub struct JobLock {
    _file: File,
}

impl JobFolder {
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn read(&self) -> Result<JobRecord, StoreError> {
        let path = self.path.join(RECORD_FILE);
        let json = attempt("read", &path, || fs::read(&path))?;
        serde_json::from_slice(&json).map_err(|cause| StoreError::BadRecord { path, cause })
    }

    pub fn write(&self, record: &JobRecord) -> Result<(), StoreError> {
        let path = self.path.join(RECORD_FILE);
        let json = attempt("write", &path, || Ok(serde_json::to_vec_pretty(record)?))?;
        Ok(write_atomically(&path, &json)?)
    }

    pub fn checkpoints(&self) -> Result<Checkpoints, CheckpointError> {
        Checkpoints::open(&self.path)
    }

    /// None while another coordinator runs the job.
    pub fn lock(&self) -> Result<Option<JobLock>, StoreError> {
        let path = self.path.join("lock");
        let file = attempt("open", &path, || File::create(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(JobLock { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(FileError::Disk { action: "lock", path, source }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::{
        checkpoint::tests::config,
        files::failpoint::{self, Failure},
    };
    use serde_json::json;

    fn store() -> (tempfile::TempDir, JobStore) {
        let home = tempfile::tempdir().unwrap();
        let store = JobStore::open(home.path()).unwrap();
        (home, store)
    }

    fn create(store: &JobStore) -> (JobFolder, JobRecord) {
        store.create(config(json!({"iters": 7})), TrainStrategy::Pipeline, Some(vec![3, 1])).unwrap()
    }

    #[test]
    fn jobs_come_back_as_they_were_written() {
        let (home, store) = store();
        let (folder, mut record) = create(&store);
        assert_eq!((folder.read().unwrap(), record.state.name()), (record.clone(), "queued"));
        record.state = JobState::Failed { cause: "NaN".into() };
        record.iteration = 5;
        record.plan = Some("two stages".into());
        folder.write(&record).unwrap();
        let (_, other) = create(&store);
        assert_eq!(JobStore::open(home.path()).unwrap().list().unwrap(), [record.clone(), other], "in the order in which they were made");
        assert_eq!(store.folder(&record.id), Some(folder));
        let json: serde_json::Value =
            serde_json::from_slice(&fs::read(home.path().join("jobs").join(record.id.as_str()).join("job.json")).unwrap()).unwrap();
        assert_eq!((&json["state"], &json["cause"], &json["config"]["iters"]), (&json!("failed"), &json!("NaN"), &json!(7)));
    }

    #[test]
    fn ids_are_short_and_no_paths() {
        let id = JobId::draw();
        assert_eq!(id.as_str().len(), 15);
        assert_eq!(JobId::parse(id.as_str()), Some(id));
        for bad in ["", "..", "../x", "a/b", ".", "a.b", "é", &"a".repeat(65)] {
            assert_eq!(JobId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn jobs_of_a_coordinator_that_is_gone_are_stopped_and_those_of_another_run_on() {
        let (_home, store) = store();
        let (gone, mut record) = create(&store);
        record.state = JobState::Running;
        gone.write(&record).unwrap();
        let (alive, mut record) = create(&store);
        record.state = JobState::Running;
        alive.write(&record).unwrap();
        let lock = alive.lock().unwrap();
        assert!(lock.is_some() && alive.lock().unwrap().is_none());
        let (finished, mut record) = create(&store);
        record.state = JobState::Finished;
        finished.write(&record).unwrap();
        store.adopt().unwrap();
        assert_eq!(gone.read().unwrap().state, JobState::Stopped { cause: "the coordinator ended".into() });
        assert_eq!(alive.read().unwrap().state, JobState::Running);
        assert_eq!(finished.read().unwrap().state, JobState::Finished);
        drop(lock);
        assert!(alive.lock().unwrap().is_some());
    }

    #[test]
    fn a_damaged_record_hides_no_other_job() {
        let (_home, store) = store();
        let (damaged, _) = create(&store);
        let (_, good) = create(&store);
        fs::write(damaged.path().join(RECORD_FILE), "{\"id\": ").unwrap();
        assert_eq!(store.list().unwrap(), [good]);
        assert!(damaged.read().unwrap_err().to_string().contains("is not the record of a job"));
    }

    #[test]
    fn a_record_is_whole_when_the_disk_fails() {
        let (_home, store) = store();
        let (folder, before) = create(&store);
        let after = JobRecord { iteration: 9, ..before.clone() };
        for operations in 0..16 {
            failpoint::arm(operations, Failure::Killed);
            let _ = folder.write(&after);
            failpoint::disarm();
            let found = folder.read().unwrap();
            assert!(found == before || found == after);
        }
        assert_eq!(folder.read().unwrap(), after);
    }
}

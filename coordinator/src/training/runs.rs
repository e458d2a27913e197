//! The seam between a job and what runs it: what a runner is given, what it reports, and how it can end.

use super::{
    checkpoint::Checkpoints,
    events::{EventLog, JobEvent},
    files::FileError,
    metrics::{Metrics, Others},
    reports::{TestReport, TrainReport, ValReport},
    store::{JobFolder, JobRecord, JobState, StoreError},
};
use crate::serving::ServingCommand;
use mlx_cluster_common::ids::InstanceId;
use std::{
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Everything that a runner needs for one run of a job, from its start or resumption to its end.
pub struct RunnerContext {
    /// Of the engines; no other run of this coordinator has the same.
    pub instance: InstanceId,
    /// As it is at the start.
    pub job: JobRecord,
    pub folder: JobFolder,
    pub checkpoints: Checkpoints,
    pub reporter: JobReporter,
    /// The job is to end with a checkpoint, soon.
    pub stop: CancellationToken,
    pub commands: mpsc::Sender<ServingCommand>,
    /// The coordinator's own folder.
    pub home: PathBuf,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// As it was asked to, with a checkpoint.
    Stopped,
    /// In a sentence.
    Failed(String),
}

pub type Run = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// What runs jobs: the engines of a cluster, or a test's script.
pub trait RunJob: Send + Sync + 'static {
    fn run(&self, context: RunnerContext) -> Run;
}

/// Through which a runner says what happens. Cheap to clone. Writes to the disk, little at a time.
#[derive(Debug, Clone)]
pub struct JobReporter {
    folder: JobFolder,
    log: Arc<EventLog>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug)]
struct Shared {
    record: JobRecord,
    /// None until the run knows where it starts from.
    metrics: Option<Metrics>,
}

impl JobReporter {
    pub(super) fn new(folder: JobFolder, record: JobRecord, log: Arc<EventLog>) -> Self {
        Self { folder, log, shared: Arc::new(Mutex::new(Shared { record, metrics: None })) }
    }

    /// The run goes on after `iteration` batches, 0 for a job that begins: what was reported of later ones is cut off. To be called before
    /// the first report, and again whenever the job falls back to a checkpoint.
    pub fn start_at(&self, iteration: u64) -> Result<(), StoreError> {
        let mut shared = self.shared();
        shared.metrics = Some(open_metrics(&self.folder, &shared.record, iteration)?);
        shared.record.iteration = iteration;
        self.folder.write(&shared.record)
    }

    /// The examples are read.
    pub fn data(&self, fingerprint: String) -> Result<(), StoreError> {
        self.change(|record| record.data_fingerprint = Some(fingerprint))
    }

    /// See [`JobRecord::micro_rows`].
    pub fn micro_rows(&self, rows: u32) -> Result<(), StoreError> {
        self.change(|record| record.micro_rows = Some(rows))
    }

    pub fn plan(&self, text: String) -> Result<(), StoreError> {
        self.change(|record| record.plan = Some(text.clone()))?;
        self.log.report(JobEvent::Plan { text });
        Ok(())
    }

    pub fn train(&self, report: TrainReport) -> Result<(), StoreError> {
        let mut shared = self.shared();
        shared.with_metrics(&self.folder, |metrics| metrics.train(&report))?;
        shared.record.iteration = report.iteration;
        drop(shared);
        self.log.report(JobEvent::Train(report));
        Ok(())
    }

    pub fn val(&self, report: ValReport) -> Result<(), StoreError> {
        self.shared().with_metrics(&self.folder, |metrics| metrics.val(&report))?;
        self.log.report(JobEvent::Val(report));
        Ok(())
    }

    pub fn test(&self, report: TestReport) -> Result<(), StoreError> {
        self.shared().with_metrics(&self.folder, |metrics| metrics.test(&report))?;
        self.log.report(JobEvent::Test(report));
        Ok(())
    }

    /// A checkpoint is in its place.
    pub fn saved(&self, iteration: u64) -> Result<(), StoreError> {
        self.change(|record| record.iteration = iteration)?;
        self.log.report(JobEvent::Saved { iteration });
        Ok(())
    }

    pub fn note(&self, text: impl Into<String>) {
        self.log.report(JobEvent::Note { text: text.into() });
    }

    /// `eta` is in seconds.
    pub fn progress(&self, iteration: u64, of: u64, eta: Option<f64>) {
        self.shared().record.iteration = iteration;
        self.log.report(JobEvent::Progress { iteration, of, eta });
    }

    pub fn worker_lost(&self, worker: impl Into<String>, cause: impl Into<String>) {
        self.log.report(JobEvent::WorkerLost { worker: worker.into(), cause: cause.into() });
    }

    /// As it is now, which is newer than what its file says.
    pub fn record(&self) -> JobRecord {
        self.shared().record.clone()
    }

    pub(super) fn running(&self) -> Result<(), StoreError> {
        self.change(|record| record.state = JobState::Running)?;
        self.log.report(JobEvent::State { state: JobState::Running });
        Ok(())
    }

    /// Whatever the disk does, listeners are told.
    pub(super) fn ended(&self, state: JobState) {
        if let Err(error) = self.change(|record| record.state = state.clone()) {
            tracing::warn!(%error, "how a job ended is not written down");
        }
        let iteration = self.shared().record.iteration;
        self.log.report(JobEvent::Ended { state, iteration });
    }

    fn change(&self, change: impl FnOnce(&mut JobRecord)) -> Result<(), StoreError> {
        let mut shared = self.shared();
        change(&mut shared.record);
        self.folder.write(&shared.record)
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// A run that did not say where it starts goes on where the record is.
    fn with_metrics(&mut self, folder: &JobFolder, write: impl FnOnce(&mut Metrics) -> Result<(), FileError>) -> Result<(), FileError> {
        if self.metrics.is_none() {
            self.metrics = Some(open_metrics(folder, &self.record, self.record.iteration)?);
        }
        self.metrics.as_mut().map_or(Ok(()), write)
    }
}

fn open_metrics(folder: &JobFolder, record: &JobRecord, iteration: u64) -> Result<Metrics, FileError> {
    let adapter_path = &record.config.adapter_path;
    // TensorBoard calls a run by its folder.
    let events = record.config.project_name.as_ref().map_or_else(|| adapter_path.clone(), |name| adapter_path.join(name));
    let others = if record.config.train { Others::Replaced } else { Others::Kept };
    let adapter_path = (!adapter_path.as_os_str().is_empty()).then_some(&**adapter_path);
    Metrics::resume(folder.path(), adapter_path, others, iteration, record.config.tensorboard.then_some(&*events))
}

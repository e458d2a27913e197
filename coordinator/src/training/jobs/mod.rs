//! All jobs of a coordinator: started, listed, stopped and resumed; one runs at a time, and the others wait in order.

mod error;
mod owner;
#[cfg(test)]
mod tests;

pub use error::JobError;

use super::{
    events::{EventLog, Listener},
    metrics::METRICS_FILE,
    runs::RunJob,
    store::{JobFolder, JobId, JobRecord, JobState, JobStore, StoreError},
};
use crate::serving::ServingCommand;
use mlx_cluster_common::training::{TrainStrategy, TrainingConfig};
use owner::{Command, Owner};
use serde_json::{Map, Value};
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    fs,
    sync::{mpsc, oneshot},
    task::{JoinHandle, spawn_blocking},
};
use tokio_util::sync::CancellationToken;

const COMMANDS: usize = 16;

/// What the API holds of the jobs. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    store: JobStore,
    commands: mpsc::Sender<Command>,
}

/// What a job is to be started with.
#[derive(Debug, Clone)]
pub struct StartRequest {
    pub config: TrainingConfig,
    pub strategy: TrainStrategy,
    /// Layers of each stage of a pipeline, exactly.
    pub split: Option<Vec<u32>>,
}

#[derive(Debug, Clone, Default)]
pub struct ResumeRequest {
    /// With a new optimizer.
    pub warm_start: bool,
    /// Keys of the config that are to have other values.
    pub changes: Map<String, Value>,
}

/// A job that is queued or runs.
#[derive(Debug, Clone)]
pub struct Started {
    pub record: JobRecord,
    /// The number of its first event from now on.
    pub next_event: u64,
}

/// What jobs are run by and with.
pub struct JobParts {
    pub home: PathBuf,
    pub runner: Box<dyn RunJob>,
    pub commands: mpsc::Sender<ServingCommand>,
}

/// The task that owns the jobs.
pub struct JobsTask {
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl JobsTask {
    /// Stops what runs, with a checkpoint when that takes no longer than `patience`. A job that takes longer is stopped without.
    pub async fn stop(self, patience: Duration) {
        self.stop.cancel();
        let abort = self.task.abort_handle();
        if tokio::time::timeout(patience, self.task).await.is_err() {
            tracing::warn!("a job did not end in time; it goes on from its last checkpoint when it is resumed");
            abort.abort();
        }
    }
}

impl Jobs {
    /// Opens the folder of jobs, and marks those that an earlier coordinator ran as stopped.
    pub fn open(parts: JobParts) -> Result<(Self, JobsTask), StoreError> {
        let store = JobStore::open(&parts.home)?;
        store.adopt()?;
        let (commands, commands_out) = mpsc::channel(COMMANDS);
        let stop = CancellationToken::new();
        let owner = Owner::new(parts, store.clone(), stop.clone());
        let task = tokio::spawn(owner.run(commands_out));
        Ok((Self { store, commands }, JobsTask { task, stop }))
    }

    pub async fn start(&self, request: StartRequest) -> Result<Started, JobError> {
        self.ask(|answer| Command::Start { request: Box::new(request), answer }).await?
    }

    /// Refused where the job could not go on to the same bits as without a stop.
    pub async fn resume(&self, id: &str, request: ResumeRequest) -> Result<Started, JobError> {
        let (id, folder) = self.find(id)?;
        let record = self.show(id.as_str()).await?;
        let record = blocking(move || resumable(&folder, record, &request)).await?;
        self.ask(|answer| Command::Resume { record: Box::new(record), answer }).await?
    }

    /// Asks a job to end with a checkpoint; answered before it has ended. A job that waits is stopped at once.
    pub async fn stop(&self, id: &str) -> Result<JobRecord, JobError> {
        let (id, _) = self.find(id)?;
        self.ask(|answer| Command::Stop { id, answer }).await?
    }

    /// The oldest first.
    pub async fn list(&self) -> Result<Vec<JobRecord>, JobError> {
        let store = self.store.clone();
        let mut records = blocking(move || Ok(store.list()?)).await?;
        for live in self.ask(|answer| Command::Live { answer }).await? {
            records.iter_mut().filter(|record| record.id == live.id).for_each(|record| record.clone_from(&live));
        }
        Ok(records)
    }

    pub async fn show(&self, id: &str) -> Result<JobRecord, JobError> {
        let (id, folder) = self.find(id)?;
        let live = self.ask(|answer| Command::Live { answer }).await?;
        match live.into_iter().find(|live| live.id == id) {
            Some(live) => Ok(live),
            None => blocking(move || Ok(folder.read()?)).await,
        }
    }

    /// The events of a job from `from` on; they end with the job.
    pub async fn follow(&self, id: &str, from: u64) -> Result<Listener, JobError> {
        Ok(self.log(id).await?.follow(from))
    }

    /// The events of a job so far.
    pub async fn past(&self, id: &str, from: u64) -> Result<Listener, JobError> {
        Ok(self.log(id).await?.past(from))
    }

    async fn log(&self, id: &str) -> Result<Arc<EventLog>, JobError> {
        let (id, folder) = self.find(id)?;
        let live = self.ask(|answer| Command::Log { id, answer }).await?;
        match live {
            Some(log) => Ok(log),
            None => blocking(move || Ok(EventLog::open(folder.path()).map_err(StoreError::from)?)).await,
        }
    }

    /// The text of `metrics.jsonl`; empty before the first report.
    pub async fn metrics(&self, id: &str) -> Result<String, JobError> {
        let (_, folder) = self.find(id)?;
        let path = folder.path().join(METRICS_FILE);
        match fs::read_to_string(&path).await {
            Ok(text) => Ok(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(source) => Err(JobError::Metrics { path, source }),
        }
    }

    fn find(&self, id: &str) -> Result<(JobId, JobFolder), JobError> {
        let known = JobId::parse(id).and_then(|id| Some((self.store.folder(&id)?, id)));
        known.map(|(folder, id)| (id, folder)).ok_or_else(|| JobError::NotFound { id: id.to_owned() })
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, JobError> {
        let (answer, answered) = oneshot::channel();
        self.commands.send(command(answer)).await.map_err(|_| JobError::Stopping)?;
        answered.await.map_err(|_| JobError::Stopping)
    }
}

/// The record with which a job goes on.
fn resumable(folder: &JobFolder, record: JobRecord, request: &ResumeRequest) -> Result<JobRecord, JobError> {
    if record.state.is_active() {
        return Err(JobError::Active { id: record.id, state: record.state.name() });
    }
    let mut keys: Map<String, Value> = record.config.clone().into();
    keys.extend(request.changes.clone());
    let config = TrainingConfig::parse(&keys)?;
    let newest = folder.checkpoints().and_then(|checkpoints| checkpoints.newest()).map_err(StoreError::from)?;
    if let Some(checkpoint) = newest.checkpoint {
        let iteration = checkpoint.state.iteration;
        if record.state == JobState::Finished && config.iters <= iteration {
            return Err(JobError::Finished { id: record.id, iteration });
        }
        checkpoint.state.check_config(&config).map_err(JobError::Refused)?;
        if !request.warm_start {
            checkpoint.check_optimizer().map_err(JobError::Refused)?;
        }
    }
    Ok(JobRecord { state: JobState::Queued, warm_start: request.warm_start, config, ..record })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, JobError> + Send + 'static) -> Result<T, JobError> {
    spawn_blocking(work).await.unwrap_or_else(|error| Err(JobError::Task { cause: error.to_string() }))
}

/// A log for a job that is about to run.
fn live_log(folder: &JobFolder) -> Result<Arc<EventLog>, JobError> {
    let log = EventLog::open(folder.path()).map_err(StoreError::from)?;
    log.start();
    Ok(log)
}

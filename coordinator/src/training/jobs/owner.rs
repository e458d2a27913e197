//! The task that owns the jobs: the queue, and the one that runs.

use super::{JobError, JobParts, StartRequest, Started, live_log};
use crate::training::{
    events::{EventLog, JobEvent},
    runs::{JobReporter, Outcome, RunnerContext},
    store::{JobFolder, JobId, JobLock, JobRecord, JobState, JobStore, StoreError},
};
use mlx_cluster_common::ids::InstanceId;
use std::{collections::VecDeque, sync::Arc};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// Jobs that wait for the one that runs.
const WAITING_MAX: usize = 16;

pub(super) enum Command {
    Start {
        request: Box<StartRequest>,
        answer: oneshot::Sender<Result<Started, JobError>>,
    },
    /// A record that was found to be resumable.
    Resume {
        record: Box<JobRecord>,
        answer: oneshot::Sender<Result<Started, JobError>>,
    },
    Stop {
        id: JobId,
        answer: oneshot::Sender<Result<JobRecord, JobError>>,
    },
    /// Those that wait or run, as they are now.
    Live {
        answer: oneshot::Sender<Vec<JobRecord>>,
    },
    Log {
        id: JobId,
        answer: oneshot::Sender<Option<Arc<EventLog>>>,
    },
}

/// A job that waits or runs.
struct Live {
    folder: JobFolder,
    reporter: JobReporter,
    log: Arc<EventLog>,
    /// No other coordinator may run it.
    _lock: JobLock,
}

struct Running {
    job: Live,
    stop: CancellationToken,
    task: JoinHandle<Outcome>,
}

pub(super) struct Owner {
    parts: JobParts,
    store: JobStore,
    stop: CancellationToken,
    waiting: VecDeque<Live>,
    running: Option<Running>,
    /// The number of the next run's engines.
    next: InstanceId,
}

impl Owner {
    pub(super) fn new(parts: JobParts, store: JobStore, stop: CancellationToken) -> Self {
        let next = InstanceId(InstanceId::SERVED.0 + 1);
        Self { parts, store, stop, waiting: VecDeque::new(), running: None, next }
    }

    /// Until it is told to stop, or nobody can ask any more.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            self.run_next();
            tokio::select! {
                () = self.stop.cancelled() => break,
                command = commands.recv() => match command {
                    Some(command) => self.obey(command),
                    None => break,
                },
                ended = ended(&mut self.running) => self.finish(ended, "it was asked to"),
            }
        }
        drop(commands);
        for job in self.waiting.drain(..) {
            job.reporter.ended(JobState::Stopped { cause: COORDINATOR_STOPPED.into() });
        }
        if let Some(running) = &mut self.running {
            running.stop.cancel();
            let outcome = ended(&mut self.running).await;
            self.finish(outcome, COORDINATOR_STOPPED);
        }
    }

    fn obey(&mut self, command: Command) {
        // Who asked may be gone; what was asked for is done all the same.
        match command {
            Command::Start { request, answer } => drop(answer.send(self.start(*request))),
            Command::Resume { record, answer } => drop(answer.send(self.resume(*record))),
            Command::Stop { id, answer } => drop(answer.send(self.stop(&id))),
            Command::Live { answer } => drop(answer.send(self.live().map(|job| job.reporter.record()).collect())),
            Command::Log { id, answer } => {
                let log = self.live().find(|job| job.reporter.record().id == id).map(|job| Arc::clone(&job.log));
                drop(answer.send(log));
            }
        }
    }

    fn live(&self) -> impl Iterator<Item = &Live> {
        self.running.iter().map(|running| &running.job).chain(&self.waiting)
    }

    fn start(&mut self, request: StartRequest) -> Result<Started, JobError> {
        self.check_room()?;
        let (folder, record) = self.store.create(request.config, request.strategy, request.split)?;
        self.enqueue(folder, record)
    }

    fn resume(&mut self, record: JobRecord) -> Result<Started, JobError> {
        self.check_room()?;
        if let Some(live) = self.live().map(|job| job.reporter.record()).find(|live| live.id == record.id) {
            return Err(JobError::Active { id: live.id, state: live.state.name() });
        }
        let folder = self.store.folder(&record.id).ok_or_else(|| JobError::NotFound { id: record.id.to_string() })?;
        self.enqueue(folder, record)
    }

    fn check_room(&self) -> Result<(), JobError> {
        match self.waiting.len() {
            waiting if waiting >= WAITING_MAX => Err(JobError::TooMany { waiting }),
            _ => Ok(()),
        }
    }

    fn enqueue(&mut self, folder: JobFolder, record: JobRecord) -> Result<Started, JobError> {
        let lock = folder.lock()?.ok_or_else(|| JobError::Elsewhere { id: record.id.clone() })?;
        folder.write(&record)?;
        let log = live_log(&folder)?;
        let next_event = log.next();
        log.report(JobEvent::State { state: JobState::Queued });
        let reporter = JobReporter::new(folder.clone(), record.clone(), Arc::clone(&log));
        self.waiting.push_back(Live { folder, reporter, log, _lock: lock });
        Ok(Started { record, next_event })
    }

    fn stop(&mut self, id: &JobId) -> Result<JobRecord, JobError> {
        if let Some(running) = self.running.as_ref().filter(|running| running.job.reporter.record().id == *id) {
            running.stop.cancel();
            return Ok(running.job.reporter.record());
        }
        if let Some(place) = self.waiting.iter().position(|job| job.reporter.record().id == *id)
            && let Some(job) = self.waiting.remove(place)
        {
            job.reporter.ended(JobState::Stopped { cause: "it was asked to before its turn".into() });
            return Ok(job.reporter.record());
        }
        let folder = self.store.folder(id).ok_or_else(|| JobError::NotFound { id: id.to_string() })?;
        let state = folder.read()?.state;
        Err(if state.is_active() {
            JobError::Elsewhere { id: id.clone() }
        } else {
            JobError::NotActive { id: id.clone(), state: state.name() }
        })
    }

    fn run_next(&mut self) {
        while self.running.is_none() {
            let Some(job) = self.waiting.pop_front() else { return };
            match self.begin(&job) {
                Ok((stop, task)) => self.running = Some(Running { job, stop, task }),
                Err(error) => job.reporter.ended(JobState::Failed { cause: error.to_string() }),
            }
        }
    }

    fn begin(&mut self, job: &Live) -> Result<(CancellationToken, JoinHandle<Outcome>), StoreError> {
        let checkpoints = job.folder.checkpoints()?;
        job.reporter.running()?;
        let instance = self.next;
        self.next = InstanceId(instance.0 + 1);
        let stop = CancellationToken::new();
        let context = RunnerContext {
            instance,
            job: job.reporter.record(),
            folder: job.folder.clone(),
            checkpoints,
            reporter: job.reporter.clone(),
            stop: stop.clone(),
            commands: self.parts.commands.clone(),
            home: self.parts.home.clone(),
        };
        Ok((stop, tokio::spawn(self.parts.runner.run(context))))
    }

    fn finish(&mut self, outcome: Outcome, why_stopped: &str) {
        let Some(running) = self.running.take() else { return };
        let reporter = &running.job.reporter;
        let state = match outcome {
            Outcome::Finished => JobState::Finished,
            Outcome::Stopped => JobState::Stopped { cause: why_stopped.to_owned() },
            Outcome::Failed(cause) => JobState::Failed { cause },
        };
        tracing::info!(job = %reporter.record().id, state = state.name(), "a job ended");
        reporter.ended(state);
    }
}

const COORDINATOR_STOPPED: &str = "the coordinator was stopped";

/// Resolves when the job that runs ends. May be dropped and called again.
async fn ended(running: &mut Option<Running>) -> Outcome {
    let Some(running) = running else { return std::future::pending().await };
    let ended = (&mut running.task).await;
    ended.unwrap_or_else(|error| Outcome::Failed(format!("what runs the job broke: {error}; please report this")))
}

/// A job must not run on without its owner.
impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

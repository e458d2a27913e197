//! Runs a job on the engines of the cluster: reads what it is trained on, has its engines planned, and starts again from the last checkpoint
//! whenever they are lost.

mod epoch;
mod start;

use super::{
    checkpoint::{Checkpoint, export_config},
    examples::Examples,
    runs::{Outcome, Run, RunJob, RunnerContext},
};
use crate::{
    core::{
        event::EngineAt,
        settings::{InstanceSettings, TrainingFacts, TrainingWork},
    },
    model,
    serving::{NOTES_BUFFERED_MAX, RunnerNote, ServingCommand},
};
use epoch::EpochRun;
use mlx_cluster_common::{
    ids::Epoch,
    plan::Plan,
    training::{Parallel, TrainingConfig},
};
use mlx_cluster_hub::{HubSettings, ModelRef, Snapshot};
use start::Start;
use std::{
    sync::{
        Arc, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Mutex, mpsc},
    time::timeout,
};

/// So many epochs in which nothing is done are enough.
const FRUITLESS_MAX: u32 = 8;
/// Engines are gone within this once they are not needed any more.
const ENDING: Duration = Duration::from_secs(15);

/// On the engines of the cluster that it is told.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClusterRunner;

impl RunJob for ClusterRunner {
    fn run(&self, context: RunnerContext) -> Run {
        Box::pin(async move {
            let stop = context.stop.clone();
            match Job::open(context).await {
                Ok(job) => job.run().await,
                // Reading was cut short, as asked.
                Err(_) if stop.is_cancelled() => Outcome::Stopped,
                Err(failure) => Outcome::Failed(failure),
            }
        })
    }
}

/// A job with everything that it is made of.
struct Job {
    context: RunnerContext,
    config: TrainingConfig,
    facts: Arc<TrainingFacts>,
    examples: Examples,
    fingerprint: String,
    start: Start,
    plan: Option<Plan>,
    /// Rows of a micro-batch, as the first plan had it: sums are made in the same order whatever the plan is.
    micro_rows: Option<u32>,
    /// Epochs that were lost since an iteration was done in one.
    fruitless: u32,
    /// Batches that came back, in all epochs of this run.
    batches_done: AtomicU64,
    /// Workers that the engines could be planned over again.
    more: std::sync::Mutex<Option<Vec<String>>>,
    /// Held while a checkpoint is written, which goes on when its epoch is lost.
    writing: Arc<Mutex<()>>,
}

/// How an epoch came to its end.
enum End {
    Finished,
    Stopped,
    Failed(String),
    /// All is kept, to go on over these workers too.
    Grows(Vec<String>),
}

impl Job {
    /// An error is a sentence.
    async fn open(context: RunnerContext) -> Result<Self, String> {
        let config = context.job.config.clone();
        let settings = HubSettings::from_env().with_home(&context.home);
        let reference = ModelRef::parse(&config.model).map_err(|error| error.to_string())?;
        let snapshot = Snapshot::open(&reference, &settings, &|_| {}).await.map_err(|error| error.to_string())?;
        let facts = model::load_facts(&config.model).await.map_err(|error| error.to_string())?;
        let start = Start::find(&context, &config, &facts).await?;
        let config = start.config.clone();
        context.reporter.note("reading the data");
        let examples = Examples::read(&config, snapshot.folder().to_owned(), &settings, &context.stop).await;
        let examples = examples.map_err(|error| error.to_string())?;
        let fingerprint = examples.fingerprint();
        start.check_data(&fingerprint)?;
        for note in start.notes.iter().chain(&examples.notes) {
            context.reporter.note(note.clone());
        }
        context.reporter.data(fingerprint.clone()).map_err(|error| error.to_string())?;
        let work = TrainingWork {
            strategy: context.job.strategy,
            batch_size: config.batch_size,
            max_seq_length: config.max_seq_length,
            tokens_per_row_max: Some(examples.longest().max(2)),
            accumulation: config.grad_accumulation_steps,
        };
        let facts = Arc::new(TrainingFacts { model: Arc::new(facts), role: config.role(Parallel::Data), work });
        let micro_rows = context.job.micro_rows;
        Ok(Self {
            context,
            config,
            facts,
            examples,
            fingerprint,
            start,
            plan: None,
            micro_rows,
            fruitless: 0,
            batches_done: AtomicU64::new(0),
            more: std::sync::Mutex::default(),
            writing: Arc::default(),
        })
    }

    async fn run(mut self) -> Outcome {
        let (notes, mut receiver) = mpsc::channel(NOTES_BUFFERED_MAX);
        let instance = self.context.instance;
        let settings = InstanceSettings { split: self.context.job.split.clone(), ..InstanceSettings::default() };
        let command = ServingCommand::StartJob { instance, facts: Arc::clone(&self.facts), settings, notes };
        if self.context.commands.send(command).await.is_err() {
            return Outcome::Failed("the coordinator is stopping".into());
        }
        let outcome = self.epochs(&mut receiver).await;
        // Once this has ended, another run of the job may begin.
        drop(timeout(ENDING, self.writing.lock()).await);
        if !matches!(&outcome, Ended::Already(_)) {
            // Fails only when the coordinator has ended, and the engines with it.
            drop(self.context.commands.send(ServingCommand::StopJob { instance }).await);
            let gone = async { while !matches!(receiver.recv().await, None | Some(RunnerNote::Ended { .. })) {} };
            if timeout(ENDING, gone).await.is_err() {
                tracing::warn!(%instance, "the engines of a job are not gone yet");
            }
        }
        outcome.into()
    }

    /// From epoch to epoch until the job has ended.
    async fn epochs(&mut self, notes: &mut mpsc::Receiver<RunnerNote>) -> Ended {
        loop {
            let note = tokio::select! {
                note = notes.recv() => note,
                () = self.context.stop.cancelled() => return Ended::Now(Outcome::Stopped),
            };
            match note {
                None => return Ended::Already(Outcome::Failed("the coordinator is stopping".into())),
                Some(RunnerNote::Ended { failure: Some(failure) }) => return Ended::Already(Outcome::Failed(failure.to_string())),
                Some(RunnerNote::Ended { failure: None }) => return Ended::Already(Outcome::Stopped),
                Some(RunnerNote::Drain { .. }) => return Ended::Now(Outcome::Stopped),
                Some(RunnerNote::Broken { cause, .. }) => self.lost(cause.as_deref()),
                // There is nothing to keep first: another note follows once an epoch runs.
                Some(RunnerNote::CouldGrow { .. }) => {}
                Some(RunnerNote::Planned(plan)) => {
                    if let Err(failure) = self.planned(plan) {
                        return Ended::Now(Outcome::Failed(failure));
                    }
                }
                Some(RunnerNote::Ready { epoch, engines }) => match self.epoch(epoch, engines, notes).await {
                    Next::Epoch => {}
                    Next::End(ended) => return ended,
                },
            }
        }
    }

    fn planned(&mut self, plan: Plan) -> Result<(), String> {
        let training = plan.training.as_ref().ok_or("a plan without training; please report this")?;
        if self.micro_rows.is_none() {
            self.micro_rows = Some(training.micro_batch_rows);
            self.context.reporter.micro_rows(training.micro_batch_rows).map_err(|error| error.to_string())?;
        }
        self.context.reporter.plan(plan.to_string()).map_err(|error| error.to_string())?;
        self.plan = Some(plan);
        Ok(())
    }

    fn more(&self) -> MutexGuard<'_, Option<Vec<String>>> {
        self.more.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_more(&self) -> Option<Vec<String>> {
        self.more().take()
    }

    fn lost(&self, cause: Option<&str>) {
        let Some(cause) = cause else { return };
        let (worker, cause) = cause.strip_prefix("worker ").and_then(|rest| rest.split_once(": ")).unwrap_or(("", cause));
        self.context.reporter.worker_lost(worker, cause);
    }

    /// Works with these engines until something happens.
    async fn epoch(&mut self, epoch: Epoch, engines: Vec<EngineAt>, notes: &mut mpsc::Receiver<RunnerNote>) -> Next {
        let Some(plan) = self.plan.clone() else {
            return Next::End(Ended::Now(Outcome::Failed("engines without a plan; please report this".into())));
        };
        let before = self.batches_done.load(Ordering::Relaxed);
        self.take_more();
        let ran = {
            let work = EpochRun::run(self, &plan, epoch, &engines);
            tokio::pin!(work);
            loop {
                tokio::select! {
                    ran = &mut work => break Ok(ran),
                    note = notes.recv() => match note {
                        Some(RunnerNote::Broken { epoch: over, cause }) if over == epoch => break Err(NoteEnd::Broken(cause)),
                        Some(RunnerNote::CouldGrow { epoch: of, workers }) if of == epoch => *self.more() = Some(workers),
                        Some(RunnerNote::Drain { .. }) => self.context.stop.cancel(),
                        Some(RunnerNote::Ended { failure }) => break Err(NoteEnd::Ended(failure.map(|failure| failure.to_string()))),
                        None => break Err(NoteEnd::Ended(Some("the coordinator is stopping".into()))),
                        Some(_) => {}
                    },
                }
            }
        };
        self.fruitless = if self.batches_done.load(Ordering::Relaxed) > before { 0 } else { self.fruitless + 1 };
        if self.fruitless >= FRUITLESS_MAX {
            let why = match &ran {
                Ok(Err(fault)) => fault.message.clone(),
                Err(NoteEnd::Broken(Some(cause))) => cause.clone(),
                _ => "see the workers' logs".to_owned(),
            };
            return Next::End(Ended::Now(Outcome::Failed(format!(
                "its engines failed {FRUITLESS_MAX} times without getting anything done: {why}"
            ))));
        }
        match ran {
            Ok(Ok(End::Finished)) => Next::End(Ended::Now(Outcome::Finished)),
            Ok(Ok(End::Stopped)) => Next::End(Ended::Now(Outcome::Stopped)),
            Ok(Ok(End::Failed(failure))) => Next::End(Ended::Now(Outcome::Failed(failure))),
            Ok(Ok(End::Grows(workers))) => {
                let (who, is) = (workers.join(" and "), if workers.len() == 1 { "is" } else { "are" });
                self.context.reporter.note(format!("{who} {is} there again: planned anew over all workers"));
                // A note about the end of the epoch follows.
                drop(self.context.commands.send(ServingCommand::PlanAgain { instance: self.context.instance, epoch }).await);
                Next::Epoch
            }
            Ok(Err(fault)) => {
                let instance = self.context.instance;
                let broken = ServingCommand::Broken { instance, epoch, node: fault.node, message: fault.message };
                // A note about the end of the epoch follows.
                drop(self.context.commands.send(broken).await);
                Next::Epoch
            }
            Err(NoteEnd::Broken(cause)) => {
                self.lost(cause.as_deref());
                Next::Epoch
            }
            Err(NoteEnd::Ended(Some(failure))) => Next::End(Ended::Already(Outcome::Failed(failure))),
            Err(NoteEnd::Ended(None)) => Next::End(Ended::Already(Outcome::Stopped)),
        }
    }
}

/// What a note says about an epoch that runs.
enum NoteEnd {
    Broken(Option<String>),
    Ended(Option<String>),
}

enum Next {
    Epoch,
    End(Ended),
}

/// How a job ended, and whether its engines are gone already.
enum Ended {
    Now(Outcome),
    Already(Outcome),
}

impl From<Ended> for Outcome {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Now(outcome) | Ended::Already(outcome) => outcome,
        }
    }
}

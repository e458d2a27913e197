//! The work of one epoch: batches to the engines, losses back, and what is reported, evaluated and saved between them.

use super::{Checkpoint, End, Job, export_config};
use crate::{
    core::event::EngineAt,
    training::{
        checkpoint::{CheckpointError, CheckpointState, CheckpointWriter, Part, SavedTensor},
        data::{Batches, batch_targets},
        engines::{Engines, Fault, SaveError, Spread},
        progress::Progress,
        reports::{TestReport, ValReport},
    },
};
use mlx_cluster_common::{
    ids::Epoch,
    plan::Plan,
    training::{Row, TrainingConfig},
};
use std::{
    collections::VecDeque,
    sync::Arc,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

/// Updates that engines have while others come back: they never wait for the coordinator.
const AHEAD: usize = 2;
/// The last iteration's numbers are told at most this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Batches on their way, to be worked on without a pause.
struct Sent {
    /// Numbers, and targets that count.
    batches: Vec<(u64, u64)>,
    is_update: bool,
}

pub(super) struct EpochRun<'a> {
    job: &'a Job,
    engines: Engines,
    progress: Progress,
    /// As of the last update: what a checkpoint can say.
    at_update: Progress,
    on_the_way: VecDeque<Sent>,
    /// Batches that wait for the others of their update.
    gathered: Vec<(u64, Vec<Row>)>,
    /// When the batch before came back.
    last: Instant,
    /// Numbers of evaluations, apart from those of batches.
    evaluations: u64,
    shown: Instant,
}

/// Why an epoch ends before the job does.
enum Stop {
    Fault(Fault),
    /// In a sentence.
    Failed(String),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

impl From<SaveError> for Stop {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::Engine(fault) => Stop::Fault(fault),
            SaveError::Kept(message) => Stop::Failed(message),
        }
    }
}

impl<'a> EpochRun<'a> {
    /// A fault is for the core to look into; another epoch follows.
    pub(super) async fn run(job: &'a Job, plan: &Plan, epoch: Epoch, engines: &[EngineAt]) -> Result<End, Fault> {
        match Self::work(job, plan, epoch, engines).await {
            Ok(end) => Ok(end),
            Err(Stop::Fault(fault)) => Err(fault),
            Err(Stop::Failed(failure)) => Ok(End::Failed(failure)),
        }
    }

    async fn work(job: &'a Job, plan: &Plan, epoch: Epoch, engines: &[EngineAt]) -> Result<End, Stop> {
        let training = plan.training.as_ref().ok_or_else(|| Stop::Failed("a plan without training; please report this".into()))?;
        let shares = plan.stages.first().map(|stage| stage.shares()).unwrap_or_default();
        let mut spread = Spread::new(training, shares);
        if let Some(rows) = job.micro_rows {
            spread.limits.rows = spread.limits.rows.min(rows.max(1) as usize);
        }
        let mut engines = Engines::open(epoch, engines, spread).await?;
        let checkpoint = newest(job).await?;
        let progress = begin(job, &mut engines, checkpoint.as_ref()).await?;
        let now = Instant::now();
        let mut run = Self {
            job,
            engines,
            at_update: progress.clone(),
            progress,
            on_the_way: VecDeque::new(),
            gathered: Vec::new(),
            last: now,
            evaluations: 0,
            shown: now,
        };
        if !job.config.train {
            run.test(None).await?;
            return Ok(End::Finished);
        }
        let Some((mut batches, note)) = job.examples.batches().map_err(|error| Stop::Failed(error.to_string()))? else {
            return Err(Stop::Failed("there is nothing to train on".into()));
        };
        if checkpoint.is_none() {
            note.into_iter().for_each(|note| job.context.reporter.note(note));
            // Whoever is lost before the first regular checkpoint leaves the others with weights that have moved on.
            run.save(false).await?;
        }
        if let Some(checkpoint) = &checkpoint {
            export(job, checkpoint.clone()).await?;
            job.context.reporter.note(format!("goes on from the checkpoint at iteration {}", checkpoint.state.iteration));
        }
        kept(job.context.reporter.start_at(run.progress.iteration))?;
        batches.go_to(run.progress.iteration);
        let end = run.train(&mut batches).await?;
        if let (End::Finished, true) = (&end, job.config.test) {
            run.test(Some(&mut batches)).await?;
        }
        Ok(end)
    }

    async fn train(&mut self, batches: &mut Batches) -> Result<End, Stop> {
        let (job, config) = (self.job, &self.job.config);
        self.last = Instant::now();
        for next in batches.by_ref() {
            if job.context.stop.is_cancelled() {
                return self.stopped().await;
            }
            if let Some(workers) = job.take_more() {
                self.settle().await?;
                self.save(false).await?;
                return Ok(End::Grows(workers));
            }
            if let Some(evaluation) = &next.evaluation {
                self.settle().await?;
                self.evaluate(next.iteration, evaluation).await?;
            }
            let rows = job.examples.train_rows(&next.batch);
            let counted = batch_targets(&rows);
            if counted == 0 {
                return Err(Stop::Failed(format!(
                    "the batch of iteration {} has no target that counts: with `mask_prompt`, its examples need answers within `max_seq_length`",
                    next.iteration
                )));
            }
            self.gathered.push((next.iteration, rows));
            let (is_update, is_saved) = (self.is_update(next.iteration), next.iteration % config.save_every == 0);
            if is_update || is_saved {
                self.send(is_update).await?;
            }
            while self.on_the_way.len() >= AHEAD || (is_saved && !self.on_the_way.is_empty()) {
                self.take_back().await?;
            }
            if is_saved && next.iteration < config.iters {
                self.save(true).await?;
            }
        }
        self.settle().await?;
        self.save(config.iters % config.save_every == 0).await?;
        Ok(End::Finished)
    }

    /// Asked to stop: the work so far is kept.
    async fn stopped(&mut self) -> Result<End, Stop> {
        self.settle().await?;
        self.save(false).await?;
        Ok(End::Stopped)
    }

    fn is_update(&self, iteration: u64) -> bool {
        iteration.is_multiple_of(u64::from(self.job.config.grad_accumulation_steps))
    }

    /// What was gathered goes to the engines.
    async fn send(&mut self, is_update: bool) -> Result<(), Stop> {
        let gathered = std::mem::take(&mut self.gathered);
        if gathered.is_empty() {
            return Ok(());
        }
        let batches = gathered.iter().map(|(number, rows)| (*number, batch_targets(rows))).collect();
        let update_of = if is_update { self.job.config.grad_accumulation_steps } else { 0 };
        self.engines.send(gathered, update_of).await?;
        self.on_the_way.push_back(Sent { batches, is_update });
        Ok(())
    }

    /// Until nothing is under way any more.
    async fn settle(&mut self) -> Result<(), Stop> {
        self.send(false).await?;
        while !self.on_the_way.is_empty() {
            self.take_back().await?;
        }
        Ok(())
    }

    /// Waits for the oldest batches on the way.
    async fn take_back(&mut self) -> Result<(), Stop> {
        let Some(Sent { batches, is_update }) = self.on_the_way.pop_front() else { return Ok(()) };
        let Some((last, _)) = batches.last() else { return Ok(()) };
        let done = self.engines.done(*last).await?;
        let now = Instant::now();
        let each = (now - self.last) / batches.len().max(1) as u32;
        self.last = now;
        let config = &self.job.config;
        for (number, counted) in batches {
            let loss = done.losses.get(&number).copied().unwrap_or(f64::NAN);
            if !loss.is_finite() {
                return Err(self.diverged(format!("the loss of iteration {number} is {loss}")).await);
            }
            self.progress.add(&done, loss, counted, each);
            self.job.batches_done.fetch_add(1, Ordering::Relaxed);
            self.progress.updates += u64::from(self.is_update(number));
            // Of the last update, and before the first one of that, as in mlx-lm; those that are gathered come back together.
            self.progress.learning_rate = self.job.facts.role.schedule.at(self.progress.updates.saturating_sub(1));
            if number % config.steps_per_report == 0 || number == config.iters {
                let report = self.progress.report();
                kept(self.job.context.reporter.train(report))?;
            }
        }
        if is_update {
            self.at_update = self.progress.clone();
        }
        self.show(now);
        Ok(())
    }

    /// The job would come to the same numbers again, so it ends.
    async fn diverged(&self, what: String) -> Stop {
        let advice = "lower the learning rate, or warm up longer";
        match newest(self.job).await {
            Ok(Some(kept)) => Stop::Failed(format!(
                "{what}: {advice}; a new job with `resume_adapter_file: {}` starts from the last good checkpoint, of iteration {}",
                kept.path(Part::Adapters).display(),
                kept.state.iteration
            )),
            Ok(None) => Stop::Failed(format!("{what}: {advice}; there is no checkpoint yet")),
            Err(stop) => stop,
        }
    }

    fn show(&mut self, now: Instant) {
        if now - self.shown < PROGRESS_INTERVAL {
            return;
        }
        self.shown = now;
        let (iteration, of) = (self.progress.iteration, self.job.config.iters);
        let since = self.progress.since;
        let eta = (since.steps > 0).then(|| since.seconds / since.steps as f64 * of.saturating_sub(iteration) as f64);
        self.job.context.reporter.progress(iteration, of, eta);
    }

    /// mlx-lm evaluates before the batch of an iteration, and reports the iterations that are over.
    async fn evaluate(&mut self, iteration: u64, evaluation: &[Vec<u32>]) -> Result<(), Stop> {
        if evaluation.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let rows = evaluation.iter().map(|batch| self.job.examples.valid_rows(batch)).collect();
        match self.mean_loss(rows).await? {
            Some(loss) if !loss.is_finite() => {
                return Err(self.diverged(format!("the validation loss before iteration {iteration} is {loss}")).await);
            }
            Some(loss) => {
                let report = ValReport { iteration: iteration - 1, val_loss: loss, val_time: start.elapsed().as_secs_f64() };
                kept(self.job.context.reporter.val(report))?;
            }
            None => self.job.context.reporter.note(format!(
                "no validation loss before iteration {iteration}: no target of its batches counts; with `mask_prompt`, answers have to be within \
                 `max_seq_length`"
            )),
        }
        self.last = Instant::now();
        Ok(())
    }

    async fn test(&mut self, trained: Option<&mut Batches>) -> Result<(), Stop> {
        let batches = self.job.examples.test_batches(trained).map_err(|error| Stop::Failed(error.to_string()))?;
        let rows = batches.iter().map(|batch| self.job.examples.test_rows(batch)).collect();
        match self.mean_loss(rows).await? {
            Some(test_loss) if test_loss.is_finite() => {
                kept(self.job.context.reporter.test(TestReport { test_loss, test_ppl: f64::from(test_loss).exp() }))
            }
            Some(loss) => {
                Err(Stop::Failed(format!("the loss of the test set is {loss}: the numbers of the adapter or of the model are too large")))
            }
            None => Err(Stop::Failed(
                "no target of the test set counts: with `mask_prompt`, its examples need answers within `max_seq_length`".into(),
            )),
        }
    }

    /// Over all targets that count in these batches; None where none does.
    async fn mean_loss(&mut self, batches: Vec<Vec<Row>>) -> Result<Option<f32>, Stop> {
        let (mut losses, mut targets) = (0.0, 0);
        let mut on_the_way: VecDeque<(u64, u64)> = VecDeque::new();
        let mut batches = batches.into_iter().filter(|rows| batch_targets(rows) > 0).peekable();
        while batches.peek().is_some() || !on_the_way.is_empty() {
            match batches.next_if(|_| on_the_way.len() < AHEAD) {
                Some(rows) => {
                    self.evaluations += 1;
                    let counted = batch_targets(&rows);
                    self.engines.send_evaluation(self.evaluations, rows).await?;
                    on_the_way.push_back((self.evaluations, counted));
                }
                None => {
                    let Some((number, counted)) = on_the_way.pop_front() else { break };
                    let done = self.engines.done(number).await?;
                    losses += done.losses.values().sum::<f64>() * counted as f64;
                    targets += counted;
                }
            }
        }
        Ok((targets > 0).then(|| (losses / targets as f64) as f32))
    }

    /// A checkpoint as of the last update, and the adapter where mlx-lm puts it.
    async fn save(&mut self, is_numbered: bool) -> Result<(), Stop> {
        let job = self.job;
        // One that was being written when its epoch was lost ends first: both would work in the same folder.
        let turn = Arc::clone(&job.writing).lock_owned().await;
        let mut writer: CheckpointWriter = job.context.checkpoints.begin(true);
        let (number, mut spoilt) = (self.progress.iteration, None);
        let take = |tensor: SavedTensor| {
            if tensor.part == Part::Adapters && !tensor.is_finite() {
                spoilt.get_or_insert_with(|| tensor.name.clone());
            }
            kept_text(writer.add(tensor))
        };
        self.engines.save(number, take).await?;
        if let Some(name) = spoilt {
            drop(turn);
            let iteration = self.at_update.iteration;
            return Err(self.diverged(format!("`{name}` has numbers that are not finite after iteration {iteration}")).await);
        }
        let Progress { iteration, updates, trained_tokens, since, .. } = self.at_update.clone();
        let state = CheckpointState {
            iteration,
            updates,
            trained_tokens,
            since_report: since,
            seed: job.config.seed,
            data_fingerprint: job.fingerprint.clone(),
            config: job.config.clone(),
        };
        let config = job.config.clone();
        // Before the first update there is nothing that would be worth what may lie there of an earlier job; a job that ends without one has
        // no more to give.
        let is_exported = iteration > 0 || number == config.iters;
        let written = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let checkpoint = kept_text(writer.finish(state))?;
            if is_exported { kept_text(put_beside(&checkpoint, &config, is_numbered.then_some(number))) } else { Ok(()) }
        });
        written.await.map_err(|error| Stop::Failed(error.to_string()))?.map_err(Stop::Failed)?;
        kept(job.context.reporter.saved(iteration))?;
        self.last = Instant::now();
        Ok(())
    }
}

async fn newest(job: &Job) -> Result<Option<Checkpoint>, Stop> {
    let _turn = job.writing.lock().await;
    let checkpoints = job.context.checkpoints.clone();
    let found = tokio::task::spawn_blocking(move || checkpoints.newest()).await;
    let newest = kept(found.map_err(|error| Stop::Failed(error.to_string()))?)?;
    newest.warnings.into_iter().for_each(|warning| job.context.reporter.note(warning));
    Ok(newest.checkpoint)
}

/// The adapter of a checkpoint may not have got to where mlx-lm puts it.
async fn export(job: &Job, checkpoint: Checkpoint) -> Result<(), Stop> {
    if checkpoint.state.iteration == 0 {
        return Ok(());
    }
    let turn = Arc::clone(&job.writing).lock_owned().await;
    let (config, iteration) = (job.config.clone(), checkpoint.state.iteration);
    let number = iteration.is_multiple_of(config.save_every).then_some(iteration);
    let done = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        put_beside(&checkpoint, &config, number)
    });
    kept(done.await.map_err(|error| Stop::Failed(error.to_string()))?)
}

/// Puts the adapter and its config where mlx-lm does.
fn put_beside(checkpoint: &Checkpoint, config: &TrainingConfig, number: Option<u64>) -> Result<(), CheckpointError> {
    export_config(config, &config.adapter_path)?;
    checkpoint.export(&config.adapter_path, number)
}

/// Brings the engines to where the job is.
async fn begin(job: &Job, engines: &mut Engines, checkpoint: Option<&Checkpoint>) -> Result<Progress, Stop> {
    let Some(checkpoint) = checkpoint else {
        engines.begin(&job.start.weights, 0, false).await?;
        return Ok(Progress::default());
    };
    // Later checkpoints of this run have what the new optimizer remembers.
    let is_warm = job.context.job.warm_start && job.start.began_at(checkpoint.state.iteration);
    if !is_warm && checkpoint.state.updates > 0 {
        kept(checkpoint.check_optimizer())?;
    }
    let has_optimizer = !is_warm && checkpoint.has_optimizer() && checkpoint.state.updates > 0;
    let parts = if has_optimizer { vec![Part::Adapters, Part::Optimizer] } else { vec![Part::Adapters] };
    let reading = checkpoint.clone();
    let tensors = tokio::task::spawn_blocking(move || reading.tensors(&parts)?.collect::<Result<Vec<_>, _>>());
    let tensors = kept(tensors.await.map_err(|error| Stop::Failed(error.to_string()))?)?;
    let state = &checkpoint.state;
    engines.begin(&tensors, if has_optimizer { state.updates } else { 0 }, has_optimizer).await?;
    let updates = if is_warm { 0 } else { state.updates };
    Ok(Progress::new(state.iteration, updates, state.trained_tokens, state.since_report))
}

/// What cannot be kept ends the job.
fn kept<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<T, Stop> {
    result.map_err(|error| Stop::Failed(error.to_string()))
}

fn kept_text<T, E: std::fmt::Display>(result: Result<T, E>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}

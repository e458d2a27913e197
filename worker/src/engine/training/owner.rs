//! The loop that owns every array of an engine that trains: carries out the orders of a job, in step with the stages beside it.

use super::{
    Control,
    exchange::{Passages, Trouble},
    schedule::{Turn, turns},
    tensors,
};
use crate::engine::ranks::Ranks;
use mlx_cluster_common::{engine::EngineSpec, ids::Epoch, training::MicroBatch};
use mlx_cluster_lm::{
    activations::Activations,
    tuner::{
        self,
        stage::{Passed, Pending, TrainedStage},
    },
};
use mlx_cluster_proto::wire::{self, train_order::Order, train_report::Report};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};

pub(super) struct Owner {
    stage: TrainedStage,
    ranks: Ranks,
    spec: EngineSpec,
    runtime: Handle,
    control: mpsc::Receiver<Control>,
    progress: watch::Sender<u64>,
    node_name: String,
    epoch: Epoch,
    next: Option<Passages>,
    /// It may connect before this engine is linked itself.
    before: Option<(Epoch, Passages)>,
    /// What is left to measure of the start has been measured.
    is_prepared: bool,
}

/// What a checkpoint holds of this stage, as it comes.
#[derive(Default)]
struct Restored {
    parameters: BTreeMap<String, mlx_cluster_lm::Array>,
    optimizer: BTreeMap<String, mlx_cluster_lm::Array>,
}

/// Where the time of an iteration went.
#[derive(Default)]
struct Times {
    waiting: Duration,
}

impl Owner {
    pub(super) fn new(
        stage: TrainedStage,
        ranks: Ranks,
        spec: EngineSpec,
        runtime: Handle,
        control: mpsc::Receiver<Control>,
        progress: watch::Sender<u64>,
        node_name: String,
    ) -> Self {
        let (epoch, next, before, is_prepared) = (Epoch(0), None, None, false);
        Self { stage, ranks, spec, runtime, control, progress, node_name, epoch, next, before, is_prepared }
    }

    /// Until nobody tells it anything any more.
    pub(super) fn run(mut self) {
        while let Some(control) = self.control.blocking_recv() {
            match control {
                // An engine that took long to reach can come after its epoch is over; what belongs to it is closed with it.
                Control::Link { epoch, .. } | Control::Before { epoch, .. } if epoch < self.epoch => {}
                Control::Link { epoch, next, join } => {
                    (self.epoch, self.next) = (epoch, next);
                    self.before = self.before.take().filter(|(of, _)| *of >= epoch);
                    self.ranks.join(join, || Ok(()));
                }
                Control::Before { epoch, passages } => self.before = Some((epoch, passages)),
                Control::Open { epoch, orders, reports } if epoch == self.epoch => self.session(orders, &reports),
                // Of an epoch that is over: its streams end with it.
                Control::Open { .. } => {}
            }
        }
    }

    /// Orders of a job, until it closes the stream or the epoch breaks.
    fn session(&mut self, mut orders: mpsc::Receiver<Order>, reports: &mpsc::Sender<wire::TrainReport>) {
        let mut restored = Restored::default();
        while let Some(order) = orders.blocking_recv() {
            if let Err(Trouble { node, message }) = self.carry_out(order, &mut restored, reports) {
                tracing::warn!(message, epoch = self.epoch.0, "the epoch is broken");
                let node = node.unwrap_or_else(|| self.node_name.clone());
                // Whoever would hear it may be what is gone.
                drop(tell(reports, Report::Broken(wire::Broken { node, message })));
                break;
            }
        }
        self.stage.forget_gradients();
    }

    fn carry_out(&mut self, order: Order, restored: &mut Restored, reports: &mpsc::Sender<wire::TrainReport>) -> Result<(), Trouble> {
        match order {
            Order::Open(_) => Ok(()),
            Order::Restore(wire::SavedTensor { is_optimizer, tensor }) => {
                let tensor = tensor.ok_or_else(|| "a checkpoint's tensor came without data".to_owned())?;
                let all = if is_optimizer { &mut restored.optimizer } else { &mut restored.parameters };
                all.insert(tensor.name.clone(), tensors::read(&tensor)?);
                Ok(())
            }
            Order::Begin(begin) => self.begin(&begin, std::mem::take(restored), reports),
            Order::Iteration(iteration) => {
                let (number, update_of) = (iteration.number, iteration.update_of);
                let micro_batches = micro_batches(iteration)?;
                self.iterate(number, &micro_batches, update_of, reports)
            }
            Order::Evaluate(iteration) => {
                let number = iteration.number;
                let micro_batches = micro_batches(iteration)?;
                self.evaluate(number, &micro_batches, reports)
            }
            Order::Save(save) => self.save(&save, reports),
        }
    }

    fn begin(&mut self, begin: &wire::Begin, restored: Restored, reports: &mpsc::Sender<wire::TrainReport>) -> Result<(), Trouble> {
        if !self.is_prepared {
            let _work = self.ranks.step();
            self.ranks.check(self.stage.prepare())?;
            self.is_prepared = true;
        }
        let Restored { mut parameters, mut optimizer } = restored;
        // Every engine gets all of a checkpoint, and takes what is its own.
        parameters.retain(|name, _| self.stage.parameters().contains_key(name));
        optimizer.retain(|name, _| name.rsplit_once('.').is_some_and(|(parameter, _)| self.stage.parameters().contains_key(parameter)));
        if !parameters.is_empty() || begin.updates > 0 {
            let optimizer = begin.has_optimizer.then_some(optimizer);
            self.stage.restore(parameters, begin.updates, optimizer).map_err(|error| error.to_string())?;
        }
        tell(reports, Report::Begun(wire::Begun { trained: self.stage.trained_numbers() }))
    }

    /// All micro-batches forward and backward, then the update when it is due.
    fn iterate(
        &mut self,
        number: u64,
        micro_batches: &[MicroBatch],
        update_of: u32,
        reports: &mpsc::Sender<wire::TrainReport>,
    ) -> Result<(), Trouble> {
        let (start, mut times, mut losses) = (Instant::now(), Times::default(), HashMap::new());
        let stages_after = (self.spec.n_stages - 1 - self.spec.stage) as usize;
        let mut pending: VecDeque<Pending> = VecDeque::new();
        for turn in turns(micro_batches.len(), stages_after) {
            match turn {
                Turn::Forward(i) => self.forward(&micro_batches[i], &mut pending, &mut losses, &mut times)?,
                Turn::Backward(_) => self.backward(&mut pending, &mut times)?,
            }
            self.progress.send_modify(|progress| *progress += 1);
        }
        if update_of > 0 {
            self.update(update_of, &mut times)?;
        }
        self.done(number, losses, start, &times, reports)
    }

    fn forward(
        &mut self,
        micro: &MicroBatch,
        pending: &mut VecDeque<Pending>,
        losses: &mut HashMap<u64, f64>,
        times: &mut Times,
    ) -> Result<(), Trouble> {
        let input = self.input(times)?;
        let work = self.ranks.step();
        let passed = self.ranks.check(self.stage.forward(micro, input))?;
        drop(work);
        match passed {
            Passed::Activations { output, pending: own } => {
                pending.push_back(own);
                self.send_on(&output, times)
            }
            Passed::Loss { loss, gradients } => {
                *losses.entry(micro.batch).or_default() += f64::from(loss);
                self.send_back(gradients.as_ref(), times)
            }
        }
    }

    fn backward(&mut self, pending: &mut VecDeque<Pending>, times: &mut Times) -> Result<(), Trouble> {
        let own = pending.pop_front().ok_or_else(|| "nothing is left to go backward".to_owned())?;
        let given = match own.wants_gradients() {
            true => Some(waited(times, || match &mut self.next {
                Some(next) => next.receive(&self.runtime),
                None => Err("the next stage is not connected".to_owned().into()),
            })?),
            false => None,
        };
        let gradients = self.stage.backward(own, given).map_err(|error| error.to_string())?;
        self.send_back(gradients.as_ref(), times)
    }

    fn update(&mut self, update_of: u32, times: &mut Times) -> Result<(), Trouble> {
        let start = Instant::now();
        let work = self.ranks.step();
        self.ranks.check(self.stage.reduce())?;
        if !self.ranks.is_alone() {
            times.waiting += start.elapsed();
        }
        let updated = self.ranks.check(self.stage.update(update_of));
        drop(work);
        updated.map_err(Trouble::from)
    }

    /// Forward alone, as far as this stage is concerned.
    fn evaluate(&mut self, number: u64, micro_batches: &[MicroBatch], reports: &mpsc::Sender<wire::TrainReport>) -> Result<(), Trouble> {
        let (start, mut times, mut losses) = (Instant::now(), Times::default(), HashMap::new());
        for micro in micro_batches {
            let input = self.input(&mut times)?;
            let work = self.ranks.step();
            let passed = self.ranks.check(self.stage.evaluate(micro, input))?;
            drop(work);
            match passed {
                Passed::Activations { output, .. } => self.send_on(&output, &mut times)?,
                Passed::Loss { loss, .. } => *losses.entry(micro.batch).or_default() += f64::from(loss),
            }
            self.progress.send_modify(|progress| *progress += 1);
        }
        self.done(number, losses, start, &times, reports)
    }

    fn done(
        &self,
        number: u64,
        losses: HashMap<u64, f64>,
        start: Instant,
        times: &Times,
        reports: &mpsc::Sender<wire::TrainReport>,
    ) -> Result<(), Trouble> {
        let threshold = self.spec.training.as_ref().map_or(0, |role| role.clear_cache_threshold.0);
        let peak_bytes = tuner::tidy(threshold).map_err(|error| error.to_string())?;
        let all = start.elapsed();
        let done = wire::Done {
            number,
            losses,
            busy_ns: all.saturating_sub(times.waiting).as_nanos() as u64,
            waiting_ns: times.waiting.as_nanos() as u64,
            peak_bytes,
        };
        tell(reports, Report::Done(done))
    }

    /// The parameters and what the optimizer remembers; ranks that have the same leave it to the first one.
    fn save(&mut self, save: &wire::Save, reports: &mpsc::Sender<wire::TrainReport>) -> Result<(), Trouble> {
        let saved = |is_optimizer, name: &str, array: &mlx_cluster_lm::Array| {
            let tensor = Some(tensors::write(name, array)?);
            tell(reports, Report::Saved(wire::SavedTensor { is_optimizer, tensor }))
        };
        let work = self.ranks.step();
        let parts = self.ranks.check(self.stage.saved(save.has_optimizer))?;
        drop(work);
        if self.spec.place.rank == 0 {
            for (name, array) in &parts.parameters {
                saved(false, name, array)?;
            }
            for (name, array) in &parts.optimizer {
                saved(true, name, array)?;
            }
        }
        tell(reports, Report::SaveEnded(save.number))
    }

    fn input(&mut self, times: &mut Times) -> Result<Option<Activations>, Trouble> {
        if self.spec.is_first() {
            return Ok(None);
        }
        waited(times, || match &mut self.before {
            Some((epoch, before)) if *epoch == self.epoch => before.receive(&self.runtime).map(Some),
            _ => Err("the stage before is not connected".to_owned().into()),
        })
    }

    fn send_on(&mut self, output: &Activations, times: &mut Times) -> Result<(), Trouble> {
        let next = self.next.as_mut().ok_or_else(|| "the next stage is not connected".to_owned())?;
        waited(times, || next.send(&self.runtime, output))
    }

    fn send_back(&mut self, gradients: Option<&Activations>, times: &mut Times) -> Result<(), Trouble> {
        let Some(gradients) = gradients else { return Ok(()) };
        match &mut self.before {
            Some((epoch, before)) if *epoch == self.epoch => waited(times, || before.send(&self.runtime, gradients)),
            _ => Err("the stage before is not connected".to_owned().into()),
        }
    }
}

fn waited<T>(times: &mut Times, wait: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = wait();
    times.waiting += start.elapsed();
    value
}

fn micro_batches(iteration: wire::Iteration) -> Result<Vec<MicroBatch>, Trouble> {
    let micro_batches = iteration.micro_batches.into_iter().map(MicroBatch::try_from);
    Ok(micro_batches.collect::<Result<_, _>>().map_err(|error| error.to_string())?)
}

/// Waits while the coordinator is behind; its stream ends when it is gone.
fn tell(reports: &mpsc::Sender<wire::TrainReport>, report: Report) -> Result<(), Trouble> {
    let sent = reports.blocking_send(wire::TrainReport { report: Some(report) });
    sent.map_err(|_| "the coordinator is gone".to_owned().into())
}

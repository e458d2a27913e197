//! The lead's loop: schedules steps, hands them to the other ranks of the first stage, runs it, hands tokens to the coordinator. Owns every array of its process.

use super::{
    CHANNEL, Command, Outgoing,
    adapters::{Change, Order},
    hops::{Hops, Load},
    pace::Pace,
    ranks::Ranks,
    relay::forward,
    scheduler::{BatchScheduler, Limits},
    tensors,
};
use mlx_cluster_common::{
    ids::Epoch,
    request::{Delivery, EngineLoad, SessionCommand},
    step::{Segment, Step, StepResult},
};
use mlx_cluster_lm::shard::{PendingResult, Shard, StepOutput};
use mlx_cluster_proto::wire;
use std::{sync::Arc, time::Instant};
use tokio::sync::{mpsc, watch};

/// What the tasks may see of the lead without asking its thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Pulse {
    pub(super) load: EngineLoad,
    /// Rises with every step that was made and every result that came.
    pub(super) progress: u64,
    /// Steps that somebody works on.
    pub(super) under_way: usize,
}

/// A step that the device works on.
struct Running {
    pending: PendingResult,
    prompt_tokens: usize,
    started: Instant,
}

pub(super) struct Lead {
    shard: Shard,
    ranks: Ranks,
    scheduler: BatchScheduler,
    commands: mpsc::Receiver<Command>,
    pulse: Arc<watch::Sender<Pulse>>,
    epoch: Epoch,
    output: Option<mpsc::Sender<Outgoing>>,
    /// The other ranks of the first stage.
    others: Vec<mpsc::Sender<Outgoing>>,
    deliveries: Option<mpsc::Sender<wire::Delivery>>,
    /// With one stage: the step that the device works on.
    running: Option<Running>,
    /// Adapters that are to go once no sequence has them any more.
    leaving: Vec<Order>,
    progress: u64,
    hops: Hops,
    pace: Pace,
    node_name: String,
}

impl Lead {
    pub(super) fn new(
        shard: Shard,
        ranks: Ranks,
        limits: Limits,
        commands: mpsc::Receiver<Command>,
        pulse: Arc<watch::Sender<Pulse>>,
        node_name: String,
    ) -> Self {
        let (mut scheduler, pace) = (BatchScheduler::new(limits), Pace::new());
        scheduler.pace(pace.tokens());
        Self {
            shard,
            ranks,
            scheduler,
            hops: Hops::new(limits.n_stages),
            pace,
            commands,
            pulse,
            epoch: Epoch(0),
            output: None,
            others: Vec::new(),
            deliveries: None,
            running: None,
            leaving: Vec::new(),
            progress: 0,
            node_name,
        }
    }

    /// Until the commands end.
    pub(super) fn run(mut self) {
        loop {
            if !self.take_commands() {
                return;
            }
            if let Err(message) = self.advance() {
                self.broken(self.node_name.clone(), message);
            }
            self.drop_unused();
            self.publish();
        }
    }

    /// Takes what is there; waits when there is nothing else to do. False when no more will come.
    fn take_commands(&mut self) -> bool {
        if self.running.is_none() && !self.has_work() {
            match self.commands.blocking_recv() {
                Some(command) => self.handle(command),
                None => return false,
            }
        }
        for _ in 0..CHANNEL {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
        true
    }

    fn has_work(&mut self) -> bool {
        self.scheduler.has_step()
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Link { epoch, output, ranks, join } => {
                self.settle();
                self.epoch = epoch;
                (self.output, self.others) = (output, ranks);
                self.deliveries = None;
                self.leaving.clear();
                self.hops.forget();
                self.shard.clear();
                self.scheduler.reset(epoch);
                self.ranks.join(join, || self.shard.warm_up());
            }
            Command::Open { epoch, deliveries } if epoch == self.epoch => {
                self.scheduler.cancel_all();
                self.deliveries = Some(deliveries);
            }
            // The sender is dropped, which ends the session on the other side.
            Command::Open { .. } => {}
            Command::Session(SessionCommand::Submit(submission)) => {
                let unknown = submission.adapter.filter(|adapter| !self.shard.has_adapter(*adapter));
                let sequence = submission.sequence;
                let refusal = match unknown {
                    Some(adapter) => Some(Delivery::Refused { sequence, message: format!("adapter {adapter} is not loaded") }),
                    None => self.scheduler.submit(submission),
                };
                refusal.into_iter().for_each(|refusal| self.deliver(vec![refusal]));
            }
            Command::Session(SessionCommand::Cancel(sequence)) => self.scheduler.cancel(sequence),
            Command::Adapter(order) if matches!(order.change, Change::Drop { .. }) => self.leaving.push(order),
            Command::Adapter(order) => order.carry_out(&mut self.shard, self.epoch),
            Command::Close => {
                self.scheduler.cancel_all();
                self.deliveries = None;
            }
            Command::Result(result) => {
                self.hops.returns(result.number, result.busy_ns, Instant::now());
                self.take_result(StepResult::from(result));
            }
            Command::Broken { epoch, node, message } if epoch == self.epoch => self.broken(node, message),
            Command::Broken { .. } | Command::Step(_) => {}
        }
    }

    /// Adapters go when no step that is under way has a sequence of theirs.
    fn drop_unused(&mut self) {
        let (used, unused) = std::mem::take(&mut self.leaving).into_iter().partition(|order| self.scheduler.uses(order.adapter));
        self.leaving = used;
        let unused: Vec<Order> = unused;
        unused.into_iter().for_each(|order| order.carry_out(&mut self.shard, self.epoch));
    }

    /// Makes the next step and starts it; with one stage, reads the step before it while the device works on the new one.
    fn advance(&mut self) -> Result<(), String> {
        let started = match self.scheduler.next_step() {
            Some(step) => self.start(step)?,
            None => None,
        };
        let Some(before) = std::mem::replace(&mut self.running, started) else {
            return Ok(());
        };
        let result = {
            let _work = self.ranks.step();
            self.ranks.check(before.pending.read())?
        };
        self.step_ended(before.prompt_tokens, before.started);
        self.take_result(result);
        Ok(())
    }

    fn step_ended(&mut self, prompt_tokens: usize, started: Instant) {
        self.pace.step_ended(prompt_tokens, started, Instant::now());
        self.scheduler.pace(self.pace.tokens());
    }

    fn start(&mut self, step: Step) -> Result<Option<Running>, String> {
        let (started, prompt_tokens) = (Instant::now(), prompt_tokens(&step));
        self.progress += 1;
        self.publish();
        let work = self.ranks.step();
        if !self.others.is_empty() {
            self.ranks.check(forward(&self.others, wire::StepFrame::new(step.clone(), Vec::new())))?;
        }
        match self.ranks.check(self.shard.apply(&step, None))? {
            StepOutput::Result(pending) => {
                self.ranks.check(pending.start())?;
                Ok(Some(Running { pending, prompt_tokens, started }))
            }
            StepOutput::Activations(activations) => {
                let frame = wire::StepFrame::new(step, self.ranks.check(tensors::write(&activations))?);
                drop(work);
                self.step_ended(prompt_tokens, started);
                let bytes = frame.activations.iter().map(|tensor| tensor.data.len() as u64).sum();
                let load = if prompt_tokens > 0 { Load::Prompt { bytes } } else { Load::Decode };
                self.hops.leaves(frame.number, load, self.scheduler.under_way() == 1, Instant::now());
                let output = self.output.as_ref().ok_or("the next stage is not connected")?;
                output.blocking_send(Outgoing::Step(frame)).map_err(|_| "the connection to the next stage is gone".to_owned())?;
                Ok(None)
            }
        }
    }

    fn take_result(&mut self, result: StepResult) {
        self.progress += 1;
        let deliveries = self.scheduler.on_result(result);
        self.deliver(deliveries);
    }

    fn deliver(&mut self, deliveries: Vec<Delivery>) {
        let Some(sender) = &self.deliveries else { return };
        for delivery in deliveries {
            if sender.blocking_send(delivery.into()).is_err() {
                self.scheduler.cancel_all();
                self.deliveries = None;
                return;
            }
        }
    }

    /// The epoch is over: nothing runs any more until the coordinator links the engines anew.
    fn broken(&mut self, node: String, message: String) {
        tracing::warn!(node, message, epoch = self.epoch.0, "the epoch is broken");
        if let Some(sender) = self.deliveries.take() {
            let broken = wire::Broken { node, message };
            // Nobody may be listening any more; then there is nobody to tell.
            drop(sender.blocking_send(wire::Delivery { delivery: Some(wire::delivery::Delivery::Broken(broken)) }));
        }
        self.output = None;
        self.others.clear();
        self.settle();
        self.leaving.clear();
        self.shard.clear();
        self.scheduler.reset(Epoch(0));
        self.epoch = Epoch(0);
    }

    /// Until nothing runs any more that other ranks take part in; what comes out is for nobody.
    fn settle(&mut self) {
        let Some(running) = self.running.take().filter(|_| !self.ranks.is_alone()) else { return };
        let _work = self.ranks.step();
        // An error ends the process of a group.
        drop(self.ranks.check(running.pending.read()));
    }

    fn publish(&self) {
        let load = self.hops.measured(self.scheduler.load());
        let under_way = self.scheduler.under_way();
        self.pulse.send_replace(Pulse { load, progress: self.progress, under_way });
    }
}

/// Prompt tokens that a step reads; 0 for a decode step.
fn prompt_tokens(step: &Step) -> usize {
    let reads = |segment: &&Segment| segment.output.sample.is_none_or(|index| index == 0);
    step.segments.iter().filter(reads).map(|segment| segment.tokens.len()).sum()
}

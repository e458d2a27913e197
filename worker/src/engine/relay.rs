//! The loop of all engines but the lead: applies the steps that come, hands them to the other ranks of its stage and what the stage makes
//! of them to the next one. Owns every array of its process.

use super::{Command, Outgoing, ranks::Ranks, tensors};
use mlx_cluster_common::{engine::EngineSpec, ids::Epoch};
use mlx_cluster_lm::{
    error::LmError,
    shard::{Shard, StepOutput},
};
use mlx_cluster_proto::wire;
use std::time::Instant;
use tokio::sync::{
    mpsc::{self, error::TryRecvError},
    watch,
};

/// The newest epoch that failed here, and why; whoever feeds this stage is told so.
pub(super) type Fault = Option<(Epoch, String)>;

pub(super) struct Relay {
    shard: Shard,
    ranks: Ranks,
    spec: EngineSpec,
    commands: mpsc::Receiver<Command>,
    faults: watch::Sender<Fault>,
    epoch: Epoch,
    next_number: u64,
    output: Option<mpsc::Sender<Outgoing>>,
    others: Vec<mpsc::Sender<Outgoing>>,
    /// On ranks above 0: the step that the device works on.
    running: Option<StepOutput>,
    node_name: String,
}

impl Relay {
    pub(super) fn new(
        shard: Shard,
        ranks: Ranks,
        spec: EngineSpec,
        commands: mpsc::Receiver<Command>,
        faults: watch::Sender<Fault>,
        node_name: String,
    ) -> Self {
        let (output, others, running) = (None, Vec::new(), None);
        Self { shard, ranks, spec, commands, faults, epoch: Epoch(0), next_number: 1, output, others, running, node_name }
    }

    /// Until the commands end.
    pub(super) fn run(mut self) {
        while let Some(command) = self.next_command() {
            match command {
                Command::Link { epoch, output, ranks, join } => {
                    self.settle();
                    (self.epoch, self.next_number) = (epoch, 1);
                    (self.output, self.others) = (output, ranks);
                    self.shard.clear();
                    self.ranks.join(join, || self.shard.warm_up());
                }
                Command::Step(frame) if Epoch(frame.epoch) == self.epoch => {
                    let taken = self.take(*frame);
                    // Rank 0 counts on this rank for the collectives of the step.
                    let taken = if self.spec.place.rank > 0 { self.ranks.check(taken) } else { taken };
                    if let Err(message) = taken {
                        self.fail(format!("{}: {message}", self.node_name));
                    }
                }
                // Whoever sends it believes in an epoch that is over here, and has to hear of it.
                Command::Step(frame) => {
                    let message = format!("{} is in epoch {}, the step in {}", self.node_name, self.epoch, frame.epoch);
                    self.faults.send_replace(Some((Epoch(frame.epoch), message)));
                }
                Command::Adapter(order) => order.carry_out(&mut self.shard, self.epoch),
                Command::Broken { epoch, message, .. } if epoch == self.epoch => self.fail(message),
                _ => {}
            }
        }
    }

    /// Waits for the device first when nothing else is there to do.
    fn next_command(&mut self) -> Option<Command> {
        if self.running.is_some() {
            match self.commands.try_recv() {
                Ok(command) => return Some(command),
                Err(TryRecvError::Empty) => self.settle(),
                Err(TryRecvError::Disconnected) => return None,
            }
        }
        self.commands.blocking_recv()
    }

    fn take(&mut self, frame: wire::StepFrame) -> Result<(), String> {
        // What comes is shared by copies, not copied.
        let forwarded = (!self.others.is_empty()).then(|| frame.clone());
        let busy_before = frame.busy_ns;
        let (step, received) = frame.into_step().map_err(|error| error.to_string())?;
        if step.number != self.next_number {
            return Err(format!("step {} came where step {} was due", step.number, self.next_number));
        }
        self.next_number += 1;
        let input = if self.spec.is_first() { None } else { Some(tensors::read(received)?) };
        let start = Instant::now();
        let work = self.ranks.step();
        if let Some(frame) = forwarded {
            self.ranks.check(forward(&self.others, frame))?;
        }
        let output = self.ranks.check(self.shard.apply(&step, input))?;
        if self.spec.place.rank > 0 {
            return self.run_ahead(output);
        }
        let busy = || busy_before + start.elapsed().as_nanos() as u64;
        let outgoing = match output {
            StepOutput::Activations(activations) => {
                let tensors = self.ranks.check(tensors::write(&activations))?;
                Outgoing::Step(wire::StepFrame { busy_ns: busy(), ..wire::StepFrame::new(step, tensors) })
            }
            StepOutput::Result(pending) => {
                let result = self.ranks.check(pending.read())?;
                Outgoing::Result(wire::StepResult { busy_ns: busy(), ..result.into() })
            }
        };
        drop(work);
        let output = self.output.as_ref().ok_or("the next engine is not connected")?;
        output.blocking_send(outgoing).map_err(|_| "the connection to the next engine is gone".to_owned())
    }

    /// Ranks above 0 evaluate what a step leaves like rank 0, because collectives run on all; nobody reads it here. The step before is
    /// waited for while the device works on this one.
    fn run_ahead(&mut self, output: StepOutput) -> Result<(), String> {
        let started = match &output {
            StepOutput::Activations(activations) => activations.start(),
            StepOutput::Result(pending) => pending.start(),
        };
        self.ranks.check(started)?;
        let before = self.running.replace(output);
        self.ranks.check(before.map_or(Ok(()), wait))
    }

    /// Until nothing runs any more.
    fn settle(&mut self) {
        let Some(output) = self.running.take() else { return };
        let _work = self.ranks.step();
        if let Err(message) = self.ranks.check(wait(output)) {
            self.fail(message);
        }
    }

    fn fail(&mut self, message: String) {
        tracing::warn!(message, epoch = self.epoch.0, "the epoch is broken");
        self.faults.send_replace(Some((self.epoch, message)));
        self.epoch = Epoch(0);
        self.output = None;
        self.others.clear();
        self.settle();
        self.shard.clear();
    }
}

/// Hands a step to the other ranks of the stage, as it came.
pub(super) fn forward(ranks: &[mpsc::Sender<Outgoing>], frame: wire::StepFrame) -> Result<(), String> {
    for rank in ranks {
        rank.blocking_send(Outgoing::Step(frame.clone())).map_err(|_| "the connection to another rank is gone".to_owned())?;
    }
    Ok(())
}

fn wait(output: StepOutput) -> Result<(), LmError> {
    match output {
        StepOutput::Activations(activations) => activations.wait(),
        StepOutput::Result(pending) => pending.read().map(drop),
    }
}

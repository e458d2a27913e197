//! The loop of a stage behind the first: applies the steps that come and hands on what they make. Owns every array of its process.

use super::{Command, Outgoing, tensors};
use mlx_cluster_common::ids::Epoch;
use mlx_cluster_lm::shard::{Shard, StepOutput};
use mlx_cluster_proto::wire;
use std::time::Instant;
use tokio::sync::{mpsc, watch};

/// The newest epoch that failed here, and why; whoever feeds this stage is told so.
pub(super) type Fault = Option<(Epoch, String)>;

pub(super) struct Relay {
    shard: Shard,
    commands: mpsc::Receiver<Command>,
    faults: watch::Sender<Fault>,
    epoch: Epoch,
    next_number: u64,
    output: Option<mpsc::Sender<Outgoing>>,
    node_name: String,
}

impl Relay {
    pub(super) fn new(shard: Shard, commands: mpsc::Receiver<Command>, faults: watch::Sender<Fault>, node_name: String) -> Self {
        Self { shard, commands, faults, epoch: Epoch(0), next_number: 1, output: None, node_name }
    }

    /// Until the commands end.
    pub(super) fn run(mut self) {
        while let Some(command) = self.commands.blocking_recv() {
            match command {
                Command::Link { epoch, output } => {
                    self.epoch = epoch;
                    self.next_number = 1;
                    self.output = output;
                    self.shard.clear();
                }
                Command::Step(frame) if Epoch(frame.epoch) == self.epoch => {
                    if let Err(message) = self.apply(*frame) {
                        self.fail(format!("{}: {message}", self.node_name));
                    }
                }
                // Whoever sends it believes in an epoch that is over here, and has to hear of it.
                Command::Step(frame) => {
                    let message = format!("{} is in epoch {}, the step in {}", self.node_name, self.epoch, frame.epoch);
                    self.faults.send_replace(Some((Epoch(frame.epoch), message)));
                }
                Command::Broken { epoch, message, .. } if epoch == self.epoch => self.fail(message),
                _ => {}
            }
        }
    }

    fn apply(&mut self, frame: wire::StepFrame) -> Result<(), String> {
        let busy_before = frame.busy_ns;
        let (step, received) = frame.into_step().map_err(|error| error.to_string())?;
        if step.number != self.next_number {
            return Err(format!("step {} came where step {} was due", step.number, self.next_number));
        }
        self.next_number += 1;
        let input = tensors::read(received)?;
        let start = Instant::now();
        let busy = || busy_before + start.elapsed().as_nanos() as u64;
        let outgoing = match self.shard.apply(&step, Some(input)).map_err(|error| error.to_string())? {
            StepOutput::Activations(activations) => {
                let tensors = tensors::write(&activations)?;
                Outgoing::Step(wire::StepFrame { busy_ns: busy(), ..wire::StepFrame::new(step, tensors) })
            }
            StepOutput::Result(pending) => {
                let result = pending.read().map_err(|error| error.to_string())?;
                Outgoing::Result(wire::StepResult { busy_ns: busy(), ..result.into() })
            }
        };
        let output = self.output.as_ref().ok_or("the next engine is not connected")?;
        output.blocking_send(outgoing).map_err(|_| "the connection to the next engine is gone".to_owned())
    }

    fn fail(&mut self, message: String) {
        tracing::warn!(message, epoch = self.epoch.0, "the epoch is broken");
        self.faults.send_replace(Some((self.epoch, message)));
        self.epoch = Epoch(0);
        self.output = None;
        self.shard.clear();
    }
}

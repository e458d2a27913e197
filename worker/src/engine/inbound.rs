//! The stream of a neighbour that feeds this engine: frames in, heartbeats out, both of one epoch.

use super::{Command, relay::Fault};
use mlx_cluster_common::ids::Epoch;
use mlx_cluster_proto::wire;
use std::time::{Duration, Instant};
use tokio::{
    sync::{mpsc, watch},
    time::interval,
};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

/// Both sides of a stream say something at least this often.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(1);
/// A peer that said nothing for this long is taken for lost.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(8);

/// What a neighbour sends.
pub(super) trait Frame: Send + 'static {
    /// Who sends it, for messages.
    const SENDER: &'static str;

    fn epoch(&self) -> Epoch;

    /// None for a frame that only says that the sender is alive.
    fn into_command(self) -> Option<Command>;
}

impl Frame for wire::StepFrame {
    const SENDER: &'static str = "the stage before";

    fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    fn into_command(self) -> Option<Command> {
        (self.number > 0).then(|| Command::Step(Box::new(self)))
    }
}

impl Frame for wire::StepResult {
    const SENDER: &'static str = "the last stage";

    fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    fn into_command(self) -> Option<Command> {
        (self.number > 0).then_some(Command::Result(self))
    }
}

pub(super) struct Inbound<F> {
    pub(super) frames: Streaming<F>,
    pub(super) commands: mpsc::Sender<Command>,
    /// The epoch that this engine was linked for last.
    pub(super) epoch: watch::Receiver<Epoch>,
    pub(super) faults: watch::Receiver<Fault>,
}

/// Why a stream ends, told to the sender or to the thread that owns the arrays.
enum End {
    /// The sender is gone or breaks the rules.
    Lost(String),
    /// This engine cannot go on with the sender's epoch.
    Refused(Status),
    /// Nobody needs to know.
    Quiet,
}

/// What the stream waits for.
enum Event<F> {
    Frame(Option<Result<F, Status>>),
    Tick,
    /// This engine was linked anew, or failed.
    State(bool),
}

impl<F: Frame> Inbound<F> {
    /// Until the stream ends for whatever reason; an engine may be connected to before it is linked itself.
    pub(super) async fn run(mut self, heartbeats: mpsc::Sender<Result<wire::Heartbeat, Status>>) {
        let mut sender_epoch = None;
        match self.relay(&heartbeats, &mut sender_epoch).await {
            End::Lost(message) => {
                let epoch = sender_epoch.unwrap_or_default();
                // The thread that takes commands lives as long as the process.
                drop(self.commands.send(Command::Broken { epoch, node: F::SENDER.into(), message }).await);
            }
            // The sender may be gone by now.
            End::Refused(status) => drop(heartbeats.send(Err(status)).await),
            End::Quiet => {}
        }
    }

    async fn relay(&mut self, heartbeats: &mpsc::Sender<Result<wire::Heartbeat, Status>>, sender_epoch: &mut Option<Epoch>) -> End {
        let mut ticks = interval(HEARTBEAT);
        let mut heard = Instant::now();
        loop {
            let event = tokio::select! {
                frame = self.frames.next() => Event::Frame(frame),
                _ = ticks.tick() => Event::Tick,
                changed = self.epoch.changed() => Event::State(changed.is_ok()),
                changed = self.faults.changed() => Event::State(changed.is_ok()),
            };
            match event {
                Event::Frame(Some(Ok(frame))) => {
                    heard = Instant::now();
                    *sender_epoch = Some(frame.epoch());
                    if let Some(command) = frame.into_command()
                        && self.commands.send(command).await.is_err()
                    {
                        return End::Quiet;
                    }
                }
                Event::Frame(Some(Err(status))) => return End::Lost(format!("lost {}: {}", F::SENDER, status.message())),
                Event::Frame(None) => return End::Lost(format!("{} closed its stream", F::SENDER)),
                Event::Tick if heard.elapsed() > SILENCE_MAX => {
                    return End::Lost(format!("{} was silent for {} s", F::SENDER, SILENCE_MAX.as_secs()));
                }
                Event::Tick => {
                    if heartbeats.send(Ok(wire::Heartbeat::default())).await.is_err() {
                        return End::Lost(format!("{} listens no more", F::SENDER));
                    }
                }
                Event::State(false) => return End::Refused(Status::unavailable("the engine is stopping")),
                Event::State(true) => {}
            }
            if let Some(status) = self.refusal(*sender_epoch) {
                return End::Refused(status);
            }
        }
    }

    /// Why this engine cannot work with a sender of that epoch, if so.
    fn refusal(&self, sender: Option<Epoch>) -> Option<Status> {
        let sender = sender?;
        if let Some((epoch, message)) = self.faults.borrow().as_ref()
            && *epoch == sender
        {
            return Some(Status::aborted(message.clone()));
        }
        let own = *self.epoch.borrow();
        (own > sender).then(|| Status::cancelled(format!("linked anew, for epoch {own}")))
    }
}

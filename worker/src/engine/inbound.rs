//! The stream of a neighbour that feeds this engine: frames in, heartbeats out, both of one epoch.

use super::{Command, relay::Fault, watchdog::Watchdog};
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
    const ROLE: &'static str;

    fn epoch(&self) -> Epoch;

    /// The sender's worker; empty but in the first frame.
    fn sender(&self) -> &str;

    /// Nothing follows, because the sender is done with the epoch; only ranks of a group need to know.
    fn is_farewell(&self) -> bool;

    /// None for a frame that only says that the sender is alive.
    fn into_command(self) -> Option<Command>;
}

impl Frame for wire::StepFrame {
    const ROLE: &'static str = "the engine that sends steps";

    fn sender(&self) -> &str {
        &self.sender
    }

    fn is_farewell(&self) -> bool {
        self.farewell
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.epoch)
    }

    fn into_command(self) -> Option<Command> {
        (self.number > 0).then(|| Command::Step(Box::new(self)))
    }
}

impl Frame for wire::StepResult {
    const ROLE: &'static str = "the last stage";

    fn sender(&self) -> &str {
        &self.sender
    }

    fn is_farewell(&self) -> bool {
        false
    }

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
    /// When the sender is rank 0 of this engine's own group: told when it is lost.
    pub(super) group: Option<Watchdog>,
}

/// What the sender's frames said of it.
struct Sender {
    epoch: Option<Epoch>,
    /// Its role, or its worker as soon as that is known.
    name: String,
}

/// Why a stream ends, told to the sender or to the thread that owns the arrays.
enum End {
    /// The sender is gone or breaks the rules.
    Lost(String),
    /// The sender said farewell: its epoch is over.
    Closed(String),
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
        let mut sender = Sender { epoch: None, name: F::ROLE.to_owned() };
        let end = self.relay(&heartbeats, &mut sender).await;
        if let (End::Lost(message), Some(group)) = (&end, &self.group) {
            group.lost(0, message);
        }
        match end {
            End::Lost(message) | End::Closed(message) => {
                let epoch = sender.epoch.unwrap_or_default();
                // The thread that takes commands lives as long as the process.
                drop(self.commands.send(Command::Broken { epoch, node: sender.name, message }).await);
            }
            // The sender may be gone by now.
            End::Refused(status) => drop(heartbeats.send(Err(status)).await),
            End::Quiet => {}
        }
    }

    async fn relay(&mut self, heartbeats: &mpsc::Sender<Result<wire::Heartbeat, Status>>, sender: &mut Sender) -> End {
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
                Event::Frame(Some(Ok(frame))) if frame.is_farewell() => return End::Closed(sender.ended()),
                Event::Frame(Some(Ok(frame))) => {
                    heard = Instant::now();
                    sender.hear(&frame);
                    if let Some(command) = frame.into_command()
                        && self.commands.send(command).await.is_err()
                    {
                        return End::Quiet;
                    }
                }
                Event::Frame(Some(Err(status))) => return End::Lost(format!("lost {}: {}", sender.name, status.message())),
                Event::Frame(None) => return End::Lost(sender.ended()),
                Event::Tick if heard.elapsed() > SILENCE_MAX => {
                    return End::Lost(format!("{} was silent for {} s", sender.name, SILENCE_MAX.as_secs()));
                }
                Event::Tick => {
                    if heartbeats.send(Ok(wire::Heartbeat::default())).await.is_err() {
                        return End::Lost(format!("{} listens no more", sender.name));
                    }
                }
                Event::State(false) => return End::Refused(Status::unavailable("the engine is stopping")),
                Event::State(true) => {}
            }
            if let Some(status) = self.refusal(sender.epoch) {
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
        (own > sender).then(|| Status::aborted(format!("linked anew, for epoch {own}")))
    }
}

impl Sender {
    fn hear(&mut self, frame: &impl Frame) {
        self.epoch = Some(frame.epoch());
        if !frame.sender().is_empty() {
            self.name = frame.sender().to_owned();
        }
    }

    fn ended(&self) -> String {
        format!("{} closed its stream", self.name)
    }
}

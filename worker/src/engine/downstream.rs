//! Sends what a stage makes to the next engine, or steps to another rank of its own, and notices when that one is gone.

use super::{
    Command, Outgoing,
    inbound::{HEARTBEAT, SILENCE_MAX},
    watchdog::Watchdog,
};
use mlx_cluster_common::{engine::Peer, ids::Epoch};
use mlx_cluster_proto::{
    net,
    wire::{self, engine_client::EngineClient},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

/// Messages that wait for the network.
const IN_FLIGHT: usize = 8;

/// Who is fed.
#[derive(Debug, Clone)]
pub(super) enum Target {
    NextStage,
    /// Takes results.
    Lead,
    /// Of this engine's own group.
    Rank(usize, Watchdog),
}

/// Whom to connect to, and for which epoch. `from` is this engine's worker, for messages.
pub(super) struct Call<'a> {
    pub(super) from: &'a str,
    pub(super) epoch: Epoch,
    pub(super) target: Target,
    pub(super) peer: Peer,
}

/// A standing connection to another engine.
pub(super) struct Downstream {
    target: Target,
    peer: Peer,
    epoch: Epoch,
    steps: mpsc::Sender<wire::StepFrame>,
    results: mpsc::Sender<wire::StepResult>,
    heartbeats: Streaming<wire::Heartbeat>,
}

impl Downstream {
    pub(super) async fn connect(call: Call<'_>) -> Result<Self, Status> {
        let Call { from, epoch, target, peer } = call;
        let channel = net::connect(&peer.name, &peer.addresses).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let mut client =
            EngineClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX).max_encoding_message_size(net::MESSAGE_BYTES_MAX);
        let (steps, step_stream) = mpsc::channel(IN_FLIGHT);
        let (results, result_stream) = mpsc::channel(IN_FLIGHT);
        // The peer learns from the first frame which epoch the stream belongs to and whose it is. The channels are empty, so there is room.
        drop(steps.try_send(wire::StepFrame { sender: from.to_owned(), ..alive_step(epoch) }));
        drop(results.try_send(wire::StepResult { sender: from.to_owned(), ..alive_result(epoch) }));
        let heartbeats = match &target {
            Target::NextStage | Target::Rank(..) => open(&peer, client.steps(ReceiverStream::new(step_stream))).await?,
            Target::Lead => open(&peer, client.results(ReceiverStream::new(result_stream))).await?,
        };
        Ok(Self { target, peer, epoch, steps, results, heartbeats })
    }

    /// Sends what comes from the thread until the epoch is cancelled or the peer is lost; then says so.
    pub(super) async fn run(
        mut self,
        mut outgoing: mpsc::Receiver<Outgoing>,
        commands: mpsc::Sender<Command>,
        cancelled: CancellationToken,
    ) {
        let end = tokio::select! {
            () = cancelled.cancelled() => None,
            end = send_all(&self.steps, &self.results, self.epoch, &mut outgoing) => end,
            end = listen(&mut self.heartbeats) => Some(end),
        };
        let Some(End { message, is_loss }) = end else { return self.take_leave(outgoing).await };
        let Peer { name, .. } = self.peer;
        if let (Target::Rank(rank, group), true) = (&self.target, is_loss) {
            group.lost(*rank, &message);
        }
        let message = format!("lost {name}: {message}");
        // The thread that takes commands lives as long as the process.
        drop(commands.send(Command::Broken { epoch: self.epoch, node: name, message }).await);
    }
}

impl Downstream {
    /// The epoch is over: a rank of this group gets what it has to take part in still, and hears that this engine lives on.
    async fn take_leave(mut self, mut outgoing: mpsc::Receiver<Outgoing>) {
        if !matches!(self.target, Target::Rank(..)) {
            return;
        }
        let farewell = async {
            while let Ok(Outgoing::Step(frame)) = outgoing.try_recv() {
                self.steps.send(frame).await?;
            }
            self.steps.send(wire::StepFrame { farewell: true, ..alive_step(self.epoch) }).await?;
            while let Some(Ok(_)) = self.heartbeats.next().await {}
            Ok::<_, mpsc::error::SendError<_>>(())
        };
        // A rank that does not hear it takes this engine for lost, and ends.
        drop(timeout(HEARTBEAT, farewell).await);
    }
}

/// Why a connection is of no more use.
struct End {
    message: String,
    /// The peer is gone, or seems to be; else it says that it is done with the epoch.
    is_loss: bool,
}

impl End {
    fn loss(message: impl Into<String>) -> Self {
        Self { message: message.into(), is_loss: true }
    }
}

async fn open(
    peer: &Peer,
    call: impl Future<Output = Result<tonic::Response<Streaming<wire::Heartbeat>>, Status>>,
) -> Result<Streaming<wire::Heartbeat>, Status> {
    match timeout(net::CONNECT_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Status::unavailable(format!("{} refused the stream: {}", peer.name, status.message()))),
        Err(_) => Err(Status::deadline_exceeded(format!("{} did not open the stream", peer.name))),
    }
}

/// Ends with None when the thread is done with this epoch.
async fn send_all(
    steps: &mpsc::Sender<wire::StepFrame>,
    results: &mpsc::Sender<wire::StepResult>,
    epoch: Epoch,
    outgoing: &mut mpsc::Receiver<Outgoing>,
) -> Option<End> {
    loop {
        let sent = match timeout(HEARTBEAT, outgoing.recv()).await {
            Ok(Some(Outgoing::Step(frame))) => steps.send(frame).await.is_ok(),
            Ok(Some(Outgoing::Result(result))) => results.send(result).await.is_ok(),
            Ok(None) => return None,
            Err(_) => {
                // Only one of the two streams is open; a full one is busy anyway.
                drop((steps.try_send(alive_step(epoch)), results.try_send(alive_result(epoch))));
                true
            }
        };
        if !sent {
            return Some(End::loss("it closed the connection"));
        }
    }
}

/// Frames without a number only say that this side is alive.
fn alive_step(epoch: Epoch) -> wire::StepFrame {
    wire::StepFrame { epoch: epoch.0, ..Default::default() }
}

fn alive_result(epoch: Epoch) -> wire::StepResult {
    wire::StepResult { epoch: epoch.0, ..Default::default() }
}

async fn listen(heartbeats: &mut Streaming<wire::Heartbeat>) -> End {
    loop {
        match timeout(SILENCE_MAX, heartbeats.next()).await {
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(status))) => return End { message: status.message().to_owned(), is_loss: status.code() != Code::Aborted },
            Ok(None) => return End::loss("it ended the stream"),
            Err(_) => return End::loss(format!("no sign of life for {} s", SILENCE_MAX.as_secs())),
        }
    }
}

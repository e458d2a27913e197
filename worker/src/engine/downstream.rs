//! Sends what a stage makes to the next engine, and notices when that one is gone.

use super::{
    Command, Outgoing,
    inbound::{HEARTBEAT, SILENCE_MAX},
};
use mlx_cluster_common::{engine::Peer, ids::Epoch};
use mlx_cluster_proto::{
    net,
    wire::{self, engine_client::EngineClient},
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

/// Messages that wait for the network.
const IN_FLIGHT: usize = 8;

/// A standing connection to the next engine.
pub(super) struct Downstream {
    peer: Peer,
    epoch: Epoch,
    steps: mpsc::Sender<wire::StepFrame>,
    results: mpsc::Sender<wire::StepResult>,
    heartbeats: Streaming<wire::Heartbeat>,
}

impl Downstream {
    /// Connects to `peer`: the next stage when `to_stage`, else the lead, who takes results.
    pub(super) async fn connect(peer: Peer, epoch: Epoch, to_stage: bool) -> Result<Self, Status> {
        let channel = net::connect(&peer.name, &peer.addresses).await.map_err(|error| Status::unavailable(error.to_string()))?;
        let mut client =
            EngineClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX).max_encoding_message_size(net::MESSAGE_BYTES_MAX);
        let (steps, step_stream) = mpsc::channel(IN_FLIGHT);
        let (results, result_stream) = mpsc::channel(IN_FLIGHT);
        // The peer learns from the first frame which epoch the stream belongs to. The channels are empty, so there is room.
        drop((steps.try_send(alive_step(epoch)), results.try_send(alive_result(epoch))));
        let heartbeats = match to_stage {
            true => open(&peer, client.steps(ReceiverStream::new(step_stream))).await?,
            false => open(&peer, client.results(ReceiverStream::new(result_stream))).await?,
        };
        Ok(Self { peer, epoch, steps, results, heartbeats })
    }

    /// Sends what comes from the thread until the epoch is cancelled or the peer is lost; then says so.
    pub(super) async fn run(
        mut self,
        mut outgoing: mpsc::Receiver<Outgoing>,
        commands: mpsc::Sender<Command>,
        cancelled: CancellationToken,
    ) {
        let message = tokio::select! {
            () = cancelled.cancelled() => None,
            message = send_all(&self.steps, &self.results, self.epoch, &mut outgoing) => message,
            message = listen(&mut self.heartbeats) => Some(message),
        };
        let Some(message) = message else { return };
        let Peer { name, .. } = self.peer;
        let message = format!("lost {name}: {message}");
        // The thread that takes commands lives as long as the process.
        drop(commands.send(Command::Broken { epoch: self.epoch, node: name, message }).await);
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
) -> Option<String> {
    let gone = || Some("it closed the connection".to_owned());
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
            return gone();
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

async fn listen(heartbeats: &mut Streaming<wire::Heartbeat>) -> String {
    loop {
        match timeout(SILENCE_MAX, heartbeats.next()).await {
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(status))) => return status.message().to_owned(),
            Ok(None) => return "it ended the stream".to_owned(),
            Err(_) => return format!("no sign of life for {} s", SILENCE_MAX.as_secs()),
        }
    }
}

//! What goes between the engines of two stages: activations to the one after, gradients back, over one stream.

use super::Control;
use crate::engine::{
    inbound::SILENCE_MAX,
    tensors::{read, write},
};
use mlx_cluster_common::{engine::Peer, ids::Epoch};
use mlx_cluster_lm::activations::Activations;
use mlx_cluster_proto::{
    net,
    wire::{self, trainer_client::TrainerClient},
};
use std::time::Duration;
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

/// Messages that wait for the network; who is slower makes the other wait.
const IN_FLIGHT: usize = 8;
/// Another stage computes for no longer than this on one micro-batch.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(180);

/// Who is at fault, by the worker's name, and what happened.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) node: Option<String>,
    pub(super) message: String,
}

impl From<String> for Trouble {
    /// At fault is this engine.
    fn from(message: String) -> Self {
        Self { node: None, message }
    }
}

/// To and from the engine of the stage before or after, for one epoch.
pub(super) struct Passages {
    epoch: Epoch,
    /// The other worker.
    name: String,
    sent: u64,
    received: u64,
    to: mpsc::Sender<wire::Passage>,
    from: mpsc::Receiver<Result<wire::Passage, String>>,
}

impl Passages {
    /// Waits for room on the way, at most [`WAIT_MAX`].
    pub(super) fn send(&mut self, runtime: &Handle, activations: &Activations) -> Result<(), Trouble> {
        let tensors = write(activations)?;
        self.sent += 1;
        let passage = wire::Passage { epoch: self.epoch.0, sender: String::new(), number: self.sent, tensors };
        match runtime.block_on(async { timeout(WAIT_MAX, self.to.send(passage)).await }) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.trouble("its engine closed the connection")),
            Err(_) => Err(self.trouble(&format!("its engine took nothing for {} s", WAIT_MAX.as_secs()))),
        }
    }

    /// Waits for what the other stage makes of the next micro-batch.
    pub(super) fn receive(&mut self, runtime: &Handle) -> Result<Activations, Trouble> {
        let passage = match runtime.block_on(async { timeout(WAIT_MAX, self.from.recv()).await }) {
            Ok(Some(Ok(passage))) => passage,
            Ok(Some(Err(message))) => return Err(self.trouble(&message)),
            Ok(None) => return Err(self.trouble("its engine closed the connection")),
            Err(_) => return Err(self.trouble(&format!("its engine sent nothing for {} s", WAIT_MAX.as_secs()))),
        };
        self.received += 1;
        if passage.number != self.received {
            return Err(self.trouble(&format!("it sent micro-batch {} where {} was due", passage.number, self.received)));
        }
        Ok(read(passage.tensors)?)
    }

    fn trouble(&self, message: &str) -> Trouble {
        Trouble { node: Some(self.name.clone()), message: format!("lost {}: {message}", self.name) }
    }
}

/// Connects to the engine of the next stage for as long as the epoch lives. `own_name` is this worker's.
pub(super) async fn connect(
    own_name: &str,
    epoch: Epoch,
    peer: Peer,
    cancelled: CancellationToken,
) -> Result<(Passages, impl Future<Output = ()> + Send + use<>), Status> {
    let channel = net::connect(&peer.name, &peer.addresses).await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client =
        TrainerClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX).max_encoding_message_size(net::MESSAGE_BYTES_MAX);
    let (to, outgoing) = mpsc::channel(IN_FLIGHT);
    // The peer learns from the first message whose stream it is. The channel is empty, so there is room.
    drop(to.try_send(wire::Passage { epoch: epoch.0, sender: own_name.to_owned(), number: 0, tensors: Vec::new() }));
    let answer = timeout(net::CONNECT_TIMEOUT, client.exchange(ReceiverStream::new(outgoing))).await;
    let incoming = match answer {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Err(Status::unavailable(format!("{} refused the stream: {}", peer.name, status.message()))),
        Err(_) => return Err(Status::deadline_exceeded(format!("{} did not open the stream", peer.name))),
    };
    let (heard, from) = mpsc::channel(IN_FLIGHT);
    let passages = Passages { epoch, name: peer.name, sent: 0, received: 0, to, from };
    Ok((passages, listen(incoming, heard, cancelled)))
}

/// Takes the stream of the stage before: says so to the thread that owns the arrays, and gives what goes back.
pub(super) async fn accept(
    mut incoming: Streaming<wire::Passage>,
    control: mpsc::Sender<Control>,
    own_epoch: watch::Receiver<Epoch>,
    ended: CancellationToken,
) -> Result<(impl Stream<Item = Result<wire::Passage, Status>> + Send, impl Future<Output = ()> + Send + use<>), Status> {
    let first = timeout(SILENCE_MAX, incoming.next()).await.map_err(|_| Status::deadline_exceeded("nothing came"))?;
    let Some(Ok(wire::Passage { epoch, sender, .. })) = first else {
        return Err(Status::invalid_argument("a stream starts with its epoch and sender"));
    };
    let (epoch, own) = (Epoch(epoch), *own_epoch.borrow());
    if epoch < own {
        return Err(Status::failed_precondition(format!("epoch {epoch} is over, this is {own}")));
    }
    let (to, outgoing) = mpsc::channel(IN_FLIGHT);
    let (heard, from) = mpsc::channel(IN_FLIGHT);
    let passages = Passages { epoch, name: sender, sent: 0, received: 0, to, from };
    control.send(Control::Before { epoch, passages }).await.map_err(|_| Status::unavailable("the engine is stopping"))?;
    Ok((ReceiverStream::new(outgoing).map(Ok), listen(incoming, heard, ended)))
}

/// Hands on what comes until the stream or the epoch ends.
async fn listen(mut incoming: Streaming<wire::Passage>, heard: mpsc::Sender<Result<wire::Passage, String>>, cancelled: CancellationToken) {
    loop {
        let next = tokio::select! {
            () = cancelled.cancelled() => return,
            () = heard.closed() => return,
            next = incoming.next() => next,
        };
        let (message, is_last) = match next {
            Some(Ok(passage)) if passage.number == 0 => continue,
            Some(Ok(passage)) => (Ok(passage), false),
            Some(Err(status)) => (Err(net::cause_of(&status)), true),
            None => (Err("its engine ended the stream".to_owned()), true),
        };
        if heard.send(message).await.is_err() || is_last {
            return;
        }
    }
}

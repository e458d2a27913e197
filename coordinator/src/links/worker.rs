//! One worker's stream: connects, keeps it alive, sends what is wanted, reports what is the case; again and again until forgotten.

use super::{Desired, Note};
use crate::{
    core::event::{Event, Snapshot},
    discovery::Peer,
};
use mlx_cluster_common::{engine::EngineStatus, ids::NodeId};
use mlx_cluster_proto::{
    WireError, net,
    wire::{self, Hello, worker_client::WorkerClient},
};
use std::{convert::Infallible, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A worker that measures itself for the first time takes a while.
const FACTS_TIMEOUT: Duration = Duration::from_secs(60);
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// A worker that does not take a message for so long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(3);
const OBSERVED_BYTES_MAX: usize = 4 << 20;
const OUTGOING: usize = 4;

/// Why a worker's stream does not stand.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Connect(#[from] net::ConnectError),
    #[error("{}", .0.message())]
    Status(#[from] Status),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0}")]
    Held(String),
    #[error("the address belongs to another node now")]
    OtherNode,
    #[error("no answer within {} s", .0.as_secs())]
    TooSlow(Duration),
    #[error("it closed the connection")]
    Closed,
}

pub(super) struct WorkerTask {
    pub(super) node: NodeId,
    pub(super) hello: Hello,
    pub(super) peer: watch::Receiver<Option<Peer>>,
    pub(super) desired: watch::Receiver<Desired>,
    pub(super) notes: mpsc::Sender<Note>,
}

/// What a standing stream waits for.
enum Next {
    Observed(Box<Result<Option<wire::Observed>, Status>>),
    Changed,
    KeepAlive,
    TooSlow,
}

impl WorkerTask {
    /// Ends when the worker is forgotten and not connected, or the driver is gone.
    pub(super) async fn run(mut self) {
        let (mut backoff, mut last_reason) = (BACKOFF_MIN, String::new());
        while let Some(peer) = self.known() {
            let mut was_up = false;
            let Err(error) = self.stand(&peer, &mut was_up).await;
            if was_up {
                (backoff, last_reason) = (BACKOFF_MIN, String::new());
                let down = Event::WorkerDown { node: self.node.clone(), cause: error.to_string() };
                if self.notes.send(Note::Event(down)).await.is_err() {
                    return;
                }
            }
            self.report(&peer, &error, &mut last_reason).await;
            // An address that changed is tried at once.
            if !matches!(timeout(backoff, self.peer.changed()).await, Ok(Ok(()))) {
                backoff = (backoff * 2).min(BACKOFF_MAX);
            } else {
                sleep(BACKOFF_MIN).await;
            }
        }
        // Fails only when the driver has ended.
        drop(self.notes.send(Note::LinkEnded(self.node.clone())).await);
    }

    fn known(&mut self) -> Option<Peer> {
        self.peer.borrow_and_update().clone()
    }

    async fn report(&self, peer: &Peer, error: &LinkError, last_reason: &mut String) {
        if let LinkError::Held(message) = error {
            let held = Note::Held { node: self.node.clone(), message: message.clone() };
            drop(self.notes.send(held).await);
        }
        let reason = error.to_string();
        if reason != *last_reason {
            tracing::warn!(worker = peer.name, "not connected: {reason}");
            *last_reason = reason;
        }
    }

    /// Connects to the first address that answers as this worker, and stays as long as the stream does.
    async fn stand(&mut self, peer: &Peer, was_up: &mut bool) -> Result<Infallible, LinkError> {
        let mut failure = net::ConnectError::NoAddress { name: peer.name.clone() }.into();
        for address in &peer.addresses {
            match self.stand_at(peer, address, was_up).await {
                Err(error @ (LinkError::Connect(_) | LinkError::OtherNode)) => failure = error,
                Err(error) => return Err(error),
            }
        }
        Err(failure)
    }

    async fn stand_at(&mut self, peer: &Peer, address: &String, was_up: &mut bool) -> Result<Infallible, LinkError> {
        let channel = net::connect(&peer.name, std::slice::from_ref(address)).await?;
        let mut client = WorkerClient::new(channel).max_decoding_message_size(OBSERVED_BYTES_MAX);
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let mut first = message(&self.desired.borrow_and_update());
        first.hello = Some(self.hello.clone());
        outgoing.send(first).await.map_err(|_| LinkError::Closed)?;
        let opened = timeout(OPEN_TIMEOUT, client.supervise(ReceiverStream::new(messages))).await;
        let mut observed = opened.map_err(|_| LinkError::TooSlow(OPEN_TIMEOUT))?.map_err(refusal)?.into_inner();
        self.converse(address, &mut observed, &outgoing, was_up).await
    }

    async fn converse(
        &mut self,
        address: &str,
        observed: &mut Streaming<wire::Observed>,
        outgoing: &mpsc::Sender<wire::Desired>,
        was_up: &mut bool,
    ) -> Result<Infallible, LinkError> {
        let mut ticks = interval(KEEP_ALIVE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut late = std::pin::pin!(sleep(FACTS_TIMEOUT));
        loop {
            let next = tokio::select! {
                message = observed.message() => Next::Observed(Box::new(message)),
                Ok(()) = self.desired.changed() => Next::Changed,
                _ = ticks.tick() => Next::KeepAlive,
                () = &mut late, if !*was_up => Next::TooSlow,
            };
            match next {
                Next::Observed(snapshot) => {
                    let snapshot = (*snapshot)?.ok_or(LinkError::Closed)?;
                    let event = self.event(snapshot, address, was_up)?;
                    self.notes.send(Note::Event(event)).await.map_err(|_| LinkError::Closed)?;
                }
                Next::Changed => {
                    let wanted = message(&self.desired.borrow_and_update());
                    let sent = timeout(SEND_TIMEOUT, outgoing.send(wanted)).await.map_err(|_| LinkError::TooSlow(SEND_TIMEOUT))?;
                    sent.map_err(|_| LinkError::Closed)?;
                }
                // A full channel means that other messages are on their way, which is as good.
                Next::KeepAlive => drop(outgoing.try_send(wire::Desired::default())),
                Next::TooSlow => return Err(LinkError::TooSlow(FACTS_TIMEOUT)),
            }
        }
    }

    /// The first snapshot says who it is about.
    fn event(&self, snapshot: wire::Observed, address: &str, was_up: &mut bool) -> Result<Event, LinkError> {
        let wire::Observed { hello, facts, version, engines, links } = snapshot;
        let engines = engines.into_iter().map(EngineStatus::try_from).collect::<Result<Vec<_>, _>>()?;
        let links = links.into_iter().map(|link| link.into_facts(self.node.clone())).collect::<Result<Vec<_>, _>>()?;
        let (facts, snapshot) = (facts.ok_or(WireError::Missing("facts"))?, Snapshot { version, engines, links });
        if *was_up {
            return Ok(Event::WorkerObserved { node: self.node.clone(), addresses: facts.addresses, snapshot });
        }
        let hello = hello.ok_or(WireError::Missing("hello"))?;
        hello.check(&self.hello.cluster)?;
        if hello.node != self.node.0 {
            return Err(LinkError::OtherNode);
        }
        let mut facts = facts.into_facts(&hello);
        facts.name = crate::discovery::printable(&facts.name);
        *was_up = true;
        Ok(Event::WorkerUp { facts: Box::new(facts), reached: address.to_owned(), snapshot })
    }
}

/// A worker tells in words that another coordinator holds it; the code alone also means another version.
fn refusal(status: Status) -> LinkError {
    let held = status.code() == tonic::Code::FailedPrecondition && status.message().contains("already held by coordinator");
    if held { LinkError::Held(crate::discovery::printable_line(status.message())) } else { LinkError::Status(status) }
}

fn message(desired: &Desired) -> wire::Desired {
    let engines = desired.engines.iter().cloned().map(wire::EngineSpec::from).collect();
    let neighbours = desired.neighbours.iter().cloned().map(wire::Peer::from).collect();
    wire::Desired { hello: None, version: desired.version, engines, neighbours }
}

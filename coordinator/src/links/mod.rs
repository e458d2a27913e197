//! The coordinator's connections: one task for each worker, one for the session with the lead, one call for each link.

pub(crate) mod adapter;
pub(crate) mod engine;
pub(crate) mod session;
pub(crate) mod worker;

use crate::{
    adapters::{AdapterAnswer, OpenAdapter, ServeAdapterError},
    core::{event::Event, settings::ModelFacts},
    discovery::{PEERS_MAX, Peer},
};
use mlx_cluster_common::{
    engine::{EngineSpec, Peer as Neighbour},
    ids::NodeId,
};
use mlx_cluster_proto::wire::Hello;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc};
use tokio::sync::{mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// What a task tells the driver.
#[derive(Debug)]
pub(crate) enum Note {
    Event(Event),
    /// Another coordinator holds this worker.
    Held {
        node: NodeId,
        message: String,
    },
    /// An adapter was read for whoever waits for `answer`.
    AdapterRead {
        name: String,
        read: Result<OpenAdapter, ServeAdapterError>,
        answer: AdapterAnswer,
    },
    /// The task of a worker ended, because it was forgotten.
    LinkEnded(NodeId),
}

/// The wanted state of one worker.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Desired {
    pub(crate) version: u64,
    pub(crate) engines: Vec<EngineSpec>,
    /// Whom it shall measure the ways to.
    pub(crate) neighbours: Vec<Neighbour>,
}

struct WorkerLink {
    /// None once it is forgotten: then the task ends with its connection.
    peer: watch::Sender<Option<Peer>>,
    desired: watch::Sender<Desired>,
}

/// All tasks that talk to workers and engines.
pub(crate) struct Links {
    hello: Hello,
    notes: mpsc::Sender<Note>,
    stop: CancellationToken,
    tasks: TaskTracker,
    workers: BTreeMap<NodeId, WorkerLink>,
}

impl Links {
    pub(crate) fn new(hello: Hello, notes: mpsc::Sender<Note>) -> Self {
        Self { hello, notes, stop: CancellationToken::new(), tasks: TaskTracker::new(), workers: BTreeMap::new() }
    }

    /// A worker was seen: connects to it, or takes note of where it is now.
    pub(crate) fn seen(&mut self, peer: Peer) {
        let node = peer.node.clone();
        if let Some(link) = self.workers.get(&node) {
            link.peer.send_if_modified(|known| {
                let changed = known.as_ref() != Some(&peer);
                *known = Some(peer);
                changed
            });
            return;
        }
        if self.workers.len() >= PEERS_MAX {
            tracing::warn!(worker = peer.name, "{PEERS_MAX} workers are known already; this one is left out");
            return;
        }
        let (peer, peers) = watch::channel(Some(peer));
        let (desired, desires) = watch::channel(Desired::default());
        let task =
            worker::WorkerTask { node: node.clone(), hello: self.hello.clone(), peer: peers, desired: desires, notes: self.notes.clone() };
        self.workers.insert(node, WorkerLink { peer, desired });
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(task.run()));
    }

    /// A worker's record is gone. A connection that stands goes on.
    pub(crate) fn forget(&mut self, node: &NodeId) {
        if let Some(link) = self.workers.get(node) {
            link.peer.send_replace(None);
        }
    }

    /// The task of a worker ended. If it was seen again just then, it gets a new one.
    pub(crate) fn ended(&mut self, node: &NodeId) {
        let seen_again = self.workers.remove(node).and_then(|link| link.peer.borrow().clone());
        if let Some(peer) = seen_again {
            self.seen(peer);
        }
    }

    pub(crate) fn set_desired(&self, node: &NodeId, desired: Desired) {
        if let Some(link) = self.workers.get(node) {
            link.desired.send_replace(desired);
        }
    }

    /// Calls an engine; the answer comes as a note.
    pub(crate) fn link(&self, call: engine::LinkCall) {
        self.call(call.run());
    }

    pub(crate) fn load_adapter(&self, call: adapter::LoadCall) {
        self.call(call.run());
    }

    pub(crate) fn drop_adapter(&self, call: adapter::DropCall) {
        self.call(call.run());
    }

    /// Reads an adapter from the disk; a note says how it went.
    pub(crate) fn read_adapter(&self, name: String, path: PathBuf, model: Arc<ModelFacts>, answer: AdapterAnswer) {
        let notes = self.notes.clone();
        let work = async move {
            let its_name = name.clone();
            let read = tokio::task::spawn_blocking(move || OpenAdapter::open(&its_name, &path, &model)).await;
            let read = read.unwrap_or_else(|error| Err(ServeAdapterError::Task { cause: error.to_string() }));
            // Fails only when the driver has ended.
            drop(notes.send(Note::AdapterRead { name, read, answer }).await);
        };
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(work));
    }

    fn call(&self, call: impl Future<Output = Event> + Send + 'static) {
        let notes = self.notes.clone();
        let work = async move {
            let event = call.await;
            // Fails only when the driver has ended, and nobody waits for the answer.
            drop(notes.send(Note::Event(event)).await);
        };
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(work));
    }

    pub(crate) fn open_session(&self, call: session::SessionCall) -> session::SessionHandle {
        let (handle, work) = call.start(self.notes.clone(), self.stop.child_token());
        self.tasks.spawn(work);
        handle
    }

    /// Ends all tasks and waits for them.
    pub(crate) async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

//! The runners of training jobs, as the driver sees them: who is told what becomes of a job's engines.

use crate::serving::RunnerNote;
use futures_util::stream::{FuturesUnordered, StreamExt};
use mlx_cluster_common::ids::InstanceId;
use std::{collections::BTreeMap, pin::Pin};
use tokio::sync::{mpsc, oneshot};

/// Dropping it lets go of the runner's channel.
struct Runner {
    notes: mpsc::Sender<RunnerNote>,
    _over: oneshot::Sender<()>,
}

/// One for each job that has engines, or shall have some.
#[derive(Default)]
pub(crate) struct Runners {
    all: BTreeMap<InstanceId, Runner>,
    /// One for each runner; resolves when it is gone, or nothing more is to be told.
    gone: FuturesUnordered<Pin<Box<dyn Future<Output = Option<InstanceId>> + Send>>>,
}

impl Runners {
    pub(crate) fn add(&mut self, instance: InstanceId, notes: mpsc::Sender<RunnerNote>) {
        let (over, is_over) = oneshot::channel::<()>();
        let watched = notes.clone();
        self.gone.push(Box::pin(async move {
            tokio::select! {
                () = watched.closed() => Some(instance),
                // Dropped with the runner.
                _ = is_over => None,
            }
        }));
        self.all.insert(instance, Runner { notes, _over: over });
    }

    /// False when the runner is gone, or does not read what it is told.
    pub(crate) fn tell(&mut self, instance: InstanceId, note: RunnerNote) -> bool {
        let Some(runner) = self.all.get(&instance) else { return true };
        let (is_last, told) = (matches!(note, RunnerNote::Ended { .. }), runner.notes.try_send(note).is_ok());
        if is_last || !told {
            self.all.remove(&instance);
        }
        told || is_last
    }

    /// The next job whose runner is gone.
    pub(crate) async fn next_gone(&mut self) -> InstanceId {
        loop {
            match self.gone.next().await {
                Some(Some(instance)) => return instance,
                Some(None) => {}
                None => std::future::pending().await,
            }
        }
    }
}

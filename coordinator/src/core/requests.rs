//! The requests that the lead engine works on: each one is answered to its end exactly once.

use super::Now;
use crate::serving::{RequestEvent, RequestFailure};
use mlx_cluster_common::{
    ids::SequenceId,
    request::{Delivery, EngineLoad},
};
use std::{collections::BTreeMap, time::Duration};

/// Requests that may wait for their first token at the same time.
pub(super) const WAITING_MAX: usize = 256;
/// A request without any sign of life for so long, while the lead says that it has nothing to do, is lost.
const FORGOTTEN: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Live {
    started: bool,
    active_at: Now,
}

#[derive(Debug, Default)]
pub(super) struct Requests {
    live: BTreeMap<SequenceId, Live>,
}

impl Requests {
    pub(super) fn admit(&mut self, sequence: SequenceId, now: Now) -> Result<(), RequestFailure> {
        let waiting = self.live.values().filter(|live| !live.started).count();
        if waiting >= WAITING_MAX {
            return Err(RequestFailure::Overloaded { waiting });
        }
        self.live.insert(sequence, Live { started: false, active_at: now });
        Ok(())
    }

    /// What a client is to be told; None for a sequence that is over, and for what is no client's business.
    pub(super) fn deliver(&mut self, delivery: Delivery, now: Now) -> Option<(SequenceId, RequestEvent)> {
        let (sequence, event) = match delivery {
            Delivery::Prompt { sequence, start, tokens } => (sequence, RequestEvent::Prompt { start, tokens }),
            Delivery::Token { sequence, token } => (sequence, RequestEvent::Token(token)),
            Delivery::Finished { sequence, reason } => (sequence, RequestEvent::Finished(reason)),
            Delivery::Refused { sequence, message } => (sequence, RequestEvent::Failed(RequestFailure::Refused { message })),
            Delivery::Load(_) => return None,
        };
        let live = self.live.get_mut(&sequence)?;
        (live.started, live.active_at) = (true, now);
        if matches!(event, RequestEvent::Finished(_) | RequestEvent::Failed(_)) {
            self.live.remove(&sequence);
        }
        Some((sequence, event))
    }

    /// Forgets a request whose client is gone; false when it was over already.
    pub(super) fn abandon(&mut self, sequence: SequenceId) -> bool {
        self.live.remove(&sequence).is_some()
    }

    /// Takes all of them, to be told that they failed.
    pub(super) fn take_all(&mut self) -> Vec<SequenceId> {
        std::mem::take(&mut self.live).into_keys().collect()
    }

    /// Takes those that the lead, which says that it does nothing, must have lost.
    pub(super) fn take_forgotten(&mut self, load: EngineLoad, now: Now) -> Vec<SequenceId> {
        if load.running > 0 || load.waiting > 0 {
            return Vec::new();
        }
        let lost: Vec<_> = self.live.iter().filter(|(_, live)| now >= live.active_at + FORGOTTEN).map(|(sequence, _)| *sequence).collect();
        self.live.retain(|sequence, _| !lost.contains(sequence));
        lost
    }

    pub(super) fn is_empty(&self) -> bool {
        self.live.is_empty()
    }
}

//! Which coordinator holds this worker: one at a time, for as long as it is heard.

use super::plan::Time;
use mlx_cluster_common::ids::NodeId;
use std::time::Duration;

/// A coordinator that comes back takes its own hold over when the old connection was silent for this long.
const TAKEOVER_SILENCE: Duration = Duration::from_secs(3);

/// One stream of a coordinator, numbered so that what an earlier one says late does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Session(u64);

/// Why a coordinator does not get this worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "worker {worker} is already held by coordinator {holder} (node {node}, for {} s): stop that one, or start this one with another --cluster name",
    .held_for.as_secs()
)]
pub(crate) struct Held {
    pub(crate) worker: String,
    pub(crate) holder: String,
    pub(crate) node: NodeId,
    pub(crate) held_for: Duration,
}

#[derive(Debug, Default)]
pub(crate) struct Hold {
    holder: Option<Holder>,
    sessions: u64,
}

#[derive(Debug)]
struct Holder {
    session: Session,
    node: NodeId,
    name: String,
    since: Time,
    heard: Time,
}

impl Hold {
    /// Gives the worker to a coordinator, unless another one has it.
    pub(crate) fn take(&mut self, worker: &str, node: &NodeId, name: &str, now: Time) -> Result<Session, Held> {
        if let Some(holder) = &self.holder
            && !(holder.node == *node && now.saturating_sub(holder.heard) >= TAKEOVER_SILENCE)
        {
            let held_for = now.saturating_sub(holder.since);
            return Err(Held { worker: worker.to_owned(), holder: holder.name.clone(), node: holder.node.clone(), held_for });
        }
        self.sessions += 1;
        let session = Session(self.sessions);
        self.holder = Some(Holder { session, node: node.clone(), name: name.to_owned(), since: now, heard: now });
        Ok(session)
    }

    /// Whether what this session says counts; if so it was heard now.
    pub(crate) fn hear(&mut self, session: Session, now: Time) -> bool {
        match &mut self.holder {
            Some(holder) if holder.session == session => {
                holder.heard = now;
                true
            }
            _ => false,
        }
    }

    /// Ends a session. False when another one has replaced it.
    pub(crate) fn release(&mut self, session: Session) -> bool {
        let held = self.holder.as_ref().is_some_and(|holder| holder.session == session);
        if held {
            self.holder = None;
        }
        held
    }

    pub(crate) fn is_held(&self) -> bool {
        self.holder.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Time {
        Time::from_secs(seconds)
    }

    #[test]
    fn a_second_coordinator_is_told_who_holds_the_worker() {
        let mut hold = Hold::default();
        let first = hold.take("mini", &"a".into(), "studio", seconds(1)).expect("free");
        assert!(hold.hear(first, seconds(2)));
        let refusal = hold.take("mini", &"b".into(), "laptop", seconds(13)).expect_err("held").to_string();
        assert!(refusal.contains("mini is already held by coordinator studio (node a, for 12 s)"), "{refusal}");
        assert!(hold.release(first) && !hold.is_held());
        assert!(hold.take("mini", &"b".into(), "laptop", seconds(13)).is_ok(), "free at once");
    }

    #[test]
    fn a_coordinator_that_comes_back_replaces_its_own_dead_connection() {
        let mut hold = Hold::default();
        let first = hold.take("mini", &"a".into(), "studio", seconds(0)).expect("free");
        assert!(hold.take("mini", &"a".into(), "studio", seconds(2)).is_err(), "the first one is alive");
        let second = hold.take("mini", &"a".into(), "studio", seconds(3)).expect("the first one is silent");
        assert!(!hold.hear(first, seconds(4)) && hold.hear(second, seconds(4)));
        assert!(!hold.release(first) && hold.is_held());
    }
}

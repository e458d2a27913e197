//! Decides, without clock or network, which neighbour is measured when, and keeps what was measured.

use crate::supervisor::plan::Time;
use mlx_cluster_common::{engine::Peer, ids::NodeId, links::LinkFacts};
use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

/// What was measured is measured again after this time, when engines are idle.
pub(crate) const RENEW: Duration = Duration::from_secs(600);
/// A neighbour that was never measured waits so long for engines that are busy, and no longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// After a neighbour could not be measured; doubled each time.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// A neighbour that measures somebody else is asked again after this, and up to eight times as much: two that refuse each other must not
/// go on doing so in step.
const TURN: Duration = Duration::from_millis(15);
/// Two that hear of each other at once do not begin at once: the one with the higher id lets the other one go first.
const HEAD_START: Duration = Duration::from_millis(50);
/// Neighbours that are remembered although nobody asks for them now.
const REMEMBERED_MAX: usize = 512;

/// How an attempt to measure a neighbour ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// One for each address that answered.
    Measured(Vec<LinkFacts>),
    /// It is measuring, or being measured by another one.
    Refused,
    Failed,
}

/// What to do now.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    Measure(Peer),
    WaitUntil(Time),
    Nothing,
}

#[derive(Debug)]
struct Neighbour {
    peer: Peer,
    is_wanted: bool,
    links: Vec<LinkFacts>,
    since: Time,
    due: Time,
    failures: u32,
}

#[derive(Debug)]
pub(crate) struct Schedule {
    own: NodeId,
    all: BTreeMap<NodeId, Neighbour>,
    refusals: u64,
}

impl Schedule {
    pub(crate) fn new(own: NodeId) -> Self {
        Self { own, all: BTreeMap::new(), refusals: 0 }
    }

    /// Takes the list of all neighbours. Who is new or elsewhere is measured at once; who is as before is not.
    pub(crate) fn want(&mut self, peers: &[Peer], now: Time) {
        self.all.values_mut().for_each(|neighbour| neighbour.is_wanted = false);
        for peer in peers.iter().filter(|peer| peer.node != self.own) {
            match self.all.get_mut(&peer.node).filter(|known| known.peer.addresses == peer.addresses) {
                Some(known) => known.is_wanted = true,
                None => {
                    let due = if self.own < peer.node { now } else { now + HEAD_START };
                    let new = Neighbour { peer: peer.clone(), is_wanted: true, links: Vec::new(), since: now, due, failures: 0 };
                    self.all.insert(peer.node.clone(), new);
                }
            }
        }
        let is_full = self.all.len() > REMEMBERED_MAX;
        self.all.retain(|_, known| known.is_wanted || (!known.links.is_empty() && now < known.due && !is_full));
    }

    /// This node's own addresses changed: all ways may be others.
    pub(crate) fn renew_all(&mut self, now: Time) {
        self.all.values_mut().for_each(|known| known.due = now);
    }

    pub(crate) fn next(&self, now: Time, is_busy: bool) -> Next {
        let at = |known: &Neighbour| match (is_busy, known.links.is_empty()) {
            (false, _) => Some(known.due),
            (true, true) => Some(known.due.max(known.since + PATIENCE)),
            (true, false) => None,
        };
        let wanted = self.all.values().filter(|known| known.is_wanted && !known.peer.addresses.is_empty());
        // Who was never measured goes first.
        let soonest = wanted.filter_map(|known| Some((at(known)?.max(now), !known.links.is_empty(), known))).min_by_key(|it| (it.0, it.1));
        match soonest {
            Some((at, _, known)) if at <= now => Next::Measure(known.peer.clone()),
            Some((at, ..)) => Next::WaitUntil(at),
            None => Next::Nothing,
        }
    }

    pub(crate) fn take(&mut self, peer: &Peer, outcome: Outcome, now: Time) {
        let turn = self.turn();
        let Some(known) = self.all.get_mut(&peer.node).filter(|known| known.peer.addresses == peer.addresses) else { return };
        match outcome {
            Outcome::Measured(links) => {
                (known.links, known.failures, known.due) = (links, 0, now + RENEW);
            }
            Outcome::Refused => {
                self.refusals += 1;
                known.due = now + turn;
            }
            Outcome::Failed => {
                known.links.clear();
                known.due = now + RETRY_MIN.saturating_mul(1 << known.failures.min(16)).min(RETRY_MAX);
                known.failures += 1;
            }
        }
    }

    /// Different from node to node and from time to time.
    fn turn(&self) -> Duration {
        let mut hasher = DefaultHasher::new();
        (&self.own, self.refusals).hash(&mut hasher);
        TURN * (1 + hasher.finish() % 8) as u32
    }

    /// What is known of all neighbours that are asked for.
    pub(crate) fn links(&self) -> Vec<LinkFacts> {
        self.all.values().filter(|known| known.is_wanted).flat_map(|known| known.links.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_cluster_common::links::Medium;

    fn peer(name: &str, address: &str) -> Peer {
        Peer { node: name.into(), name: name.into(), addresses: vec![address.into()] }
    }

    fn link(to: &str) -> LinkFacts {
        LinkFacts {
            from: "own".into(),
            to: to.into(),
            interface: "en0".into(),
            medium: Medium::Ethernet,
            address: "10.0.0.2".into(),
            round_trip_seconds: 1e-4,
            bytes_per_second: 1e9,
        }
    }

    const fn s(seconds: u64) -> Time {
        Time::from_secs(seconds)
    }

    fn wanting(peers: &[Peer]) -> Schedule {
        let mut schedule = Schedule::new("0".into());
        schedule.want(peers, s(0));
        schedule
    }

    #[test]
    fn new_neighbours_are_measured_at_once_and_again_after_a_while() {
        let (a, b) = (peer("a", "10.0.0.1:1"), peer("b", "10.0.0.2:1"));
        let mut schedule = wanting(&[a.clone(), b.clone(), peer("0", "10.0.0.9:1")]);
        assert_eq!(schedule.next(s(0), false), Next::Measure(a.clone()));
        schedule.take(&a, Outcome::Measured(vec![link("a")]), s(0));
        assert_eq!(schedule.next(s(1), false), Next::Measure(b.clone()));
        schedule.take(&b, Outcome::Measured(vec![link("b")]), s(1));
        assert_eq!((schedule.next(s(1), false), schedule.links().len()), (Next::WaitUntil(RENEW), 2));
        assert_eq!(schedule.next(RENEW, false), Next::Measure(a));
        assert_eq!(schedule.next(RENEW * 2, true), Next::Nothing, "nothing is renewed while engines are busy");
    }

    #[test]
    fn who_moved_is_measured_anew_and_who_left_is_not_reported() {
        let a = peer("a", "10.0.0.1:1");
        let mut schedule = wanting(std::slice::from_ref(&a));
        schedule.take(&a, Outcome::Measured(vec![link("a")]), s(0));
        schedule.want(&[], s(1));
        assert_eq!((schedule.links(), schedule.next(s(1), false)), (Vec::new(), Next::Nothing));
        schedule.want(std::slice::from_ref(&a), s(2));
        assert_eq!((schedule.links().len(), schedule.next(s(2), false)), (1, Next::WaitUntil(RENEW)), "it came back as it was");
        let moved = peer("a", "10.0.0.7:1");
        schedule.want(std::slice::from_ref(&moved), s(3));
        assert_eq!((schedule.links(), schedule.next(s(3), false)), (Vec::new(), Next::Measure(moved)));
        schedule.take(&a, Outcome::Measured(vec![link("a")]), s(4));
        assert_eq!(schedule.links(), [], "what comes late is about where it was");
        schedule.want(std::slice::from_ref(&a), s(5));
        schedule.take(&a, Outcome::Measured(vec![link("a")]), s(5));
        schedule.renew_all(s(6));
        assert_eq!(schedule.next(s(6), false), Next::Measure(a));
    }

    #[test]
    fn failures_are_retried_later_each_time_and_refusals_soon() {
        let a = peer("a", "10.0.0.1:1");
        let mut schedule = wanting(std::slice::from_ref(&a));
        schedule.take(&a, Outcome::Refused, s(0));
        let Next::WaitUntil(soon) = schedule.next(s(0), false) else { panic!("it waits") };
        assert!(soon >= TURN && soon <= TURN * 8);
        for wait in [2, 4, 8] {
            schedule.take(&a, Outcome::Failed, s(10));
            assert_eq!(schedule.next(s(10), false), Next::WaitUntil(s(10 + wait)));
        }
        (0..40).for_each(|_| schedule.take(&a, Outcome::Failed, s(10)));
        assert_eq!(schedule.next(s(10), false), Next::WaitUntil(s(10) + RETRY_MAX));
    }

    #[test]
    fn of_two_that_hear_of_each_other_one_goes_first() {
        let mut schedule = Schedule::new("z".into());
        schedule.want(&[peer("a", "10.0.0.1:1")], s(1));
        assert_eq!(schedule.next(s(1), false), Next::WaitUntil(s(1) + HEAD_START));
    }

    #[test]
    fn busy_engines_are_waited_for_but_not_for_ever() {
        let schedule = wanting(&[peer("a", "10.0.0.1:1")]);
        assert_eq!(schedule.next(s(1), true), Next::WaitUntil(PATIENCE));
        assert_eq!(schedule.next(PATIENCE, true), Next::Measure(peer("a", "10.0.0.1:1")));
    }
}

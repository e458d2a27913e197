//! Ends the process of a rank whose group cannot go on: MLX waits for a lost rank for ever, on the thread that owns the arrays.

use super::boot::BootLine;
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// A collective fails a little before the connection that tells whose rank is gone.
const ATTRIBUTION: Duration = Duration::from_secs(1);
/// When an epoch is over, the thread that owns the arrays finishes the step that it is in within this, or its ranks have lost step.
const SETTLE: Duration = Duration::from_secs(20);

/// Why a process ends, and whom it lost, when that is all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct End {
    pub(super) cause: String,
    pub(super) lost: Option<String>,
}

impl From<End> for BootLine {
    fn from(end: End) -> Self {
        BootLine::Failed { cause: end.cause, hopeless: false, lost: end.lost }
    }
}

/// What other ranks have to take part in, and until when.
#[derive(Debug)]
struct Busy {
    work: &'static str,
    until: Instant,
    /// When the epoch of this work is over: until when it has to be left, and why.
    settle: Option<(Instant, String)>,
}

#[derive(Debug, Default)]
struct State {
    rank: usize,
    /// The workers of the group, by rank; empty before the first link.
    workers: Vec<String>,
    busy: Option<Busy>,
    /// The thread cannot go on; the time is for somebody to say which rank is lost.
    gave_up: Option<(Instant, String)>,
    lost: Option<End>,
}

impl State {
    fn verdict(&self, now: Instant) -> Option<End> {
        if let Some(end) = &self.lost {
            return Some(end.clone());
        }
        let alone = |cause| Some(End { cause, lost: None });
        if let Some((_, cause)) = self.gave_up.as_ref().filter(|(at, _)| *at <= now) {
            return alone(format!("{cause}; {}", self.others()));
        }
        let Busy { work, until, settle } = self.busy.as_ref()?;
        if let Some((_, cause)) = settle.as_ref().filter(|(at, _)| *at <= now) {
            return alone(format!("{work} did not end when its epoch was over ({cause}); {}", self.others()));
        }
        if *until > now {
            return None;
        }
        let (cause, mut others) = (format!("{work} took too long; {}", self.others()), self.others_by_rank());
        // Of two ranks it can only be the other one.
        let other = others.next().map(|(_, worker)| worker.clone()).filter(|_| others.next().is_none());
        Some(End { cause, lost: other })
    }

    fn deadline(&self) -> Option<Instant> {
        let busy = self.busy.as_ref();
        let settle = busy.and_then(|busy| busy.settle.as_ref()).map(|(at, _)| *at);
        let gave_up = self.gave_up.as_ref().map(|(at, _)| *at);
        busy.map(|busy| busy.until).into_iter().chain(settle).chain(gave_up).min()
    }

    fn others_by_rank(&self) -> impl Iterator<Item = (usize, &String)> {
        self.workers.iter().enumerate().filter(|(rank, _)| *rank != self.rank)
    }

    fn others(&self) -> String {
        let names: Vec<_> = self.others_by_rank().map(|(rank, worker)| format!("rank {rank} (worker {worker})")).collect();
        match &names[..] {
            [] => "the other ranks are not known yet".into(),
            [one] => format!("the other rank is {one}"),
            many => format!("the other ranks are {}", many.join(", ")),
        }
    }
}

/// Watches over an engine of a group; does nothing in one that is alone. Clones are the same watchdog.
#[derive(Debug, Clone)]
pub(super) struct Watchdog(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Watchdog {
    pub(super) fn idle() -> Self {
        Self(None)
    }

    /// `end` is called once, on a thread of its own, and does not return.
    pub(super) fn start(rank: u32, end: impl FnOnce(End) + Send + 'static) -> Self {
        let state = State { rank: rank as usize, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let watched = shared.clone();
        thread::spawn(move || end(watched.wait_for_end()));
        Self(Some(shared))
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let Some(shared) = &self.0 else { return };
        change(&mut shared.lock());
        shared.changed.notify_all();
    }

    pub(super) fn meet(&self, workers: &[String]) {
        self.change(|state| state.workers = workers.to_vec());
    }

    /// Other ranks have to take part in what follows, until the value is dropped.
    pub(super) fn begin(&self, work: &'static str, limit: Duration) -> Work {
        self.change(|state| state.busy = Some(Busy { work, until: Instant::now() + limit, settle: None }));
        Work(self.clone())
    }

    /// A rank is gone, and with it the group. Before the first link there is none to lose.
    pub(super) fn lost(&self, rank: usize, message: &str) {
        self.change(|state| {
            let Some(worker) = state.workers.get(rank).cloned() else { return };
            state.lost.get_or_insert(End { cause: format!("lost rank {rank} of worker {worker}: {message}"), lost: Some(worker) });
        });
    }

    /// The epoch is over: what is under way has to come to its end, or never will.
    pub(super) fn epoch_over(&self, cause: &str) {
        self.change(|state| {
            if let Some(busy) = &mut state.busy {
                busy.settle.get_or_insert_with(|| (Instant::now() + SETTLE, cause.to_owned()));
            }
        });
    }

    /// Ends the process of a group, when the one who is to blame had time to show; returns at once when there is no group.
    pub(super) fn give_up(&self, cause: &str) {
        if self.0.is_none() {
            return;
        }
        self.change(|state| {
            state.gave_up.get_or_insert_with(|| (Instant::now() + ATTRIBUTION, cause.to_owned()));
        });
        loop {
            thread::park();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_end(&self) -> End {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            if let Some(end) = state.verdict(now) {
                return end;
            }
            state = match state.deadline() {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => self.changed.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

/// See [`Watchdog::begin`].
#[must_use]
pub(super) struct Work(Watchdog);

impl Drop for Work {
    fn drop(&mut self) {
        self.0.change(|state| state.busy = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(workers: &[&str]) -> State {
        State { rank: 0, workers: workers.iter().map(|worker| (*worker).to_owned()).collect(), ..State::default() }
    }

    fn busy(now: Instant) -> Busy {
        Busy { work: "a step", until: now + Duration::from_secs(9), settle: None }
    }

    #[test]
    fn work_that_ends_in_time_ends_nothing() {
        let (mut state, now) = (state(&["a", "b"]), Instant::now());
        state.busy = Some(busy(now));
        assert_eq!((state.verdict(now), state.deadline()), (None, Some(now + Duration::from_secs(9))));
        state.busy = None;
        assert_eq!((state.verdict(now + Duration::from_secs(99)), state.deadline()), (None, None));
    }

    #[test]
    fn work_that_hangs_ends_with_the_name_of_the_only_rank_that_it_can_wait_for() {
        let now = Instant::now();
        let late = now + Duration::from_secs(9);
        for (workers, lost) in [(&["a", "b"][..], Some("b")), (&["a", "b", "c"], None)] {
            let mut state = state(workers);
            state.busy = Some(busy(now));
            let end = state.verdict(late).expect("too late");
            assert_eq!(end.lost.as_deref(), lost);
            assert!(end.cause.contains("a step took too long") && end.cause.contains("rank 1 (worker b)"), "{}", end.cause);
        }
    }

    #[test]
    fn a_failed_collective_waits_for_the_name_of_the_lost_rank() {
        let (mut state, now) = (state(&["a", "b"]), Instant::now());
        state.gave_up = Some((now + ATTRIBUTION, "MLX: [ring] connection to a peer was lost".into()));
        assert_eq!(state.verdict(now), None);
        let end = state.verdict(now + ATTRIBUTION).expect("nobody said anything");
        assert!(end.cause.contains("[ring]") && end.cause.contains("worker b") && end.lost.is_none(), "{end:?}");
        state.lost = Some(End { cause: "lost rank 1 of worker b: gone".into(), lost: Some("b".into()) });
        assert_eq!(state.verdict(now), state.lost);
    }

    #[test]
    fn a_step_of_an_epoch_that_is_over_has_little_time_left() {
        let (mut state, now) = (state(&["a", "b"]), Instant::now());
        state.busy = Some(Busy { settle: Some((now + Duration::from_secs(2), "linked anew".into())), ..busy(now) });
        assert_eq!(state.deadline(), Some(now + Duration::from_secs(2)));
        assert!(state.verdict(now + Duration::from_secs(2)).is_some_and(|end| end.cause.contains("linked anew")));
    }

    #[test]
    fn it_ends_the_process_as_soon_as_a_rank_is_lost() {
        let (sender, ends) = std::sync::mpsc::channel();
        let watchdog = Watchdog::start(0, move |end| drop(sender.send(end)));
        watchdog.meet(&["a".into(), "b".into()]);
        let work = watchdog.begin("a step", Duration::from_secs(60));
        watchdog.lost(1, "the connection was reset");
        let end = ends.recv_timeout(Duration::from_secs(10)).expect("it ends");
        assert_eq!(end, End { cause: "lost rank 1 of worker b: the connection was reset".into(), lost: Some("b".into()) });
        drop(work);
    }
}

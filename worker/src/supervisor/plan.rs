//! Decides, without clock or processes, what a worker does next: what to fetch, start, end, kill or start again.

use crate::engine::boot::BootLine;
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, EngineStatus},
    ids::EngineId,
    units::Bytes,
};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// An engine whose stdin was closed has this long to end by itself.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(3);
/// Engines outlive the stream of the coordinator that wanted them by this, in case only the connection broke.
pub(crate) const ORPHAN_GRACE: Duration = Duration::from_secs(3);
/// An engine that says nothing for this long while it loads is taken for stuck.
pub(crate) const LOAD_SILENCE_MAX: Duration = Duration::from_secs(300);
/// After this long in service, earlier failures of an engine are forgotten.
pub(crate) const GOOD_SERVICE: Duration = Duration::from_secs(60);
pub(crate) const BACKOFF_MIN: Duration = Duration::from_millis(200);
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Time since the worker started.
pub(crate) type Time = Duration;

/// One attempt to bring an engine up, from fetching its files to the end of its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run(pub(crate) u64);

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) cause: String,
    /// The next one would fail the same way.
    pub(crate) hopeless: bool,
    /// The worker whose engine it lost, when that is all that was wrong.
    pub(crate) lost: Option<String>,
}

impl Failure {
    /// One that need not happen again.
    pub(crate) fn passing(cause: String) -> Self {
        Self { cause, hopeless: false, lost: None }
    }
}

#[derive(Debug)]
pub(crate) enum Event {
    Wanted {
        version: u64,
        engines: Vec<EngineSpec>,
    },
    /// A coordinator holds this worker now. What it wants it has to say within [`ORPHAN_GRACE`] for engines that are here to stay.
    Held,
    /// No coordinator holds this worker any more.
    Orphaned,
    Fetching {
        run: Run,
        file: String,
        done: Bytes,
        total: Bytes,
    },
    Fetched {
        run: Run,
        folder: PathBuf,
    },
    FetchFailed {
        run: Run,
        failure: Failure,
    },
    Said {
        run: Run,
        line: BootLine,
    },
    /// The process is gone, or never came to be; `output` are its last lines.
    Exited {
        run: Run,
        cause: String,
        output: Vec<String>,
    },
    Resident {
        run: Run,
        bytes: Bytes,
    },
    Shutdown,
    Tick,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Effect {
    Fetch { run: Run, spec: EngineSpec },
    CancelFetch { run: Run },
    Start { run: Run, spec: EngineSpec, folder: PathBuf },
    CloseStdin { run: Run },
    Kill { run: Run },
}

/// The engines that are wanted, and those that are on their way out.
#[derive(Debug)]
pub(crate) struct Supervision {
    version: u64,
    slots: BTreeMap<EngineId, Slot>,
    /// Processes that were told to end, and when they are killed; None when that is done.
    leaving: BTreeMap<Run, Option<Time>>,
    orphaned_at: Option<Time>,
    stopping: bool,
    /// The number of the latest attempt.
    last_run: u64,
}

#[derive(Debug)]
struct Slot {
    spec: EngineSpec,
    /// Attempts that failed since the last good service.
    failures: u32,
    /// Where the files are, once they are known to be complete.
    folder: Option<PathBuf>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Fetching {
        run: Run,
        file: String,
        done: Bytes,
        total: Bytes,
    },
    /// Started as soon as the memory of those that leave is free.
    Fetched {
        run: Run,
    },
    Loading {
        run: Run,
        done: Bytes,
        total: Bytes,
        heard: Time,
    },
    Ready {
        run: Run,
        port: u16,
        group_port: u16,
        since: Time,
        resident: Bytes,
    },
    /// It said why it fails, or is being killed; its process is still there.
    Dying {
        run: Run,
        failure: Failure,
        kill_at: Option<Time>,
    },
    /// The failure is not hopeless: the next attempt follows.
    Waiting {
        failure: Failure,
        output: Vec<String>,
        until: Time,
    },
    Hopeless {
        failure: Failure,
        output: Vec<String>,
    },
}

impl Supervision {
    /// Attempts are numbered from `last_run` on, which is higher than any number that an earlier worker process of this node used.
    pub(crate) fn new(last_run: u64) -> Self {
        Self { version: 0, slots: BTreeMap::new(), leaving: BTreeMap::new(), orphaned_at: None, stopping: false, last_run }
    }

    pub(crate) fn handle(&mut self, event: Event, now: Time) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Wanted { version, engines } => self.want(version, engines, now, &mut effects),
            Event::Held => {
                self.version = 0;
                self.orphaned_at.get_or_insert(now);
            }
            Event::Orphaned => self.orphaned_at = Some(now),
            Event::Fetching { run, file, done, total } => {
                if let Some(Slot { phase: phase @ Phase::Fetching { .. }, .. }) = self.slot_of(run) {
                    *phase = Phase::Fetching { run, file, done, total };
                }
            }
            Event::Fetched { run, folder } => {
                if let Some(slot) = self.slot_of(run) {
                    slot.folder = Some(folder);
                    slot.phase = Phase::Fetched { run };
                }
            }
            Event::FetchFailed { run, failure } => {
                if let Some(slot) = self.slot_of(run) {
                    slot.fail(failure, Vec::new(), now);
                }
            }
            Event::Said { run, line } => {
                if let Some(slot) = self.slot_of(run) {
                    slot.hear(run, line, now);
                }
            }
            Event::Exited { run, cause, output } => self.exited(run, cause, output, now),
            Event::Resident { run, bytes } => {
                if let Some(Slot { phase: Phase::Ready { resident, .. }, .. }) = self.slot_of(run) {
                    *resident = bytes;
                }
            }
            Event::Shutdown => {
                self.stopping = true;
                self.retire_all(now, &mut effects);
            }
            Event::Tick => {}
        }
        self.advance(now, &mut effects);
        effects
    }

    /// When something is due although nothing happens.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let orphaned = self.orphaned_at.map(|at| at + ORPHAN_GRACE);
        let leaving = self.leaving.values().copied().flatten();
        leaving.chain(orphaned).chain(self.slots.values().filter_map(|slot| slot.phase.deadline())).min()
    }

    /// Whether no process of an engine is left.
    pub(crate) fn is_idle(&self) -> bool {
        self.slots.is_empty() && self.leaving.is_empty()
    }

    /// The version of the wanted state that [`statuses`](Self::statuses) is about.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn statuses(&self, now: Time) -> Vec<EngineStatus> {
        self.slots.iter().map(|(id, slot)| EngineStatus { id: id.clone(), state: slot.state(now) }).collect()
    }

    fn want(&mut self, version: u64, engines: Vec<EngineSpec>, now: Time, effects: &mut Vec<Effect>) {
        if self.stopping {
            return;
        }
        self.version = version;
        self.orphaned_at = None;
        let wanted: BTreeMap<_, _> = engines.into_iter().map(|spec| (spec.id.clone(), spec)).collect();
        let dropped = |(id, slot): &(&EngineId, &Slot)| wanted.get(*id) != Some(&slot.spec);
        let dropped: Vec<_> = self.slots.iter().filter(dropped).map(|(id, _)| id.clone()).collect();
        for id in dropped {
            self.retire(&id, now, effects);
        }
        for (id, spec) in wanted {
            if !self.slots.contains_key(&id) {
                let run = next(&mut self.last_run);
                effects.push(Effect::Fetch { run, spec: spec.clone() });
                self.slots.insert(id, Slot { spec, failures: 0, folder: None, phase: Phase::fetching(run) });
            }
        }
    }

    /// Gives a slot up and ends whatever it is doing; its process has [`STOP_GRACE`] left.
    fn retire(&mut self, id: &EngineId, now: Time, effects: &mut Vec<Effect>) {
        let Some(slot) = self.slots.remove(id) else { return };
        match slot.phase {
            Phase::Fetching { run, .. } => effects.push(Effect::CancelFetch { run }),
            Phase::Loading { run, .. } | Phase::Ready { run, .. } => {
                effects.push(Effect::CloseStdin { run });
                self.leaving.insert(run, Some(now + STOP_GRACE));
            }
            Phase::Dying { run, kill_at, .. } => {
                effects.push(Effect::CloseStdin { run });
                self.leaving.insert(run, kill_at);
            }
            Phase::Fetched { .. } | Phase::Waiting { .. } | Phase::Hopeless { .. } => {}
        }
    }

    fn retire_all(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let ids: Vec<_> = self.slots.keys().cloned().collect();
        ids.iter().for_each(|id| self.retire(id, now, effects));
    }

    fn exited(&mut self, run: Run, cause: String, output: Vec<String>, now: Time) {
        if self.leaving.remove(&run).is_some() {
            return;
        }
        let Some(slot) = self.slot_of(run) else { return };
        let failure = match &slot.phase {
            Phase::Dying { failure, .. } => failure.clone(),
            _ => {
                slot.settle(now);
                Failure::passing(cause)
            }
        };
        slot.fail(failure, output, now);
    }

    /// What is due at `now`, whatever happened before.
    fn advance(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if self.orphaned_at.is_some_and(|at| at + ORPHAN_GRACE <= now) {
            self.orphaned_at = None;
            self.version = 0;
            self.retire_all(now, effects);
        }
        for (run, kill_at) in &mut self.leaving {
            if kill_at.is_some_and(|at| at <= now) {
                *kill_at = None;
                effects.push(Effect::Kill { run: *run });
            }
        }
        let memory_is_free = self.leaving.is_empty();
        for slot in self.slots.values_mut() {
            slot.advance(now, &mut self.last_run, effects);
            if let (Phase::Fetched { run }, Some(folder), true) = (&slot.phase, &slot.folder, memory_is_free) {
                let run = *run;
                effects.push(Effect::Start { run, spec: slot.spec.clone(), folder: folder.clone() });
                slot.phase = Phase::Loading { run, done: Bytes(0), total: Bytes(0), heard: now };
            }
        }
    }

    fn slot_of(&mut self, run: Run) -> Option<&mut Slot> {
        self.slots.values_mut().find(|slot| slot.phase.run() == Some(run))
    }
}

impl Slot {
    fn hear(&mut self, run: Run, line: BootLine, now: Time) {
        match (line, &self.phase) {
            (BootLine::Loading { done_bytes, total_bytes }, Phase::Loading { .. }) => {
                self.phase = Phase::Loading { run, done: Bytes(done_bytes), total: Bytes(total_bytes), heard: now };
            }
            (BootLine::Ready { port, group_port }, Phase::Loading { .. }) => {
                self.phase = Phase::Ready { run, port, group_port, since: now, resident: Bytes(0) };
            }
            (BootLine::Failed { cause, hopeless, lost }, Phase::Loading { .. } | Phase::Ready { .. }) => {
                self.settle(now);
                self.phase = Phase::Dying { run, failure: Failure { cause, hopeless, lost }, kill_at: Some(now + STOP_GRACE) };
            }
            _ => {}
        }
    }

    /// What the service of an engine that now ends says about the next attempt.
    fn settle(&mut self, now: Time) {
        match self.phase {
            Phase::Ready { since, .. } if now.saturating_sub(since) >= GOOD_SERVICE => self.failures = 0,
            Phase::Ready { .. } => {}
            // It never served, which may be due to the files: they are looked at again.
            _ => self.folder = None,
        }
    }

    fn fail(&mut self, failure: Failure, output: Vec<String>, now: Time) {
        self.phase = match failure.hopeless {
            true => Phase::Hopeless { failure, output },
            false => {
                // Whoever lost another one did nothing wrong itself.
                self.failures += u32::from(failure.lost.is_none());
                Phase::Waiting { failure, output, until: now + backoff(self.failures) }
            }
        };
    }

    fn advance(&mut self, now: Time, last_run: &mut u64, effects: &mut Vec<Effect>) {
        if self.phase.deadline().is_none_or(|at| at > now) {
            return;
        }
        match &mut self.phase {
            Phase::Waiting { .. } => {
                let run = next(last_run);
                self.phase = match self.folder {
                    Some(_) => Phase::Fetched { run },
                    None => {
                        effects.push(Effect::Fetch { run, spec: self.spec.clone() });
                        Phase::fetching(run)
                    }
                };
            }
            Phase::Loading { run, .. } => {
                let cause = format!("engine said nothing for {} s while it loaded and was killed", LOAD_SILENCE_MAX.as_secs());
                effects.push(Effect::Kill { run: *run });
                self.phase = Phase::Dying { run: *run, failure: Failure::passing(cause), kill_at: None };
            }
            Phase::Dying { run, kill_at, .. } => {
                *kill_at = None;
                effects.push(Effect::Kill { run: *run });
            }
            Phase::Fetching { .. } | Phase::Fetched { .. } | Phase::Ready { .. } | Phase::Hopeless { .. } => {}
        }
    }

    fn state(&self, now: Time) -> EngineState {
        match &self.phase {
            Phase::Fetching { file, done, total, .. } => EngineState::Fetching { file: file.clone(), done: *done, total: *total },
            Phase::Fetched { .. } => EngineState::Loading { done: Bytes(0), total: Bytes(0) },
            Phase::Loading { done, total, .. } => EngineState::Loading { done: *done, total: *total },
            Phase::Ready { run, port, group_port, resident, .. } => {
                let (port, group_port) = (u32::from(*port), u32::from(*group_port));
                EngineState::Ready { port, group_port, incarnation: run.0, resident: *resident }
            }
            Phase::Dying { failure, .. } => {
                let retry_in = (!failure.hopeless).then(|| backoff(self.failures + u32::from(failure.lost.is_none())));
                failed(failure, &[], retry_in)
            }
            Phase::Waiting { failure, output, until } => failed(failure, output, Some(until.saturating_sub(now))),
            Phase::Hopeless { failure, output } => failed(failure, output, None),
        }
    }
}

impl Phase {
    fn fetching(run: Run) -> Self {
        Phase::Fetching { run, file: String::new(), done: Bytes(0), total: Bytes(0) }
    }

    fn run(&self) -> Option<Run> {
        match self {
            Phase::Fetching { run, .. }
            | Phase::Fetched { run }
            | Phase::Loading { run, .. }
            | Phase::Ready { run, .. }
            | Phase::Dying { run, .. } => Some(*run),
            Phase::Waiting { .. } | Phase::Hopeless { .. } => None,
        }
    }

    fn deadline(&self) -> Option<Time> {
        match self {
            Phase::Loading { heard, .. } => Some(*heard + LOAD_SILENCE_MAX),
            Phase::Dying { kill_at, .. } => *kill_at,
            Phase::Waiting { until, .. } => Some(*until),
            Phase::Fetching { .. } | Phase::Fetched { .. } | Phase::Ready { .. } | Phase::Hopeless { .. } => None,
        }
    }
}

fn failed(failure: &Failure, output: &[String], retry_in: Option<Duration>) -> EngineState {
    let retry_in_ms = retry_in.map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX));
    EngineState::Failed { cause: failure.cause.clone(), output: output.to_vec(), retry_in_ms, lost: failure.lost.clone() }
}

/// 0.2 s after the first failure, twice as long after each further one, 10 s at most.
fn backoff(failures: u32) -> Duration {
    BACKOFF_MIN.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1))).min(BACKOFF_MAX)
}

fn next(run: &mut u64) -> Run {
    *run += 1;
    Run(*run)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;

//! What happens to a job, numbered: kept in `events.jsonl`, and followed by any number of listeners, none of which the job waits for.

use super::{
    files::{FileError, attempt},
    reports::{TestReport, TrainReport, ValReport},
    store::JobState,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{sync::watch, task::spawn_blocking};

/// Events that are kept in memory; a listener that is further behind reads the file.
const KEPT: usize = 512;
/// Events that are read from the file at once.
const READ_AT_ONCE: usize = 512;
const EVENTS_FILE: &str = "events.jsonl";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum JobEvent {
    /// It is queued or runs; how it ends is told by `Ended`.
    State {
        #[serde(flatten)]
        state: JobState,
    },
    /// How it is spread over the workers, for people.
    Plan {
        text: String,
    },
    /// What a user should know, in a sentence.
    Note {
        text: String,
    },
    Train(TrainReport),
    Val(ValReport),
    Test(TestReport),
    /// A checkpoint is whole.
    Saved {
        iteration: u64,
    },
    /// How far it is. Not kept: only the last one is shown.
    Progress {
        iteration: u64,
        of: u64,
        /// In seconds; None before there is a pace.
        eta: Option<f64>,
    },
    WorkerLost {
        worker: String,
        cause: String,
    },
    /// The last event until it is resumed.
    Ended {
        #[serde(flatten)]
        state: JobState,
        iteration: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NumberedEvent {
    /// From 0 on. Numbers of progress that was not kept are missing.
    pub number: u64,
    #[serde(flatten)]
    pub event: JobEvent,
}

/// The events of one job.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    inner: Mutex<Inner>,
    /// The number that the next event gets; it changes too when the job ends.
    next: watch::Sender<u64>,
}

#[derive(Debug)]
struct Inner {
    next: u64,
    /// More may come.
    is_active: bool,
    /// The newest, without progress.
    kept: VecDeque<Arc<NumberedEvent>>,
    progress: Option<Arc<NumberedEvent>>,
    /// None until something is to be kept.
    file: Option<File>,
}

impl EventLog {
    /// Goes on after what is in the job's folder. Blocks on the disk.
    pub fn open(job_folder: &Path) -> Result<Arc<Self>, FileError> {
        let path = job_folder.join(EVENTS_FILE);
        let mut kept = VecDeque::new();
        read(&path, 0, |event| {
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(Arc::new(event));
            true
        })?;
        let next = kept.back().map_or(0, |event| event.number + 1);
        let inner = Inner { next, is_active: false, kept, progress: None, file: None };
        Ok(Arc::new(Self { path, inner: Mutex::new(inner), next: watch::Sender::new(next) }))
    }

    /// The number that the next event gets.
    pub fn next(&self) -> u64 {
        self.inner().next
    }

    /// The job is queued or resumed: listeners wait for what comes.
    pub(super) fn start(&self) {
        self.inner().is_active = true;
    }

    /// A disk that fails costs nothing but events of the past.
    pub fn report(&self, event: JobEvent) {
        let mut inner = self.inner();
        let (is_progress, is_end) = (matches!(event, JobEvent::Progress { .. }), matches!(event, JobEvent::Ended { .. }));
        let event = Arc::new(NumberedEvent { number: inner.next, event });
        inner.next += 1;
        if is_progress {
            inner.progress = Some(event);
        } else {
            if let Err(error) = self.append(&mut inner, &event) {
                tracing::warn!(%error, "an event of a job is not kept");
            }
            if inner.kept.len() == KEPT {
                inner.kept.pop_front();
            }
            inner.kept.push_back(event);
        }
        inner.is_active &= !is_end;
        self.next.send_replace(inner.next);
    }

    /// The events from `number` on, until the job ends.
    pub fn follow(self: &Arc<Self>, number: u64) -> Listener {
        Listener { log: Arc::clone(self), changes: self.next.subscribe(), next: number, queue: VecDeque::new(), waits: true }
    }

    /// The events from `number` on that there are.
    pub fn past(self: &Arc<Self>, number: u64) -> Listener {
        Listener { waits: false, ..self.follow(number) }
    }

    fn append(&self, inner: &mut Inner, event: &NumberedEvent) -> Result<(), FileError> {
        if inner.file.is_none() {
            inner.file = Some(attempt("open", &self.path, || open_for_lines(&self.path))?);
        }
        let Some(file) = &mut inner.file else { return Ok(()) };
        attempt("write", &self.path, || {
            let mut line = serde_json::to_vec(event)?;
            line.push(b'\n');
            file.write_all(&line)
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// To add lines: after one that was cut off by a loss of power, on a new line.
fn open_for_lines(path: &Path) -> std::io::Result<File> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    let text = fs::read(path)?;
    if text.last().is_some_and(|last| *last != b'\n') {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// Hands over the events of the file from `number` on, until `take` has enough. Lines that cannot be read are left out.
fn read(path: &Path, number: u64, mut take: impl FnMut(NumberedEvent) -> bool) -> Result<(), FileError> {
    let file = match attempt("open", path, || File::open(path)) {
        Err(error) if error.is_not_found() => return Ok(()),
        file => file?,
    };
    for line in BufReader::new(file).split(b'\n') {
        let line = attempt("read", path, || line)?;
        let event = serde_json::from_slice(&line).ok().filter(|event: &NumberedEvent| event.number >= number);
        if event.is_some_and(|event| !take(event)) {
            break;
        }
    }
    Ok(())
}

/// Somebody who follows a job.
#[derive(Debug)]
pub struct Listener {
    log: Arc<EventLog>,
    changes: watch::Receiver<u64>,
    next: u64,
    queue: VecDeque<Arc<NumberedEvent>>,
    /// For what is to come.
    waits: bool,
}

/// Where the next events are.
enum Place {
    Queue,
    File,
    Future,
    End,
}

impl Listener {
    /// The next event; None when the job has ended and all was told. May be dropped and called again.
    pub async fn next(&mut self) -> Option<Arc<NumberedEvent>> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                self.next = event.number + 1;
                return Some(event);
            }
            self.changes.borrow_and_update();
            match self.look() {
                Place::Queue => {}
                Place::File => self.read_file().await,
                // The log that it belongs to is ours, so that the sender lives.
                Place::Future => drop(self.changes.changed().await),
                Place::End => return None,
            }
        }
    }

    fn look(&mut self) -> Place {
        let inner = self.log.inner();
        let oldest = inner.kept.front().map_or(inner.next, |event| event.number);
        if self.next < oldest && oldest > 0 && inner.kept.len() == KEPT {
            return Place::File;
        }
        self.queue.extend(inner.kept.iter().filter(|event| event.number >= self.next).cloned());
        let progress = inner.progress.iter().find(|event| event.number >= self.next).cloned();
        if let Some(progress) = progress {
            let at = self.queue.partition_point(|event| event.number < progress.number);
            self.queue.insert(at, progress);
        }
        match (self.queue.is_empty(), inner.is_active && self.waits) {
            (false, _) => Place::Queue,
            (true, true) => Place::Future,
            (true, false) => Place::End,
        }
    }

    /// What is no longer in memory. What the file does not have is left out.
    async fn read_file(&mut self) {
        let (path, number) = (self.log.path.clone(), self.next);
        let events = spawn_blocking(move || {
            let mut events = VecDeque::new();
            read(&path, number, |event| {
                events.push_back(Arc::new(event));
                events.len() < READ_AT_ONCE
            })
            .inspect_err(|error| tracing::warn!(%error, "past events of a job are left out"))
            .map(|()| events)
        });
        match events.await {
            Ok(Ok(events)) if !events.is_empty() => self.queue = events,
            _ => self.next = self.log.inner().kept.front().map_or(self.next, |event| event.number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::reports::tests::{train, val};
    use std::time::Duration;
    use tokio::time::timeout;

    fn note(text: impl ToString) -> JobEvent {
        JobEvent::Note { text: text.to_string() }
    }

    fn ended() -> JobEvent {
        JobEvent::Ended { state: JobState::Failed { cause: "NaN".into() }, iteration: 3 }
    }

    fn progress(iteration: u64) -> JobEvent {
        JobEvent::Progress { iteration, of: 9, eta: Some(1.5) }
    }

    async fn all(mut listener: Listener) -> Vec<NumberedEvent> {
        let mut events = Vec::new();
        while let Some(event) = timeout(Duration::from_secs(20), listener.next()).await.expect("it ends") {
            events.push((*event).clone());
        }
        events
    }

    #[tokio::test]
    async fn a_listener_gets_all_in_order_and_ends_with_the_job() {
        let folder = tempfile::tempdir().unwrap();
        let log = EventLog::open(folder.path()).unwrap();
        log.start();
        log.report(JobEvent::State { state: JobState::Running });
        let early = tokio::spawn(all(log.follow(0)));
        let events = [JobEvent::Train(train(1)), JobEvent::Val(val(1)), JobEvent::Saved { iteration: 2 }, ended()];
        for event in &events {
            tokio::task::yield_now().await;
            log.report(event.clone());
        }
        let got = early.await.unwrap();
        assert_eq!(got.iter().map(|event| event.number).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
        assert_eq!(got[1..].iter().map(|event| event.event.clone()).collect::<Vec<_>>(), events);
        assert_eq!(all(log.follow(3)).await, got[3..]);
        assert_eq!(all(log.follow(99)).await, []);
        // Another process finds them too, and goes on counting.
        let again = EventLog::open(folder.path()).unwrap();
        assert_eq!((all(again.follow(0)).await, again.next()), (got, 5));
    }

    #[tokio::test]
    async fn a_slow_listener_catches_up_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let log = EventLog::open(folder.path()).unwrap();
        log.start();
        let mut slow = log.follow(0);
        log.report(note(0));
        assert_eq!(slow.next().await.unwrap().number, 0);
        let count = 2 * KEPT as u64 + READ_AT_ONCE as u64 + 7;
        (1..count).for_each(|number| log.report(note(number)));
        log.report(ended());
        let got = all(slow).await;
        assert_eq!(got.iter().map(|event| event.number).collect::<Vec<_>>(), (1..=count).collect::<Vec<_>>());
        assert!(got[..got.len() - 1].iter().all(|event| event.event == note(event.number)));
    }

    #[tokio::test]
    async fn of_progress_only_the_last_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let log = EventLog::open(folder.path()).unwrap();
        log.start();
        log.report(note("a"));
        log.report(progress(1));
        log.report(progress(2));
        log.report(note("b"));
        let mut listener = log.follow(0);
        let mut got = Vec::new();
        for _ in 0..3 {
            got.push(listener.next().await.unwrap().event.clone());
        }
        assert_eq!(got, [note("a"), progress(2), note("b")]);
        log.report(progress(3));
        assert_eq!(listener.next().await.unwrap().event, progress(3));
        assert!(timeout(Duration::from_millis(20), listener.next()).await.is_err(), "nothing is told twice");
        assert_eq!(all(log.past(2)).await.iter().map(|event| event.number).collect::<Vec<_>>(), [3, 4]);
        let text = fs::read_to_string(folder.path().join(EVENTS_FILE)).unwrap();
        assert_eq!(text, "{\"number\":0,\"event\":\"note\",\"text\":\"a\"}\n{\"number\":3,\"event\":\"note\",\"text\":\"b\"}\n");
    }

    #[tokio::test]
    async fn a_resumed_job_goes_on_after_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let log = EventLog::open(folder.path()).unwrap();
        log.start();
        log.report(ended());
        assert_eq!(all(log.follow(0)).await.len(), 1);
        fs::write(folder.path().join(EVENTS_FILE), format!("{}{{\"num", fs::read_to_string(folder.path().join(EVENTS_FILE)).unwrap()))
            .unwrap();
        let log = EventLog::open(folder.path()).unwrap();
        log.start();
        let listener = tokio::spawn(all(log.follow(log.next())));
        tokio::task::yield_now().await;
        log.report(JobEvent::State { state: JobState::Running });
        log.report(ended());
        assert_eq!(listener.await.unwrap().iter().map(|event| event.number).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(all(EventLog::open(folder.path()).unwrap().follow(0)).await.len(), 3);
    }
}

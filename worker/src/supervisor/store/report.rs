//! How far a shard has come, all its tensors together.

use super::super::plan::{Event, Run};
use mlx_cluster_common::units::Bytes;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;

/// Progress is reported once for this many bytes.
const REPORT_BYTES: u64 = 1 << 20;
/// What is shown while no single file is meant.
pub(super) const ALL: &str = "weights";

#[derive(Debug)]
pub(super) struct Report {
    run: Run,
    events: mpsc::Sender<Event>,
    total: u64,
    done: AtomicU64,
    reported: AtomicU64,
}

impl Report {
    /// `done` of `total` bytes are here already.
    pub(super) fn new(run: Run, events: mpsc::Sender<Event>, done: u64, total: u64) -> Self {
        let report = Self { run, events, total, done: AtomicU64::new(done), reported: AtomicU64::new(done) };
        report.tell(ALL, done);
        report
    }

    pub(super) fn add(&self, file: &str, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if done >= self.reported.load(Ordering::Relaxed) + REPORT_BYTES || done >= self.total {
            self.reported.store(done, Ordering::Relaxed);
            self.tell(file, done);
        }
    }

    /// Bytes that were thrown away.
    pub(super) fn take_back(&self, bytes: u64) {
        let done = self.done.fetch_sub(bytes, Ordering::Relaxed) - bytes;
        self.reported.fetch_min(done, Ordering::Relaxed);
    }

    fn tell(&self, file: &str, done: u64) {
        let (file, done, total) = (file.to_owned(), Bytes(done), Bytes(self.total));
        // Progress that nobody has time for is not worth waiting.
        let _ = self.events.try_send(Event::Fetching { run: self.run, file, done, total });
    }
}

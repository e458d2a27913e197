//! How far a job is: what is summed up for its next report, and what a checkpoint says of it. No clock: times are given.

use super::{checkpoint::SinceReport, engines::Done, reports::TrainReport};
use std::{collections::BTreeMap, time::Duration};

/// Where a job stands after so many batches.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Progress {
    /// Batches done.
    pub(super) iteration: u64,
    pub(super) updates: u64,
    /// As of the last report.
    pub(super) trained_tokens: u64,
    pub(super) since: SinceReport,
    /// By worker: most bytes that MLX had in use.
    peaks: BTreeMap<String, u64>,
    /// See [`TrainReport::learning_rate`].
    pub(super) learning_rate: f32,
}

impl Progress {
    pub(super) fn new(iteration: u64, updates: u64, trained_tokens: u64, since: SinceReport) -> Self {
        Self { iteration, updates, trained_tokens, since, ..Self::default() }
    }

    /// A batch is done, `took` after the one before it; `done` is about it and others.
    pub(super) fn add(&mut self, done: &Done, loss: f64, counted: u64, took: Duration) {
        self.iteration += 1;
        self.since.losses += loss;
        self.since.tokens += counted;
        self.since.steps += 1;
        self.since.seconds += took.as_secs_f64();
        let all = (done.busy + done.waiting).as_secs_f64();
        let share = if all > 0.0 { done.waiting.as_secs_f64() / all } else { 0.0 };
        self.since.waiting_seconds += share * took.as_secs_f64();
        for (worker, peak) in &done.peaks {
            let known = self.peaks.entry(worker.clone()).or_default();
            *known = (*known).max(*peak);
        }
    }

    /// What the batches since the last report came to; the next one begins with nothing.
    pub(super) fn report(&mut self) -> TrainReport {
        let SinceReport { losses, tokens, steps, seconds, waiting_seconds } = std::mem::take(&mut self.since);
        self.trained_tokens += tokens;
        let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        TrainReport {
            iteration: self.iteration,
            train_loss: (losses / steps.max(1) as f64) as f32,
            learning_rate: self.learning_rate,
            iterations_per_second: per_second(steps as f64),
            tokens_per_second: per_second(tokens as f64),
            trained_tokens: self.trained_tokens,
            peak_memory: self.peaks.values().copied().max().map_or(0.0, gigabytes),
            peak_memory_per_worker: self.peaks.iter().map(|(worker, bytes)| (worker.clone(), gigabytes(*bytes))).collect(),
            communication_share: if seconds > 0.0 { (waiting_seconds / seconds).clamp(0.0, 1.0) } else { 0.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(peak: u64) -> Done {
        let (busy, waiting) = (Duration::from_millis(300), Duration::from_millis(100));
        Done { losses: BTreeMap::new(), busy, waiting, peaks: BTreeMap::from([("mini".into(), peak)]) }
    }

    #[test]
    fn a_report_is_about_the_batches_since_the_last_one() {
        let mut progress = Progress::default();
        progress.add(&done(5_000_000_000), 2.0, 30, Duration::from_secs(1));
        progress.add(&done(4_000_000_000), 1.0, 10, Duration::from_secs(1));
        let report = progress.report();
        assert_eq!((report.iteration, report.train_loss, report.trained_tokens), (2, 1.5, 40));
        assert_eq!((report.iterations_per_second, report.tokens_per_second), (1.0, 20.0));
        assert_eq!((report.peak_memory, report.communication_share), (5.0, 0.25));
        assert_eq!(progress.since, SinceReport::default());
        progress.add(&done(1), 0.5, 10, Duration::from_secs(2));
        let report = progress.report();
        assert_eq!((report.iteration, report.train_loss, report.trained_tokens), (3, 0.5, 50));
    }

    #[test]
    fn a_job_that_goes_on_reports_as_if_it_had_never_stopped() {
        let mut whole = Progress::default();
        whole.add(&done(7), 2.0, 30, Duration::from_secs(1));
        let saved = whole.clone();
        let mut resumed = Progress::new(saved.iteration, saved.updates, saved.trained_tokens, saved.since);
        whole.add(&done(7), 1.0, 10, Duration::from_secs(1));
        resumed.add(&done(7), 1.0, 10, Duration::from_secs(1));
        assert_eq!(whole.report(), resumed.report());
    }
}

//! A job as somebody at a terminal follows it: reports in mlx-lm's words, a bar, and an end.

use super::place::{Place, ended};
use crate::{
    client::{Client, jobs::StartedJob},
    failure::{Exit, Failure},
    progress::{add_bar, suspended},
    target::interrupted,
};
use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use mlx_cluster_coordinator::training::{
    events::{JobEvent, NumberedEvent},
    store::{JobId, JobState},
};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// A coordinator that does not answer for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(15);
const RETRY: Duration = Duration::from_millis(500);

/// Follows a job to its end. When this process is told to stop, a job of a coordinator elsewhere goes on; one of this process is stopped.
pub(crate) async fn attach(place: &mut Place, job: &StartedJob, stop: &CancellationToken) -> anyhow::Result<()> {
    let client = place.client.clone();
    let mut shown = Shown::default();
    let followed = {
        let mut following = std::pin::pin!(follow(&client, job, &mut shown));
        let first = tokio::select! {
            followed = &mut following => Some(followed),
            error = ended(&mut place.local) => Some(Err(error)),
            () = stop.cancelled() => None,
        };
        match first {
            None if place.local.is_some() => {
                // Its end is told by its events.
                client.stop_job(&job.id).await?;
                Some(following.await)
            }
            first => first,
        }
    };
    shown.clear();
    match followed {
        Some(followed) => followed?,
        None => return Err(detached(&job.id)),
    }
    conclude(&shown, job, stop)
}

fn detached(id: &JobId) -> anyhow::Error {
    suspended(|| {
        eprintln!(
            "detached: job {id} goes on; follow it with `mlx-cluster jobs logs {id} --follow`, end it with `mlx-cluster jobs stop {id}`"
        );
    });
    interrupted()
}

/// The job's end in a sentence, and as an exit status.
fn conclude(shown: &Shown, job: &StartedJob, stop: &CancellationToken) -> anyhow::Result<()> {
    let StartedJob { id, adapter_path, .. } = job;
    let Some((state, iteration)) = &shown.end else {
        let message = format!("job {id} is over, and how it ended was not told: look with `mlx-cluster jobs show {id}`");
        return Err(Failure::new(Exit::Other, message).into());
    };
    match state {
        JobState::Failed { cause } => Err(Failure::new(Exit::Other, format!("job {id} failed: {cause}")).into()),
        JobState::Stopped { .. } if stop.is_cancelled() => {
            eprintln!("job {id} stopped at iteration {iteration}; it goes on with `mlx-cluster jobs resume {id}`");
            Err(interrupted())
        }
        JobState::Stopped { cause } => {
            let message = format!("job {id} stopped at iteration {iteration} ({cause}): it goes on with `mlx-cluster jobs resume {id}`");
            Err(Failure::new(Exit::Other, message).into())
        }
        _ => {
            match adapter_path.as_str() {
                "" => println!("job {id} finished"),
                path => println!("job {id} finished; the adapter is in {path}"),
            }
            Ok(())
        }
    }
}

/// All events to the end; connections that break are made again.
async fn follow(client: &Client, job: &StartedJob, shown: &mut Shown) -> anyhow::Result<()> {
    let mut next = job.next_event;
    let mut heard = Instant::now();
    loop {
        let followed = client.job_events(&job.id, next, true, |event| {
            next = event.number + 1;
            heard = Instant::now();
            shown.take(event);
            Ok(())
        });
        match followed.await {
            Ok(()) => return Ok(()),
            Err(_) if shown.end.is_some() => return Ok(()),
            Err(error) if heard.elapsed() > SILENCE_MAX || !is_network(&error) => return Err(lost(&job.id, &error)),
            Err(_) => sleep(RETRY).await,
        }
    }
}

fn is_network(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Failure>().is_none_or(|failure| failure.exit() == Exit::Network)
}

fn lost(id: &JobId, error: &anyhow::Error) -> anyhow::Error {
    let hint = "once a coordinator of the same home runs again, it goes on with";
    Failure::new(Exit::Network, format!("job {id} is out of sight ({error}); {hint} `mlx-cluster jobs resume {id}`")).into()
}

/// What was told of a job, and its bar.
#[derive(Default)]
pub(crate) struct Shown {
    is_log: bool,
    bar: Option<Bar>,
    loss: Option<f32>,
    /// How it ended, and after how many iterations.
    end: Option<(JobState, u64)>,
}

impl Shown {
    /// The end is a line like others.
    pub(crate) fn log() -> Self {
        Self { is_log: true, ..Self::default() }
    }

    pub(crate) fn take(&mut self, event: NumberedEvent) {
        match event.event {
            JobEvent::Progress { iteration, of, eta } => self.progress(iteration, of, eta),
            JobEvent::Ended { state, iteration } if !self.is_log => self.end = Some((state, iteration)),
            event => {
                if let JobEvent::Train(report) = &event {
                    self.loss = Some(report.train_loss);
                }
                if let Some(line) = line(&event) {
                    suspended(|| println!("{line}"));
                }
            }
        }
    }

    fn progress(&mut self, iteration: u64, of: u64, eta: Option<f64>) {
        if self.bar.is_none() {
            self.bar = add_bar(|| ProgressBar::new(of).with_style(style())).map(Bar);
        }
        let Some(Bar(bar)) = &self.bar else { return };
        let loss = self.loss.map(|loss| format!("loss {loss:.3}"));
        let left = eta.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).map(|left| format!("{} left", HumanDuration(left)));
        bar.set_length(of);
        bar.set_position(iteration);
        bar.set_message(loss.into_iter().chain(left).collect::<Vec<_>>().join(", "));
    }

    /// Takes the bar away.
    fn clear(&mut self) {
        self.bar = None;
    }
}

/// Gone from the terminal when it is dropped.
struct Bar(ProgressBar);

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// An event as a line for people; None for what a bar shows.
pub(crate) fn line(event: &JobEvent) -> Option<String> {
    Some(match event {
        JobEvent::State { state: JobState::Queued } => "waiting for its turn".into(),
        JobEvent::State { state } => state.name().into(),
        JobEvent::Plan { text } => text.trim_end().into(),
        JobEvent::Note { text } => text.clone(),
        JobEvent::Train(report) => report.to_string(),
        JobEvent::Val(report) => report.to_string(),
        JobEvent::Test(report) => report.to_string(),
        JobEvent::Saved { iteration } => format!("Iter {iteration}: Saved a checkpoint"),
        JobEvent::WorkerLost { worker, cause } => {
            format!("lost worker {worker} ({cause}); the job goes on from its last checkpoint, without this worker if it stays away")
        }
        JobEvent::Ended { state, iteration } => {
            let cause = state.cause().map(|cause| format!(": {cause}")).unwrap_or_default();
            format!("{} at iteration {iteration}{cause}", state.name())
        }
        JobEvent::Progress { .. } => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_in_a_line() {
        let saved = line(&JobEvent::Saved { iteration: 40 });
        assert_eq!(saved.as_deref(), Some("Iter 40: Saved a checkpoint"));
        let ended = JobEvent::Ended { state: JobState::Failed { cause: "the disk is full".into() }, iteration: 7 };
        assert_eq!(line(&ended).as_deref(), Some("failed at iteration 7: the disk is full"));
        assert_eq!(line(&JobEvent::Ended { state: JobState::Finished, iteration: 9 }).as_deref(), Some("finished at iteration 9"));
        assert_eq!(line(&JobEvent::Progress { iteration: 1, of: 2, eta: None }), None);
    }

    #[test]
    fn how_a_job_ended_decides_the_exit_status() {
        let job = StartedJob { id: JobId::parse("20260101-abcdef").unwrap(), next_event: 0, adapter_path: "/a".into() };
        let conclude = |state: JobState, stopped: bool| {
            let stop = CancellationToken::new();
            if stopped {
                stop.cancel();
            }
            super::conclude(&Shown { end: Some((state, 5)), ..Shown::default() }, &job, &stop)
                .map_err(|error| error.downcast::<Failure>().unwrap())
        };
        assert!(conclude(JobState::Finished, false).is_ok());
        let failed = conclude(JobState::Failed { cause: "NaN".into() }, false).unwrap_err();
        assert_eq!((failed.exit(), failed.to_string().as_str()), (Exit::Other, "job 20260101-abcdef failed: NaN"));
        let stopped = JobState::Stopped { cause: "it was asked to".into() };
        let elsewhere = conclude(stopped.clone(), false).unwrap_err();
        assert!(elsewhere.exit() == Exit::Other && elsewhere.to_string().contains("jobs resume 20260101-abcdef"), "{elsewhere}");
        assert_eq!(conclude(stopped, true).unwrap_err().exit(), Exit::Interrupted);
    }
}

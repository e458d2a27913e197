//! Jobs from their start to their end and beyond, with a script in place of engines.

use super::*;
use crate::training::{
    checkpoint::tests::config,
    events::{JobEvent, NumberedEvent},
    fixtures::{Scripted, deaf, summing},
    runs::{Outcome, Run, RunnerContext},
};
use mlx_cluster_common::ids::InstanceId;
use serde_json::json;
use std::path::Path;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

struct Home {
    folder: TempDir,
}

impl Home {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn open(&self, runner: impl RunJob) -> (Jobs, JobsTask) {
        let parts = JobParts { home: self.folder.path().into(), runner: Box::new(runner), commands: mpsc::channel(1).0 };
        Jobs::open(parts).unwrap()
    }

    fn adapter(&self) -> std::path::PathBuf {
        self.folder.path().join("adapter")
    }

    fn request(&self, changes: Value) -> StartRequest {
        let mut all = json!({"adapter_path": self.adapter(), "iters": 10, "save_every": 4});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        StartRequest { config: config(all), strategy: TrainStrategy::Auto, split: None }
    }
}

async fn all(jobs: &Jobs, id: &JobId, from: u64) -> Vec<NumberedEvent> {
    let mut listener = jobs.follow(id.as_str(), from).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = tokio::time::timeout(PATIENCE, listener.next()).await.expect("it ends") {
        events.push((*event).clone());
    }
    events
}

async fn until(jobs: &Jobs, id: &JobId, wanted: impl Fn(&JobRecord) -> bool) -> JobRecord {
    for _ in 0..2000 {
        let record = jobs.show(id.as_str()).await.unwrap();
        if wanted(&record) {
            return record;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?}", jobs.show(id.as_str()).await);
}

fn outcome(events: &[NumberedEvent]) -> JobState {
    match &events.last().unwrap().event {
        JobEvent::Ended { state, .. } => state.clone(),
        other => panic!("{other:?}"),
    }
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn a_job_runs_to_its_end_and_leaves_its_files() {
    let home = Home::new();
    let (jobs, task) = home.open(summing(99));
    let started = jobs.start(home.request(json!({}))).await.unwrap();
    assert_eq!((started.record.state.name(), started.next_event), ("queued", 0));
    let id = started.record.id;
    let events = all(&jobs, &id, 0).await;
    assert_eq!(outcome(&events), JobState::Finished);
    assert_eq!(events[0].event, JobEvent::State { state: JobState::Queued });
    let saved = events.iter().filter_map(|event| if let JobEvent::Saved { iteration } = event.event { Some(iteration) } else { None });
    assert_eq!(saved.collect::<Vec<_>>(), [4, 8, 10]);
    let record = jobs.show(id.as_str()).await.unwrap();
    assert_eq!((record.state.clone(), record.iteration, record.plan.as_deref()), (JobState::Finished, 10, Some("all on one worker")));
    assert_eq!(jobs.list().await.unwrap(), [record]);
    let metrics = jobs.metrics(id.as_str()).await.unwrap();
    assert_eq!(
        (metrics.lines().count(), metrics.lines().map(str::to_owned).collect::<Vec<_>>()),
        (11, lines(&home.adapter().join("metrics.jsonl")))
    );
    assert!(matches!(jobs.stop(id.as_str()).await, Err(JobError::NotActive { state: "finished", .. })));
    task.stop(PATIENCE).await;
    assert!(matches!(jobs.start(home.request(json!({}))).await, Err(JobError::Stopping)));
}

#[tokio::test]
async fn jobs_wait_for_each_other_and_can_be_stopped_before_their_turn() {
    let home = Home::new();
    let (jobs, _task) = home.open(summing(3));
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(jobs.start(home.request(json!({}))).await.unwrap().record.id);
    }
    until(&jobs, &ids[0], |record| record.iteration == 3).await;
    assert_eq!(jobs.show(ids[1].as_str()).await.unwrap().state, JobState::Queued);
    assert_eq!(jobs.stop(ids[1].as_str()).await.unwrap().state.name(), "stopped");
    jobs.stop(ids[0].as_str()).await.unwrap();
    assert_eq!(outcome(&all(&jobs, &ids[0], 0).await), JobState::Stopped { cause: "it was asked to".into() });
    until(&jobs, &ids[2], |record| record.state == JobState::Running && record.iteration == 3).await;
    assert_eq!(jobs.show(ids[1].as_str()).await.unwrap().state.name(), "stopped");
    for _ in 0..16 {
        jobs.start(home.request(json!({}))).await.unwrap();
    }
    assert!(matches!(jobs.start(home.request(json!({}))).await, Err(JobError::TooMany { waiting: 16 })));
}

#[tokio::test]
async fn a_stopped_job_goes_on_to_what_it_would_have_come_to() {
    let whole = Home::new();
    let (jobs, _task) = whole.open(summing(99));
    let id = jobs.start(whole.request(json!({}))).await.unwrap().record.id;
    all(&jobs, &id, 0).await;

    let home = Home::new();
    let (jobs, task) = home.open(summing(6));
    let id = jobs.start(home.request(json!({}))).await.unwrap().record.id;
    until(&jobs, &id, |record| record.iteration == 6).await;
    // The coordinator ends in order, and so does the job.
    task.stop(PATIENCE).await;
    let (jobs, _task) = home.open(summing(99));
    let record = jobs.show(id.as_str()).await.unwrap();
    assert_eq!((record.state, record.iteration), (JobState::Stopped { cause: "the coordinator was stopped".into() }, 6));
    let resumed = jobs.resume(id.as_str(), ResumeRequest::default()).await.unwrap();
    let events = all(&jobs, &id, resumed.next_event).await;
    assert_eq!((&events[0].event, outcome(&events)), (&JobEvent::State { state: JobState::Queued }, JobState::Finished));
    for file in ["adapters.safetensors", "metrics.jsonl"] {
        assert_eq!(std::fs::read(home.adapter().join(file)).unwrap(), std::fs::read(whole.adapter().join(file)).unwrap(), "{file}");
    }
    let refused = jobs.resume(id.as_str(), ResumeRequest::default()).await.unwrap_err().to_string();
    assert!(refused.contains("has finished at iteration 10: give more `iters`"), "{refused}");
    let more = ResumeRequest { changes: json!({"iters": 12}).as_object().unwrap().clone(), ..ResumeRequest::default() };
    assert_eq!(jobs.resume(id.as_str(), more).await.unwrap().record.config.iters, 12);
    all(&jobs, &id, 0).await;
    assert_eq!(jobs.show(id.as_str()).await.unwrap().iteration, 12);
}

#[tokio::test]
async fn a_job_of_a_coordinator_that_was_killed_is_stopped_and_not_run_twice() {
    let home = Home::new();
    let (jobs, task) = home.open(deaf(6));
    let id = jobs.start(home.request(json!({}))).await.unwrap().record.id;
    until(&jobs, &id, |record| record.iteration == 6).await;
    // Another coordinator of this home sees it, and leaves it alone.
    let (other, _other_task) = home.open(summing(99));
    assert_eq!(other.show(id.as_str()).await.unwrap().state, JobState::Running);
    assert!(matches!(other.stop(id.as_str()).await, Err(JobError::Elsewhere { .. })));
    assert!(matches!(other.resume(id.as_str(), ResumeRequest::default()).await, Err(JobError::Active { state: "running", .. })));
    // Nothing is written when it is cut off.
    task.stop(Duration::from_millis(20)).await;
    let (jobs, _task) = loop {
        let opened = home.open(summing(99));
        if !opened.0.show(id.as_str()).await.unwrap().state.is_active() {
            break opened;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let stopped = JobState::Stopped { cause: "the coordinator ended".into() };
    assert_eq!(jobs.show(id.as_str()).await.unwrap().state, stopped);
    // Whoever followed it before is told when they come back.
    assert_eq!(outcome(&all(&jobs, &id, 0).await), stopped);
    let resumed = jobs.resume(id.as_str(), ResumeRequest::default()).await.unwrap();
    let events = all(&jobs, &id, resumed.next_event).await;
    // From the checkpoint at 4.
    let first = events.iter().find_map(|event| if let JobEvent::Train(report) = &event.event { Some(report.iteration) } else { None });
    assert_eq!((first, outcome(&events)), (Some(5), JobState::Finished));
}

#[tokio::test]
async fn what_would_come_to_other_numbers_is_refused_with_the_differences() {
    let home = Home::new();
    let (jobs, _task) = home.open(summing(6));
    let id = jobs.start(home.request(json!({}))).await.unwrap().record.id;
    let resume = async |changes: Value, warm_start: bool| {
        let request = ResumeRequest { warm_start, changes: changes.as_object().unwrap().clone() };
        jobs.resume(id.as_str(), request).await
    };
    until(&jobs, &id, |record| record.iteration == 6).await;
    assert!(matches!(resume(json!({}), false).await, Err(JobError::Active { state: "running", .. })));
    jobs.stop(id.as_str()).await.unwrap();
    all(&jobs, &id, 0).await;
    let refused = resume(json!({"seed": 3, "batch_size": 2}), false).await.unwrap_err().to_string();
    assert!(["iteration 6", "`seed` is 3", "`batch_size` is 2"].iter().all(|part| refused.contains(part)), "{refused}");
    assert!(matches!(resume(json!({"sed": 3}), false).await, Err(JobError::Config(_))));
    let folder = home.folder.path().join("jobs").join(id.as_str()).join("checkpoints/0000006");
    std::fs::remove_file(folder.join("optimizer.safetensors")).unwrap();
    let record = jobs.show(id.as_str()).await.unwrap();
    assert_eq!(record.state.name(), "stopped");
    // The newest is damaged now, and the one before it is gone on from.
    resume(json!({"iters": 11}), false).await.unwrap();
    assert!(matches!(jobs.resume("nobody", ResumeRequest::default()).await, Err(JobError::NotFound { .. })));
    assert!(matches!(jobs.show("../x").await, Err(JobError::NotFound { .. })));
}

#[tokio::test]
async fn a_failed_job_says_why_and_one_that_breaks_does_not_break_the_others() {
    let home = Home::new();
    let numbers = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&numbers);
    let (jobs, _task) = home.open(Scripted(move |context: RunnerContext| {
        seen.lock().unwrap().push(context.instance);
        Box::pin(async move {
            match context.job.config.seed {
                0 => panic!("oops"),
                _ => Outcome::Failed("the loss of iteration 7 is NaN".into()),
            }
        }) as Run
    }));
    let broken = jobs.start(home.request(json!({"seed": 0}))).await.unwrap().record.id;
    let failed = jobs.start(home.request(json!({"seed": 1}))).await.unwrap().record.id;
    let state = outcome(&all(&jobs, &failed, 0).await);
    assert_eq!(state, JobState::Failed { cause: "the loss of iteration 7 is NaN".into() });
    assert_eq!(jobs.show(failed.as_str()).await.unwrap().state, state);
    assert!(outcome(&all(&jobs, &broken, 0).await).cause().unwrap().contains("oops"));
    assert_eq!(*numbers.lock().unwrap(), [InstanceId(1), InstanceId(2)]);
    // Without a checkpoint it begins anew.
    assert_eq!(jobs.resume(failed.as_str(), ResumeRequest::default()).await.unwrap().record.iteration, 0);
}

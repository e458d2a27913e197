//! Fine-tuning jobs of a coordinator: started, watched, stopped and resumed.

use super::{Client, Lines, STATUS_TIMEOUT, refusal};
use crate::{
    failure::{Exit, Failure},
    progress::suspended,
};
use anyhow::Context;
use futures_util::StreamExt;
use mlx_cluster_common::training::TrainStrategy;
use mlx_cluster_coordinator::training::{
    events::NumberedEvent,
    store::{JobId, JobState},
};
use reqwest::{RequestBuilder, Response};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// A coordinator may hash the files of a large checkpoint before it answers.
const RESUME_TIMEOUT: Duration = Duration::from_secs(600);

/// A job that waits or runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StartedJob {
    pub(crate) id: JobId,
    /// The number of its first event from now on.
    pub(crate) next_event: u64,
    pub(crate) adapter_path: String,
}

impl Client {
    /// `POST /v1/jobs`.
    pub(crate) async fn start_job(
        &self,
        config: &Map<String, Value>,
        strategy: TrainStrategy,
        split: Option<&[u32]>,
    ) -> anyhow::Result<StartedJob> {
        let request = self.http.post(format!("{}/v1/jobs", self.url)).timeout(STATUS_TIMEOUT);
        started(&self.json(request.json(&json!({"config": config, "strategy": strategy, "split": split}))).await?)
    }

    /// `POST /v1/jobs/{id}/resume`. `changes` are keys of the config.
    pub(crate) async fn resume_job(&self, id: &JobId, warm_start: bool, changes: &Map<String, Value>) -> anyhow::Result<StartedJob> {
        let request = self.http.post(format!("{}/v1/jobs/{id}/resume", self.url)).timeout(RESUME_TIMEOUT);
        started(&self.json(request.json(&json!({"warm_start": warm_start, "config": changes}))).await?)
    }

    /// `POST /v1/jobs/{id}/stop`.
    pub(crate) async fn stop_job(&self, id: &JobId) -> anyhow::Result<Value> {
        self.json(self.http.post(format!("{}/v1/jobs/{id}/stop", self.url)).timeout(STATUS_TIMEOUT)).await
    }

    /// `GET /v1/jobs`: all of them.
    pub(crate) async fn jobs(&self) -> anyhow::Result<Value> {
        self.json(self.http.get(format!("{}/v1/jobs", self.url)).timeout(STATUS_TIMEOUT)).await
    }

    /// `GET /v1/jobs/{id}`.
    pub(crate) async fn job(&self, id: &JobId) -> anyhow::Result<Value> {
        self.json(self.http.get(format!("{}/v1/jobs/{id}", self.url)).timeout(STATUS_TIMEOUT)).await
    }

    /// `GET /v1/jobs/{id}/metrics`: the text of metrics.jsonl.
    pub(crate) async fn job_metrics(&self, id: &JobId) -> anyhow::Result<String> {
        let request = self.http.get(format!("{}/v1/jobs/{id}/metrics", self.url)).timeout(STATUS_TIMEOUT);
        self.send(request).await?.text().await.with_context(|| format!("the answer from {} broke off", self.url))
    }

    /// `GET /v1/jobs/{id}/events` from `from` on, handed to `each`; with `follow`, until the job ends.
    pub(crate) async fn job_events(
        &self,
        id: &JobId,
        from: u64,
        follow: bool,
        mut each: impl FnMut(NumberedEvent) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let request = self.http.get(format!("{}/v1/jobs/{id}/events?from={from}&follow={follow}", self.url));
        let mut chunks = self.send(request).await?.bytes_stream();
        let mut lines = Lines::default();
        let broke_off = || Failure::new(Exit::Network, format!("the events of job {id} from {} broke off", self.url));
        while let Some(chunk) = chunks.next().await {
            for line in lines.push(&chunk.map_err(|_| broke_off())?)? {
                let Some(data) = line.strip_prefix("data:").map(str::trim) else { continue };
                if data == "[DONE]" {
                    return Ok(());
                }
                match serde_json::from_str(data) {
                    Ok(event) => each(event)?,
                    Err(error) => match error_event(data) {
                        Some(error) => return Err(error),
                        // The others are worth something still.
                        None => suspended(|| {
                            eprintln!("an event of job {id} cannot be read ({error}): is the coordinator of another version?");
                        }),
                    },
                }
            }
        }
        Err(broke_off().into())
    }

    async fn json(&self, request: RequestBuilder) -> anyhow::Result<Value> {
        self.send(request).await?.json().await.with_context(|| format!("{} does not answer like a coordinator", self.url))
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        match response.status().is_success() {
            true => Ok(response),
            false => Err(refusal(response).await.into()),
        }
    }
}

fn started(job: &Value) -> anyhow::Result<StartedJob> {
    let adapter_path = job["adapter_path"].as_str().unwrap_or_default().to_owned();
    let read = job["id"].as_str().and_then(JobId::parse).zip(job["next_event"].as_u64());
    let (id, next_event) = read.with_context(|| format!("a coordinator does not tell of a job so: {job}"))?;
    Ok(StartedJob { id, next_event, adapter_path })
}

/// The coordinator is going away.
fn error_event(data: &str) -> Option<anyhow::Error> {
    let event: Value = serde_json::from_str(data).ok()?;
    Some(Failure::new(Exit::Network, event.pointer("/error/message")?.as_str()?).into())
}

/// How a job stands, from the API's object.
pub(crate) fn state_of(job: &Value) -> Option<JobState> {
    serde_json::from_value(job.clone()).ok()
}

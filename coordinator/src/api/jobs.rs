//! `/v1/jobs`: fine-tuning jobs, started, watched, stopped and resumed.

use super::{
    Api,
    answer::sse,
    body::JsonBody,
    error::{ApiError, JobErrorKind, shown},
    fields::{Fields, as_integer, wrong_type},
};
use crate::training::{
    events::Listener,
    jobs::{JobError, ResumeRequest, StartRequest, Started},
    store::JobRecord,
};
use axum::{
    Json,
    extract::{Path, RawQuery, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response, sse::Event},
};
use futures_util::{Stream, stream::unfold};
use mlx_cluster_common::training::{TrainStrategy, TrainingConfig};
use serde_json::{Map, Value, json};
use std::{convert::Infallible, sync::Arc};
use tokio_util::sync::CancellationToken;

/// Answers once the job waits for its turn.
pub(super) async fn start(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<(StatusCode, Json<Value>), ApiError> {
    let keys = fields.object("config")?.ok_or_else(|| fields.missing("config", "; give the keys of mlx-lm's lora.py as an object"))?;
    let strategy = fields.string("strategy")?.map(|text| strategy(&text)).transpose()?.unwrap_or_default();
    let split = split(&mut fields)?;
    fields.finish()?;
    let config = TrainingConfig::parse(&keys).map_err(JobError::from)?;
    Ok(accepted(&api.jobs.start(StartRequest { config, strategy, split }).await?))
}

pub(super) async fn list(State(api): State<Arc<Api>>) -> Result<Json<Value>, ApiError> {
    let jobs: Vec<Value> = api.jobs.list().await?.iter().map(|job| Value::Object(summary(job))).collect();
    Ok(Json(json!({"object": "list", "data": jobs})))
}

pub(super) async fn show(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(whole(&api.jobs.show(&id).await?)))
}

/// Answers once the job is told to stop; it ends with a checkpoint.
pub(super) async fn stop(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<(StatusCode, Json<Value>), ApiError> {
    Ok((StatusCode::ACCEPTED, Json(whole(&api.jobs.stop(&id).await?))))
}

/// Answers once the job waits for its turn. `config` has the keys that change.
pub(super) async fn resume(
    State(api): State<Arc<Api>>,
    Path(id): Path<String>,
    JsonBody(mut fields): JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    let warm_start = fields.bool("warm_start")?.unwrap_or(false);
    let changes = fields.object("config")?.unwrap_or_default();
    fields.finish()?;
    Ok(accepted(&api.jobs.resume(&id, ResumeRequest { warm_start, changes }).await?))
}

/// `metrics.jsonl` as it is now.
pub(super) async fn metrics(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let text = api.jobs.metrics(&id).await?;
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson; charset=utf-8")], text).into_response())
}

/// A stream of events from `?from=N` on, the first by default; it ends with the job, and with what there is where `follow=false`.
pub(super) async fn events(State(api): State<Arc<Api>>, Path(id): Path<String>, RawQuery(query): RawQuery) -> Result<Response, ApiError> {
    let listener = match asked(query.as_deref().unwrap_or_default())? {
        (from, true) => api.jobs.follow(&id, from).await?,
        (from, false) => api.jobs.past(&id, from).await?,
    };
    Ok(sse(stream(listener, api.stopping.clone())))
}

fn stream(listener: Listener, stopping: CancellationToken) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    unfold(Some((listener, stopping)), |state| async move {
        let (mut listener, stopping) = state?;
        let next = tokio::select! {
            // What happened before the end is told before the end.
            biased;
            next = listener.next() => next.map(Ok),
            () = stopping.cancelled() => Some(Err(ApiError::Stopping)),
        };
        Some(match next {
            // Written as it stands: a number would lose its shortest form on the way through a JSON value.
            Some(Ok(event)) => match serde_json::to_string(&*event) {
                Ok(text) => (Ok(Event::default().id(event.number.to_string()).data(text)), Some((listener, stopping))),
                Err(_) => (Ok(Event::default().comment("an event that cannot be told")), Some((listener, stopping))),
            },
            Some(Err(error)) => (Ok(Event::default().data(error.body().to_string())), None),
            None => (Ok(Event::default().data("[DONE]")), None),
        })
    })
}

/// The first event, and whether to wait for those to come.
fn asked(query: &str) -> Result<(u64, bool), ApiError> {
    let (mut from, mut follow) = (0, true);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let wrong = |wanted: &str| wrong_type(name, wanted, &Value::from(value));
        match name {
            "from" => from = value.parse().map_err(|_| wrong("the number of an event"))?,
            "follow" => follow = value.parse().map_err(|_| wrong("true or false"))?,
            _ => return Err(ApiError::Unsupported { param: shown(name), hint: String::new() }),
        }
    }
    Ok((from, follow))
}

/// Layers of each stage.
fn split(fields: &mut Fields) -> Result<Option<Vec<u32>>, ApiError> {
    let Some(items) = fields.list("split")? else { return Ok(None) };
    let layers = |(place, item): (usize, &Value)| {
        let number = as_integer(&format!("split[{place}]"), item, 1..=i64::from(u32::MAX))?;
        Ok(u32::try_from(number).unwrap_or(u32::MAX))
    };
    items.iter().enumerate().map(layers).collect::<Result<_, ApiError>>().map(Some)
}

fn strategy(text: &str) -> Result<TrainStrategy, ApiError> {
    let wrong = |_| ApiError::OutOfRange {
        param: "strategy".into(),
        wanted: "one of auto, data, pipeline, tensor".into(),
        found: format!("`{}`", shown(text)),
    };
    text.parse().map_err(wrong)
}

fn accepted(started: &Started) -> (StatusCode, Json<Value>) {
    let mut job = whole(&started.record);
    job["next_event"] = json!(started.next_event);
    (StatusCode::ACCEPTED, Json(job))
}

fn summary(job: &JobRecord) -> Map<String, Value> {
    let fields = [
        ("id", json!(job.id)),
        ("object", json!("training.job")),
        ("state", json!(job.state.name())),
        ("cause", json!(job.state.cause())),
        ("created", json!(job.created)),
        ("model", json!(job.config.model)),
        ("iteration", json!(job.iteration)),
        ("iterations", json!(job.config.iters)),
        ("strategy", json!(job.strategy)),
        ("adapter_path", json!(job.config.adapter_path)),
    ];
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn whole(job: &JobRecord) -> Value {
    let mut all = summary(job);
    let more = [
        ("split", json!(job.split)),
        ("warm_start", json!(job.warm_start)),
        ("plan", json!(job.plan)),
        ("data_fingerprint", json!(job.data_fingerprint)),
        ("config", Value::Object(job.config.clone().into())),
    ];
    all.extend(more.into_iter().map(|(name, value)| (name.to_owned(), value)));
    Value::Object(all)
}

impl From<JobError> for ApiError {
    fn from(error: JobError) -> Self {
        let kind = match &error {
            JobError::Config(_) => return ApiError::Invalid { param: "config".into(), message: error.to_string() },
            JobError::Stopping => return ApiError::Stopping,
            JobError::NotFound { .. } => JobErrorKind::NotFound,
            JobError::TooMany { .. } => JobErrorKind::TooMany,
            JobError::Active { .. } | JobError::NotActive { .. } | JobError::Elsewhere { .. } => JobErrorKind::Conflict,
            JobError::Finished { .. } | JobError::Refused(_) => JobErrorKind::Conflict,
            JobError::Store(_) | JobError::Metrics { .. } | JobError::Task { .. } => JobErrorKind::Internal,
        };
        ApiError::Job { message: error.to_string(), kind }
    }
}

//! The HTTP API, as OpenAI's clients know it: what comes in is checked here, and tokens go out as text.

mod adapters;
mod answer;
mod body;
mod chat;
mod chat_answer;
mod choice;
mod cluster;
mod completion_answer;
mod completions;
mod error;
mod fields;
mod generation;
mod guard;
mod health;
mod jobs;
mod json;
mod listen;
mod load;
mod logprobs;
mod messages;
mod metrics;
mod models;
mod prompt;
mod run;
mod tokenize;

#[cfg(test)]
mod tests;

pub use listen::serve;

use crate::{
    serving::{AdapterState, AdapterStatus, ClusterStatus, InstanceState, ServedModel, Serving},
    training::jobs::Jobs,
};
use axum::{
    Router,
    extract::{Request, State},
    http::{Method, Uri, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use error::{ApiError, shown};
use guard::Guard;
use metrics::Metrics;
use metrics_exporter_prometheus::BuildError;
use prompt::TextWork;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// What all handlers share.
struct Api {
    serving: Serving,
    jobs: Jobs,
    metrics: Arc<Metrics>,
    guard: Guard,
    text: TextWork,
    /// The server takes no more requests.
    stopping: CancellationToken,
    /// Time is up for what still runs.
    cut: CancellationToken,
}

impl Api {
    fn new(serving: Serving, jobs: Jobs, guard: Guard) -> Result<Self, BuildError> {
        let metrics = Arc::new(Metrics::new()?);
        let text = TextWork::default();
        Ok(Self { serving, jobs, metrics, guard, text, stopping: CancellationToken::new(), cut: CancellationToken::new() })
    }

    fn status(&self) -> Arc<ClusterStatus> {
        Arc::clone(&self.serving.status.borrow())
    }

    fn served_model(&self) -> Option<Arc<ServedModel>> {
        self.serving.model.borrow().clone()
    }

    /// The model for a request that asks for `asked`, once it can answer.
    fn model(&self, asked: Option<String>) -> Result<Arc<ServedModel>, ApiError> {
        let mut served = self.served_model();
        if let (Some(asked), Some(model)) = (&asked, &served)
            && !self.is_name_of(asked, model)
        {
            let adapter = self.adapter_of(asked, model).ok_or_else(|| self.not_found(asked, Some(model)))?;
            served = Some(Arc::new(beside(model, &adapter)));
        }
        if self.stopping.is_cancelled() {
            return Err(ApiError::Stopping);
        }
        let status = self.status();
        match (&status.instance, served) {
            (InstanceState::Ready, Some(model)) => Ok(model),
            (InstanceState::Idle, None) => Err(self.not_found(asked.as_deref().unwrap_or_default(), None)),
            (state, _) => {
                let cause = health::cause(state, &status).map(|cause| format!(": {cause}")).unwrap_or_default();
                Err(ApiError::NotReady { state: state.name(), cause })
            }
        }
    }

    /// A model goes by its id, by the last part of it, by its path, and by mlx-lm's `default_model`.
    fn is_name_of(&self, asked: &str, model: &ServedModel) -> bool {
        let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().map(str::to_owned);
        let is_path = asked.starts_with(['/', '.', '~']);
        let planned = || self.status().plan.as_ref().is_some_and(|plan| plan.model == asked);
        asked == model.id
            || asked == "default_model"
            || last(&model.id).as_deref() == Some(asked)
            || (is_path && last(asked) == last(&model.id))
            || planned()
    }

    /// An adapter goes by its own name, and by that of the model, a colon and its own.
    fn adapter_of(&self, asked: &str, model: &ServedModel) -> Option<AdapterStatus> {
        let status = self.status();
        let name = match asked.rsplit_once(':') {
            Some((base, name)) if self.is_name_of(base, model) => name,
            _ => asked,
        };
        status.adapters.iter().find(|adapter| adapter.facts.name == name && adapter.state != AdapterState::Leaving).cloned()
    }

    fn not_found(&self, asked: &str, served: Option<&ServedModel>) -> ApiError {
        let served = match served {
            Some(model) => {
                let status = self.status();
                let there = status.adapters.iter().filter(|adapter| adapter.state != AdapterState::Leaving);
                let names: String = there.map(|adapter| format!(", or `{}`", beside(model, adapter).id)).collect();
                format!("ask for `{}`{names}", model.id)
            }
            None => "no model is; load one with POST /v1/cluster/load, or start the coordinator with --model".into(),
        };
        ApiError::ModelNotFound { asked: shown(asked), served }
    }
}

/// The model with an adapter, as requests see it.
fn beside(model: &ServedModel, adapter: &AdapterStatus) -> ServedModel {
    ServedModel { id: format!("{}:{}", model.id, adapter.facts.name), adapter: Some(adapter.id), ..model.clone() }
}

fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/completions", post(completions::completions))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/adapters", get(adapters::list).post(adapters::load))
        .route("/v1/adapters/{*name}", delete(adapters::delete))
        .route("/v1/load_lora_adapter", post(adapters::load_as_vllm))
        .route("/v1/unload_lora_adapter", post(adapters::unload_as_vllm))
        .route("/v1/cluster", get(cluster::cluster))
        .route("/v1/cluster/load", post(load::load))
        .route("/v1/cluster/unload", post(load::unload))
        .route("/v1/jobs", get(jobs::list).post(jobs::start))
        .route("/v1/jobs/{id}", get(jobs::show))
        .route("/v1/jobs/{id}/events", get(jobs::events))
        .route("/v1/jobs/{id}/stop", post(jobs::stop))
        .route("/v1/jobs/{id}/resume", post(jobs::resume))
        .route("/v1/jobs/{id}/metrics", get(jobs::metrics))
        .route("/health", get(health::health))
        .route("/metrics", get(render_metrics))
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(Arc::clone(&api), guarded))
        .with_state(api)
}

async fn guarded(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    match api.guard.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn render_metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let model = api.served_model();
    let text = api.metrics.render(&api.status(), model.as_ref().map(|model| model.id.as_str()));
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::NoSuchPath { path: shown(uri.path()) }
}

async fn wrong_method(method: Method) -> ApiError {
    ApiError::WrongMethod { method: shown(method.as_str()) }
}

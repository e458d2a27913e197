//! `GET /health`: 200 when what was asked for can be used, else 503 with the state and its cause.

use super::Api;
use crate::serving::{ClusterStatus, InstanceState};
use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::json;
use std::sync::Arc;

pub(super) async fn health(State(api): State<Arc<Api>>) -> Response {
    let status = api.status();
    let stopping = api.stopping.is_cancelled();
    let state = if stopping { InstanceState::Draining } else { status.instance.clone() };
    // Idle is what a cluster without a model is once enough workers are there.
    let healthy = match state {
        InstanceState::Ready => api.served_model().is_some(),
        InstanceState::Idle => true,
        _ => false,
    };
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({"status": state.name(), "cause": cause(&state, &status)}))).into_response()
}

/// Why an instance cannot answer, in a sentence.
pub(super) fn cause(state: &InstanceState, status: &ClusterStatus) -> Option<String> {
    match state {
        InstanceState::Ready => None,
        InstanceState::Idle => Some("no model was asked for".into()),
        InstanceState::WaitingForWorkers { found, wanted } => {
            let start = format!("start `mlx-cluster worker --cluster {}` on another Mac", status.cluster);
            Some(format!("{found} of {wanted} workers are there; {start}"))
        }
        InstanceState::Loading => Some("the model is being loaded; try again in a moment".into()),
        InstanceState::Recovering { cause } => Some(format!("{cause}; it comes back by itself")),
        InstanceState::Failed { message } => Some(message.clone()),
        InstanceState::Unloading => Some("its engines are being stopped".into()),
        InstanceState::Draining => Some("the coordinator is stopping".into()),
    }
}

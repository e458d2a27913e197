//! `GET /v1/models` and `GET /v1/models/{id}`.

use super::{Api, beside, error::ApiError};
use crate::serving::{AdapterState, AdapterStatus, ServedModel};
use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    let (served, status) = (api.served_model(), api.status());
    let adapters = |model: &Arc<ServedModel>| {
        let there = status.adapters.iter().filter(|adapter| adapter.state != AdapterState::Leaving);
        there.map(|adapter| describe_adapter(model, adapter)).collect::<Vec<_>>()
    };
    let data: Vec<Value> = served.iter().flat_map(|model| [describe(model)].into_iter().chain(adapters(model))).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(super) async fn one(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    match api.served_model() {
        Some(model) if api.is_name_of(&id, &model) => Ok(Json(describe(&model))),
        Some(model) => match api.adapter_of(&id, &model) {
            Some(adapter) => Ok(Json(describe_adapter(&model, &adapter))),
            None => Err(api.not_found(&id, Some(&model))),
        },
        None => Err(api.not_found(&id, None)),
    }
}

/// As vLLM does: `root` is where it comes from, `parent` the model that it goes with.
fn describe_adapter(model: &ServedModel, adapter: &AdapterStatus) -> Value {
    let mut json = describe(&beside(model, adapter));
    json["root"] = json!(adapter.facts.path);
    json["parent"] = json!(model.id);
    json
}

fn describe(model: &ServedModel) -> Value {
    json!({
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "mlx-cluster",
        "max_model_len": model.context_tokens,
        "context_length": model.context_tokens,
    })
}

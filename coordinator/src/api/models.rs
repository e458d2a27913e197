//! `GET /v1/models` and `GET /v1/models/{id}`.

use super::{Api, error::ApiError};
use crate::serving::ServedModel;
use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    let data: Vec<Value> = api.served_model().iter().map(|model| describe(model)).collect();
    Json(json!({"object": "list", "data": data}))
}

pub(super) async fn one(State(api): State<Arc<Api>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    match api.served_model() {
        Some(model) if api.is_name_of(&id, &model) => Ok(Json(describe(&model))),
        served => Err(api.not_found(&id, served.as_deref())),
    }
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

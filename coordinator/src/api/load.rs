//! `POST /v1/cluster/load` and `POST /v1/cluster/unload`: which model a running coordinator serves.

use super::{
    Api,
    body::JsonBody,
    error::{ApiError, shown},
};
use crate::loading::LoadRequest;
use axum::{Json, extract::State, http::StatusCode};
use mlx_cluster_common::plan::Strategy;
use serde_json::{Value, json};
use std::sync::Arc;

/// Answers once the model's files are read and its engines are being planned; `/health` says when it is ready.
pub(super) async fn load(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<(StatusCode, Json<Value>), ApiError> {
    let model =
        fields.string("model")?.ok_or_else(|| fields.missing("model", "; give a folder or a repository on the Hugging Face hub"))?;
    let strategy = fields.string("strategy")?.map(|text| strategy(&text)).transpose()?;
    let context = fields.integer("context", 1..=i64::from(u32::MAX))?;
    fields.finish()?;
    let context_tokens = context.and_then(|tokens| u32::try_from(tokens).ok());
    let name = api.serving.load(LoadRequest { model, strategy, context_tokens }).await.ok_or(ApiError::Stopping)??;
    Ok((StatusCode::ACCEPTED, Json(json!({"model": name, "status": "loading"}))))
}

/// Answers once the engines are gone.
pub(super) async fn unload(State(api): State<Arc<Api>>) -> Result<Json<Value>, ApiError> {
    let name = api.serving.unload().await.ok_or(ApiError::Stopping)??;
    Ok(Json(json!({"model": name, "status": "unloaded"})))
}

fn strategy(text: &str) -> Result<Strategy, ApiError> {
    let wrong = |_| ApiError::OutOfRange {
        param: "strategy".into(),
        wanted: "one of auto, pipeline, tensor".into(),
        found: format!("`{}`", shown(text)),
    };
    text.parse().map_err(wrong)
}

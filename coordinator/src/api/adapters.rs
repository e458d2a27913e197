//! `/v1/adapters`, and the same under vLLM's names: adapters that are loaded and dropped while the coordinator runs.

use super::{Api, body::JsonBody, error::ApiError, fields::Fields};
use crate::{
    core::adapters::AdapterFacts,
    serving::{AdapterState, AdapterStatus},
};
use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};
use std::{path::PathBuf, sync::Arc};

pub(super) async fn list(State(api): State<Arc<Api>>) -> Json<Value> {
    Json(json!({"object": "list", "data": api.status().adapters.iter().map(adapter_json).collect::<Vec<_>>()}))
}

/// Answers once the adapter can be asked for.
pub(super) async fn load(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<Json<Value>, ApiError> {
    let (name, path) = (required(&mut fields, "name", "")?, required(&mut fields, "path", PATH_HINT)?);
    fields.finish()?;
    let facts = loaded(&api, name, path).await?;
    Ok(Json(facts_json(&facts, &AdapterState::Ready)))
}

/// Answers once no new request can have it.
pub(super) async fn delete(State(api): State<Arc<Api>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let facts = dropped(&api, name).await?;
    Ok(Json(json!({"name": facts.name, "status": "dropped"})))
}

/// vLLM's `POST /v1/load_lora_adapter`, answered with a sentence.
pub(super) async fn load_as_vllm(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<String, ApiError> {
    let (name, path) = (required(&mut fields, "lora_name", "")?, required(&mut fields, "lora_path", PATH_HINT)?);
    fields.only("load_inplace", &[json!(false)])?;
    fields.finish()?;
    let facts = loaded(&api, name, path).await?;
    Ok(format!("Success: LoRA adapter '{}' added successfully.", facts.name))
}

/// vLLM's `POST /v1/unload_lora_adapter`.
pub(super) async fn unload_as_vllm(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<String, ApiError> {
    let name = required(&mut fields, "lora_name", "")?;
    fields.only("lora_int_id", &[])?;
    fields.finish()?;
    let facts = dropped(&api, name).await?;
    Ok(format!("Success: LoRA adapter '{}' removed successfully.", facts.name))
}

const PATH_HINT: &str = "; give the folder of an adapter, or a file of weights in it, on the coordinator's machine";

fn required(fields: &mut Fields, name: &'static str, hint: &str) -> Result<String, ApiError> {
    fields.string(name)?.ok_or_else(|| fields.missing(name, hint))
}

async fn loaded(api: &Api, name: String, path: String) -> Result<Arc<AdapterFacts>, ApiError> {
    Ok(api.serving.load_adapter(name, PathBuf::from(path)).await.ok_or(ApiError::Stopping)??)
}

async fn dropped(api: &Api, name: String) -> Result<Arc<AdapterFacts>, ApiError> {
    Ok(api.serving.drop_adapter(name).await.ok_or(ApiError::Stopping)??)
}

pub(super) fn adapter_json(adapter: &AdapterStatus) -> Value {
    facts_json(&adapter.facts, &adapter.state)
}

fn facts_json(facts: &AdapterFacts, state: &AdapterState) -> Value {
    let cause = match state {
        AdapterState::Failed { message } => Some(message),
        AdapterState::Loading | AdapterState::Ready | AdapterState::Leaving => None,
    };
    json!({
        "name": facts.name,
        "path": facts.path,
        "fine_tune_type": if facts.is_dora { "dora" } else { "lora" },
        "rank": facts.rank,
        "modules": facts.modules,
        "bytes": facts.total(),
        "state": state.name(),
        "cause": cause,
    })
}

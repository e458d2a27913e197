//! Which model is served, changed from outside.

use super::fake::{Fake, Seen};
use crate::loading::LoadRequest;
use mlx_cluster_common::{plan::Strategy, request::FinishReason};
use serde_json::{Value, json};

fn fake() -> Fake {
    Fake::saying("x", FinishReason::Length)
}

async fn refused(fake: &Fake, path: &str, body: Value) -> (u16, String, String) {
    let (status, body) = fake.post(path, body).await;
    let text = |name: &str| body["error"][name].as_str().expect("a text").to_owned();
    (status, text("code"), text("message"))
}

#[tokio::test]
async fn a_model_is_loaded_as_asked() {
    let fake = fake();
    let (status, body) = fake.post("/v1/cluster/load", json!({"model": "org/new", "strategy": "tensor", "context": 4096})).await;
    assert_eq!((status, body), (202, json!({"model": "org/new", "status": "loading"})));
    let wanted = LoadRequest { model: "org/new".into(), strategy: Some(Strategy::Tensor), context_tokens: Some(4096) };
    assert!(matches!(fake.seen().await, Seen::Load(request) if request == wanted));
}

#[tokio::test]
async fn bad_loads_are_refused_in_a_sentence() {
    let fake = fake();
    let cases = [
        (json!({}), 400, "missing_required_parameter", "`model` is missing; give a folder or a repository"),
        (json!({"model": 3}), 400, "invalid_type", "`model` must be a string"),
        (json!({"model": "m", "strategy": "fast"}), 400, "invalid_value", "`strategy` must be one of auto, pipeline, tensor, not `fast`"),
        (json!({"model": "m", "context": 0}), 400, "invalid_value", "`context` must be a whole number from 1"),
        (json!({"model": "m", "quick": true}), 400, "not_supported", "`quick` is not supported"),
        (json!({"model": "m"}), 409, "conflict", "`org/tiny` is served already: unload it first with POST /v1/cluster/unload"),
    ];
    for (body, wanted, code, words) in cases {
        let (status, found, message) = refused(&fake, "/v1/cluster/load", body).await;
        assert_eq!((status, found.as_str()), (wanted, code), "{message}");
        assert!(message.contains(words), "{message}");
    }
    let (status, code, message) = refused(&fake, "/v1/cluster/unload", json!({})).await;
    assert_eq!((status, code.as_str(), message.as_str()), (409, "conflict", "no model is served: load one with POST /v1/cluster/load"));
}

#[tokio::test]
async fn a_coordinator_that_is_gone_says_so() {
    let mut fake = fake();
    fake.serving.commands = tokio::sync::mpsc::channel(1).0;
    let (status, code, _) = refused(&fake, "/v1/cluster/load", json!({"model": "m"})).await;
    assert_eq!((status, code.as_str()), (503, "stopping"));
}

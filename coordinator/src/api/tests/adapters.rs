//! Adapters: loaded, shown, chosen and dropped from outside.

use super::fake::{Fake, Seen, poems, ready};
use crate::serving::{AdapterState, AdapterStatus, ClusterStatus};
use mlx_cluster_common::{ids::AdapterId, request::FinishReason};
use serde_json::{Value, json};
use std::{path::Path, sync::Arc};

fn fake_with(adapters: Vec<AdapterStatus>) -> Fake {
    let fake = Fake::saying("x", FinishReason::Length);
    fake.status.send_replace(Arc::new(ClusterStatus { adapters, ..ready() }));
    fake
}

fn asking(model: Value) -> Value {
    json!({"model": model, "prompt": [1, 2], "max_tokens": 1})
}

#[tokio::test]
async fn a_request_names_its_adapter() {
    let fake = fake_with(vec![poems()]);
    for (model, adapter, answered) in [
        ("org/tiny", None, "org/tiny"),
        ("org/tiny:poems", Some(AdapterId(3)), "org/tiny:poems"),
        ("tiny:poems", Some(AdapterId(3)), "org/tiny:poems"),
        ("poems", Some(AdapterId(3)), "org/tiny:poems"),
    ] {
        let body = fake.ok("/v1/completions", asking(json!(model))).await;
        assert_eq!((body["model"].as_str(), fake.asked().await.adapter), (Some(answered), adapter), "{model}");
    }
}

#[tokio::test]
async fn an_unknown_adapter_is_not_found_and_those_there_are_listed() {
    let leaving = AdapterStatus { state: AdapterState::Leaving, ..poems() };
    for (adapters, words) in [(vec![poems()], "ask for `org/tiny`, or `org/tiny:poems`"), (vec![leaving], "ask for `org/tiny`")] {
        let fake = fake_with(adapters);
        for model in ["org/tiny:verses", "verses", "org/other:poems"] {
            let (status, body) = fake.post("/v1/completions", asking(json!(model))).await;
            let message = body["error"]["message"].as_str().expect("a message");
            assert_eq!((status, body["error"]["code"].as_str()), (404, Some("model_not_found")), "{model}");
            assert!(message.contains(model) && message.ends_with(words), "{message}");
        }
    }
}

#[tokio::test]
async fn models_and_adapters_are_listed() {
    let fake = fake_with(vec![poems()]);
    let (_, text) = fake.get("/v1/models").await;
    let listed: Value = serde_json::from_str(&text).expect("JSON");
    let ids: Vec<_> =
        listed["data"].as_array().expect("a list").iter().map(|model| (model["id"].clone(), model["parent"].clone())).collect();
    assert_eq!(ids, [(json!("org/tiny"), Value::Null), (json!("org/tiny:poems"), json!("org/tiny"))]);
    assert_eq!(fake.get("/v1/models/org/tiny:poems").await.0, 200);
    assert_eq!(fake.get("/v1/models/org/tiny:verses").await.0, 404);
    let (_, text) = fake.get("/v1/adapters").await;
    let wanted = json!({"name": "poems", "path": "/runs/poems/adapters.safetensors", "fine_tune_type": "lora", "rank": 8, "modules": 14, "bytes": 1024,
        "state": "ready", "cause": null});
    assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), json!({"object": "list", "data": [wanted]}));
}

#[tokio::test]
async fn adapters_are_loaded_and_dropped_in_our_way_and_in_vllms() {
    let fake = fake_with(Vec::new());
    let body = fake.ok("/v1/adapters", json!({"name": "poems", "path": "/runs/poems"})).await;
    assert_eq!((body["name"].as_str(), body["state"].as_str()), (Some("poems"), Some("ready")));
    assert!(matches!(fake.seen().await, Seen::Adapter(name, path) if name == "poems" && path == Path::new("/runs/poems")));
    let loaded = fake.post_text("/v1/load_lora_adapter", json!({"lora_name": "poems", "lora_path": "/runs/poems"})).await;
    assert_eq!(loaded, (200, "Success: LoRA adapter 'poems' added successfully.".into()));
    let dropped = fake.post_text("/v1/unload_lora_adapter", json!({"lora_name": "poems"})).await;
    assert_eq!(dropped, (200, "Success: LoRA adapter 'poems' removed successfully.".into()));
    let cases = [
        ("/v1/adapters", json!({"name": "poems"}), 400, "`path` is missing; give the folder of an adapter"),
        ("/v1/adapters", json!({"name": "poems", "path": "/x", "scale": 2}), 400, "`scale` is not supported"),
        ("/v1/adapters", json!({"name": "verses", "path": "/x"}), 409, "16 adapters are there already"),
        ("/v1/unload_lora_adapter", json!({"lora_name": "verses"}), 404, "there is no adapter `verses`; there are `poems`"),
    ];
    for (path, body, wanted, words) in cases {
        let (status, body) = fake.post(path, body).await;
        let message = body["error"]["message"].as_str().expect("a message");
        assert!(status == wanted && message.contains(words), "{status} {message}");
    }
}

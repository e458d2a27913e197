//! Health, models, figures and the cluster's state.

use super::fake::{EOS, Fake, Step, ready};
use crate::serving::{ClusterStatus, EngineOn, InstanceState, JobStatus, RequestFailure, WorkerStatus};
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    engine::{EngineState, NodeFacts},
    ids::InstanceId,
    plan::{Plan, Rank, Stage, Strategy},
    request::FinishReason,
    units::Bytes,
};
use serde_json::{Value, json};
use std::sync::Arc;

fn fake() -> Fake {
    Fake::saying("x", FinishReason::Length)
}

fn with_state(fake: &Fake, instance: InstanceState) {
    fake.status.send_replace(Arc::new(ClusterStatus { instance, ..ready() }));
}

fn with_worker() -> ClusterStatus {
    let facts = NodeFacts {
        id: "n1".into(),
        name: "mini".into(),
        version: "0.1.0".into(),
        os: "macOS".into(),
        chip: "M4".into(),
        usable_memory: Bytes(100),
        total_memory: Bytes(200),
        memory_bandwidth: 1e9,
        matmul_rate: 1e12,
        addresses: vec!["10.0.0.2:7000".into()],
    };
    let engine = EngineState::Ready { port: 9, group_port: 0, incarnation: 3, resident: Bytes(55) };
    let stage = Stage {
        layers: 0..6,
        ranks: vec![Rank {
            node: "n1".into(),
            node_name: "mini".into(),
            share: 1,
            weights: Bytes(40),
            cache: Bytes(10),
            working: Bytes(5),
            usable: Bytes(100),
        }],
    };
    let plan = Plan {
        model: "/models/tiny".into(),
        strategy: Strategy::Auto,
        context_tokens: 200,
        cache_tokens: 400,
        caches: CacheOptions::default(),
        reservation: CacheReservation::default(),
        sequences: 16,
        stages: vec![stage],
        prediction: None,
        alternatives: Vec::new(),
        why: "one worker holds it".into(),
        training: None,
    };
    ClusterStatus {
        plan: Some(plan),
        workers: vec![WorkerStatus { facts, connected: true, engines: vec![EngineOn { instance: InstanceId::SERVED, state: engine }] }],
        ..ready()
    }
}

#[tokio::test]
async fn health_is_good_only_when_the_model_can_answer() {
    let fake = fake();
    let failed = "it needs 9 GB, and 4 GB are there";
    let cases = [
        (InstanceState::Ready, 200, None),
        (InstanceState::Idle, 200, Some("no model was asked for")),
        (InstanceState::Loading, 503, Some("the model is being loaded; try again in a moment")),
        (InstanceState::Recovering { cause: "mini is gone".into() }, 503, Some("mini is gone; it comes back by itself")),
        (InstanceState::Failed { message: failed.into() }, 503, Some(failed)),
        (InstanceState::Unloading, 503, Some("its engines are being stopped")),
        (InstanceState::Draining, 503, Some("the coordinator is stopping")),
    ];
    for (state, status, cause) in cases {
        with_state(&fake, state.clone());
        let (code, text) = fake.get("/health").await;
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON"), json!({"status": state.name(), "cause": cause}));
        assert_eq!(code, status, "{text}");
    }
    with_state(&fake, InstanceState::WaitingForWorkers { found: 1, wanted: 2 });
    let (code, text) = fake.get("/health").await;
    assert!(code == 503 && text.contains("1 of 2 workers are there; start `mlx-cluster worker --cluster home`"), "{text}");
}

#[tokio::test]
async fn requests_are_refused_until_the_model_is_ready() {
    let fake = fake();
    with_state(&fake, InstanceState::Loading);
    let (status, body) = fake.post("/v1/completions", json!({"prompt": "a"})).await;
    assert_eq!((status, &body["error"]["code"], &body["error"]["type"]), (503, &json!("model_not_ready"), &json!("server_error")));
    assert_eq!(body["error"]["message"], "the model is not ready (loading): the model is being loaded; try again in a moment");
    with_state(&fake, InstanceState::Idle);
    fake.model.send_replace(None);
    let (status, body) = fake.post("/v1/completions", json!({"model": "m", "prompt": "a"})).await;
    assert_eq!((status, &body["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn failures_of_the_cluster_have_a_status() {
    let broken = RequestFailure::Broken { worker: "mini".into(), message: "it was killed".into() };
    let cases = [
        (RequestFailure::Overloaded { waiting: 256 }, 429, "overloaded", "rate_limit_error"),
        (RequestFailure::NotReady { state: "loading".into() }, 503, "model_not_ready", "server_error"),
        (RequestFailure::Refused { message: "no".into() }, 400, "refused", "invalid_request_error"),
        (broken, 502, "worker_failed", "server_error"),
    ];
    for (failure, wanted, code, kind) in cases {
        let failed = failure.clone();
        let fake = Fake::new(move |_| vec![Step::Fail(failed.clone())]);
        for stream in [false, true] {
            let (status, body) = fake.post("/v1/completions", json!({"prompt": "a", "stream": stream})).await;
            let error = json!({"message": failure.to_string(), "type": kind, "param": null, "code": code});
            assert_eq!((status, body), (wanted, json!({"error": error})));
        }
    }
}

#[tokio::test]
async fn an_error_inside_a_stream_ends_it() {
    let broken = RequestFailure::Broken { worker: "mini".into(), message: "it was killed".into() };
    let fake = Fake::new(move |_| vec![Step::Say("a"), Step::Fail(broken.clone())]);
    let (status, text) = fake.post_text("/v1/completions", json!({"prompt": "a", "stream": true})).await;
    let last = text.trim_end().rsplit("data: ").next().expect("an event");
    let error: Value = serde_json::from_str(last).expect("JSON");
    assert_eq!((status, &error["error"]["code"]), (200, &json!("worker_failed")));
    assert!(error["error"]["message"].as_str().expect("a text").starts_with("worker mini failed while"));
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_error() {
    let fake = Fake::new(|_| vec![Step::Say("a")]);
    let (status, body) = fake.post("/v1/completions", json!({"prompt": "a"})).await;
    assert_eq!((status, &body["error"]["code"]), (502, &json!("broke_off")));
    let (_, text) = fake.post_text("/v1/completions", json!({"prompt": "a", "stream": true})).await;
    assert!(text.contains("broke_off") && !text.contains("[DONE]"), "{text}");
}

#[tokio::test]
async fn a_cluster_that_is_gone_is_not_ready() {
    let mut fake = fake();
    fake.serving.commands = tokio::sync::mpsc::channel(1).0;
    let (status, _) = fake.post("/v1/completions", json!({"prompt": "a"})).await;
    assert_eq!(status, 503);
}

#[tokio::test]
async fn models_are_listed() {
    let fake = fake();
    let model =
        json!({"id": "org/tiny", "object": "model", "created": 7, "owned_by": "mlx-cluster", "max_model_len": 200, "context_length": 200});
    let get = async |path: &str| serde_json::from_str::<Value>(&fake.get(path).await.1).expect("JSON");
    assert_eq!(get("/v1/models").await, json!({"object": "list", "data": [model]}));
    for path in ["/v1/models/tiny", "/v1/models/org/tiny", "/v1/models/org%2Ftiny"] {
        assert_eq!(get(path).await, model, "{path}");
    }
    assert_eq!(get("/v1/models/other").await["error"]["code"], "model_not_found");
    fake.model.send_replace(None);
    assert_eq!(get("/v1/models").await, json!({"object": "list", "data": []}));
}

#[tokio::test]
async fn figures_have_the_names_of_vllm() {
    let fake = Fake::new(|_| vec![Step::Say("abc"), Step::Token(EOS), Step::Finish(FinishReason::Stop)]);
    fake.status.send_replace(Arc::new(with_worker()));
    let router = fake.router();
    let post = super::fake::request("POST", "/v1/completions").body(axum::body::Body::from(r#"{"prompt": "hello"}"#)).expect("a request");
    assert_eq!(super::fake::send(router.clone(), post).await.status(), 200);
    let get = super::fake::request("GET", "/metrics").body(axum::body::Body::empty()).expect("a request");
    let (_, text) = super::fake::text_of(super::fake::send(router, get).await).await;
    let model = "{model_name=\"org/tiny\"}";
    for line in [
        format!("vllm:num_requests_running{model} 2"),
        format!("vllm:num_requests_waiting{model} 1"),
        format!("vllm:kv_cache_usage_perc{model} 0.25"),
        format!("vllm:prompt_tokens_total{model} 5"),
        format!("vllm:generation_tokens_total{model} 4"),
        "vllm:request_success_total{model_name=\"org/tiny\",finished_reason=\"stop\"} 1".into(),
        format!("vllm:time_to_first_token_seconds_count{model} 1"),
        format!("vllm:inter_token_latency_seconds_count{model} 3"),
        format!("vllm:e2e_request_latency_seconds_count{model} 1"),
        "vllm:e2e_request_latency_seconds_bucket{model_name=\"org/tiny\",le=\"+Inf\"} 1".into(),
        format!("mlx_cluster_model_ready{model} 1"),
        "mlx_cluster_workers{state=\"connected\"} 1".into(),
        "mlx_cluster_engine_resident_bytes{worker=\"mini\"} 55".into(),
        "# TYPE vllm:generation_tokens_total counter".into(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

#[tokio::test]
async fn the_cluster_is_shown_whole() {
    let fake = fake();
    fake.status.send_replace(Arc::new(with_worker()));
    let body: Value = serde_json::from_str(&fake.get("/v1/cluster").await.1).expect("JSON");
    assert_eq!(body["instance"], json!({"state": "ready", "cause": null}));
    assert_eq!(body["model"], json!({"id": "org/tiny", "context_tokens": 200, "vocab_size": 300, "created": 7}));
    assert_eq!(body["plan"]["stages"][0]["ranks"][0]["needed_bytes"], 55);
    let worker = &body["workers"][0];
    assert_eq!((&worker["name"], &worker["first_layer"], &worker["last_layer"]), (&json!("mini"), &json!(0), &json!(5)));
    assert_eq!((&worker["rank"], &worker["ranks"], &worker["share"], &worker["share_of"]), (&json!(0), &json!(1), &json!(1), &json!(1)));
    assert_eq!(worker["engine"], json!({"state": "ready", "port": 9, "group_port": null, "incarnation": 3, "resident_bytes": 55}));
    let engines = json!([{"state": "ready", "port": 9, "group_port": null, "incarnation": 3, "resident_bytes": 55, "job": null,
        "first_layer": 0, "last_layer": 5, "rank": 0, "ranks": 1, "share": 1, "share_of": 1}]);
    assert_eq!((&worker["engines"], &body["jobs"]), (&engines, &json!([])));
    assert_eq!(body["load"]["cache_tokens_max"], 100);
    assert_eq!(body["join_addresses"], json!(["10.0.0.1:7000"]));
    with_state(&fake, InstanceState::WaitingForWorkers { found: 1, wanted: 3 });
    let body: Value = serde_json::from_str(&fake.get("/v1/cluster").await.1).expect("JSON");
    assert_eq!((&body["instance"]["workers_found"], &body["instance"]["workers_wanted"]), (&json!(1), &json!(3)));
}

#[tokio::test]
async fn jobs_are_shown_with_their_engines() {
    let fake = fake();
    let mut status = with_worker();
    let instance = InstanceId(4);
    let cause = "worker mini: it was killed".to_owned();
    status.jobs =
        vec![JobStatus { instance, model: "org/base".into(), state: InstanceState::Recovering { cause }, plan: status.plan.take() }];
    status.workers[0].engines = vec![EngineOn { instance, state: EngineState::Loading { done: Bytes(1), total: Bytes(2) } }];
    status.instance = InstanceState::Idle;
    fake.status.send_replace(Arc::new(status));
    let body: Value = serde_json::from_str(&fake.get("/v1/cluster").await.1).expect("JSON");
    let job = &body["jobs"][0];
    assert_eq!((&job["number"], &job["model"], &job["plan"]["stages"][0]["last_layer"]), (&json!(4), &json!("org/base"), &json!(5)));
    assert_eq!(job["instance"], json!({"state": "recovering", "cause": "worker mini: it was killed; it comes back by itself"}));
    let (worker, engine) = (&body["workers"][0], &body["workers"][0]["engines"][0]);
    assert_eq!((&worker["engine"], &worker["first_layer"]), (&Value::Null, &Value::Null), "nothing is served");
    assert_eq!(
        (&engine["job"], &engine["state"], &engine["last_layer"], &engine["total_bytes"]),
        (&json!(4), &json!("loading"), &json!(5), &json!(2))
    );
}

//! Jobs over HTTP, with a script in place of engines.

use super::fake::{Fake, request, send, text_of};
use axum::body::Body;
use mlx_cluster_common::request::FinishReason;
use serde_json::{Value, json};
use std::time::Duration;

fn fake() -> Fake {
    Fake::saying("x", FinishReason::Length)
}

fn config(fake: &Fake, iters: u64) -> Value {
    json!({"model": "org/tiny", "train": true, "data": "/data", "iters": iters, "adapter_path": fake.home.path().join("adapter")})
}

async fn get(fake: &Fake, path: &str) -> (u16, Value) {
    let (status, text) = fake.get(path).await;
    (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("not JSON: {text}")))
}

async fn start(fake: &Fake, iters: u64) -> String {
    let (status, job) = fake.post("/v1/jobs", json!({"config": config(fake, iters), "strategy": "pipeline"})).await;
    assert_eq!((status, &job["state"], &job["next_event"]), (202, &json!("queued"), &json!(0)), "{job}");
    job["id"].as_str().unwrap().to_owned()
}

/// The events of a stream that ends.
async fn events(fake: &Fake, id: &str, from: u64) -> Vec<Value> {
    let (status, text) = fake.get(&format!("/v1/jobs/{id}/events?from={from}")).await;
    assert_eq!(status, 200, "{text}");
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data.last(), Some(&"[DONE]"), "{text}");
    data[..data.len() - 1].iter().map(|text| serde_json::from_str(text).unwrap()).collect()
}

async fn until_iteration(fake: &Fake, id: &str, iteration: u64) {
    for _ in 0..2000 {
        if get(fake, &format!("/v1/jobs/{id}")).await.1["iteration"] == iteration {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{:?}", get(fake, &format!("/v1/jobs/{id}")).await);
}

#[tokio::test]
async fn a_job_is_started_followed_and_shown() {
    let fake = fake();
    let id = start(&fake, 3).await;
    let all = events(&fake, &id, 0).await;
    assert_eq!(all[0], json!({"number": 0, "event": "state", "state": "queued"}));
    assert!(all.iter().any(|event| event["event"] == "plan" && event["text"] == "all on one worker"));
    let train: Vec<&Value> = all.iter().filter(|event| event["event"] == "train").collect();
    assert_eq!((train.len(), &train[2]["iteration"], &train[2]["train_loss"]), (3, &json!(3), &json!(2.3451)));
    let last = all.last().unwrap();
    assert_eq!((&last["event"], &last["state"], &last["iteration"]), (&json!("ended"), &json!("finished"), &json!(3)));
    let from = last["number"].as_u64().unwrap();
    assert_eq!(events(&fake, &id, from).await, [last.clone()]);
    assert_eq!(events(&fake, &id, from + 1).await, Vec::<Value>::new());

    let (_, job) = get(&fake, &format!("/v1/jobs/{id}")).await;
    assert_eq!(
        (&job["state"], &job["iteration"], &job["iterations"], &job["cause"]),
        (&json!("finished"), &json!(3), &json!(3), &Value::Null)
    );
    assert_eq!(
        (&job["strategy"], &job["plan"], &job["config"]["batch_size"]),
        (&json!("pipeline"), &json!("all on one worker"), &json!(4))
    );
    let (_, list) = get(&fake, "/v1/jobs").await;
    assert_eq!((&list["object"], &list["data"][0]["id"], list["data"].as_array().unwrap().len()), (&json!("list"), &json!(id), 1));
    assert!(list["data"][0].get("config").is_none());
    let (status, metrics) = fake.get(&format!("/v1/jobs/{id}/metrics")).await;
    assert_eq!((status, metrics.lines().count()), (200, 4));
    assert!(metrics.contains(r#""train_loss":2.3451,"#), "{metrics}");
}

#[tokio::test]
async fn a_job_is_stopped_and_resumed() {
    let fake = fake();
    let id = start(&fake, 9).await;
    until_iteration(&fake, &id, 6).await;
    let (_, so_far) = fake.get(&format!("/v1/jobs/{id}/events?follow=false")).await;
    assert!(so_far.ends_with("data: [DONE]\n\n") && !so_far.contains("ended"), "{so_far}");
    let (status, text) =
        text_of(send(fake.router(), request("POST", &format!("/v1/jobs/{id}/stop")).body(Body::empty()).unwrap()).await).await;
    assert_eq!(status, 202, "{text}");
    let last = events(&fake, &id, 0).await.pop().unwrap();
    assert_eq!((&last["state"], &last["cause"]), (&json!("stopped"), &json!("it was asked to")));
    let path = format!("/v1/jobs/{id}/resume");
    let resume = |body: Value| fake.post(&path, body);
    let (status, refused) = resume(json!({"config": {"seed": 7, "mask_prompt": true}})).await;
    let message = refused["error"]["message"].as_str().unwrap();
    assert_eq!((status, &refused["error"]["code"]), (409, &json!("conflict")));
    assert!(["iteration 6", "`seed` is 7", "`mask_prompt` is true"].iter().all(|part| message.contains(part)), "{message}");
    // The script waits at 6 again.
    let (status, job) = resume(json!({"warm_start": true, "config": {"iters": 6}})).await;
    assert_eq!((status, &job["warm_start"], &job["iterations"]), (202, &json!(true), &json!(6)), "{job}");
    let next = job["next_event"].as_u64().unwrap();
    assert!(next > last["number"].as_u64().unwrap());
    assert_eq!(events(&fake, &id, next).await.pop().unwrap()["state"], "finished");
}

#[tokio::test]
async fn what_is_wrong_is_said_in_a_sentence() {
    let fake = fake();
    let id = start(&fake, 2).await;
    events(&fake, &id, 0).await;
    let good = config(&fake, 2);
    let mut typo = good.clone();
    typo["iterz"] = json!(3);
    let post = [
        ("/v1/jobs".to_owned(), json!({}), 400, "missing_required_parameter", "`config` is missing"),
        ("/v1/jobs".to_owned(), json!({"config": 3}), 400, "invalid_type", "`config` must be an object"),
        ("/v1/jobs".to_owned(), json!({"config": good, "strategy": "ddp"}), 400, "invalid_value", "one of auto, data, pipeline, tensor"),
        ("/v1/jobs".to_owned(), json!({"config": good, "priority": 1}), 400, "not_supported", "`priority` is not supported"),
        ("/v1/jobs".to_owned(), json!({"config": typo}), 400, "invalid_value", "`iters`"),
        ("/v1/jobs".to_owned(), json!({"config": {}}), 400, "invalid_value", "neither `train` nor `test`"),
        (format!("/v1/jobs/{id}/resume"), json!({}), 409, "conflict", "has finished at iteration 2"),
        (format!("/v1/jobs/{id}/resume"), json!({"warm": true}), 400, "not_supported", "`warm` is not supported"),
        (format!("/v1/jobs/{id}/stop"), json!({}), 409, "conflict", "there is nothing to stop"),
        ("/v1/jobs/20260101-000000/stop".to_owned(), json!({}), 404, "job_not_found", "there is no job `20260101-000000`"),
        ("/v1/jobs/20260101-000000/resume".to_owned(), json!({}), 404, "job_not_found", "there is no job"),
    ];
    for (path, body, wanted, code, words) in post {
        let (status, answer) = fake.post(&path, body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert_eq!((status, answer["error"]["code"].as_str()), (wanted, Some(code)), "{path}: {message}");
        assert!(message.contains(words), "{path}: {message}");
    }
    for (path, wanted, code) in [
        ("/v1/jobs/nobody", 404, "job_not_found"),
        ("/v1/jobs/nobody/metrics", 404, "job_not_found"),
        ("/v1/jobs/..%2Fx/events", 404, "job_not_found"),
        (&format!("/v1/jobs/{id}/events?from=x"), 400, "invalid_type"),
        (&format!("/v1/jobs/{id}/events?form=1"), 400, "not_supported"),
    ] {
        let (status, answer) = get(&fake, path).await;
        assert_eq!((status, answer["error"]["code"].as_str()), (wanted, Some(code)), "{path}: {answer}");
    }
    let (_, list) = get(&fake, "/v1/jobs").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "nothing that was refused is a job");
}

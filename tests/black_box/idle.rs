//! A coordinator without a model: healthy once its workers are there, and serving what it is told to.

use crate::support::{Cluster, PATIENCE, Setup, TinyModel, wait_until};
use serde_json::{Value, json};

fn state(cluster: &Cluster) -> Value {
    cluster.get("/v1/cluster").body["instance"]["state"].clone()
}

fn load(cluster: &mut Cluster, body: &Value) {
    let answer = cluster.post("/v1/cluster/load", body);
    assert_eq!((answer.status, &answer.body["status"]), (202, &json!("loading")), "{answer:?}");
    cluster.wait_until_ready();
}

#[test]
fn models_come_and_go_while_it_runs() {
    let model = TinyModel::new();
    let mut cluster = Setup::without_model(2).idle();
    cluster.start_coordinator("coordinator");
    assert!(wait_until(PATIENCE, || cluster.health() == Some(503)), "{}", cluster.output());
    assert_eq!(state(&cluster), "waiting_for_workers");
    cluster.start_worker("worker0");
    assert!(wait_until(PATIENCE, || cluster.get("/v1/cluster").body["workers"][0]["connected"] == true), "{}", cluster.output());
    assert_eq!(cluster.health(), Some(503), "one of two");
    cluster.start_worker("worker1");
    cluster.wait_until_ready();
    assert_eq!((state(&cluster), cluster.engines().len()), (json!("idle"), 0));
    let refused = cluster.complete(3);
    assert!(refused.status == 404 && refused.body["error"]["message"].as_str().unwrap().contains("/v1/cluster/load"), "{refused:?}");

    let missing = cluster.post("/v1/cluster/load", &json!({"model": "./no-such-folder"}));
    assert!(missing.status == 400 && missing.body["error"]["message"].as_str().unwrap().contains("no-such-folder"), "{missing:?}");

    load(&mut cluster, &json!({"model": model.text(), "strategy": "pipeline"}));
    let pipeline = cluster.complete(8);
    assert_eq!((pipeline.status, cluster.engines().len()), (200, 2), "{pipeline:?}");
    let again = cluster.post("/v1/cluster/load", &json!({"model": model.text()}));
    assert_eq!((again.status, &again.body["error"]["code"]), (409, &json!("conflict")), "{again:?}");

    let unloaded = cluster.post("/v1/cluster/unload", &json!({}));
    assert_eq!((unloaded.status, state(&cluster), cluster.engines().len()), (200, json!("idle"), 0), "{unloaded:?}");
    assert_eq!(cluster.health(), Some(200));

    load(&mut cluster, &json!({"model": model.text(), "strategy": "auto", "context": 256}));
    let alone = cluster.complete(8);
    assert_eq!((alone.text(), cluster.engines().len()), (pipeline.text(), 1), "{alone:?}");
    assert_eq!(cluster.get("/v1/models").body["data"][0]["context_length"], 256);
}

#[test]
fn a_model_that_does_not_fit_is_told_and_another_is_taken() {
    let model = TinyModel::new();
    let mut cluster = Setup::without_model(1).start();
    cluster.wait_until_ready();
    let asked = cluster.post("/v1/cluster/load", &json!({"model": model.text(), "context": 10_000_000}));
    assert_eq!(asked.status, 202, "{asked:?}");
    assert!(wait_until(PATIENCE, || state(&cluster) == "failed"), "{}", cluster.output());
    let health = cluster.get("/health");
    assert!(health.status == 503 && health.body["cause"].as_str().unwrap().contains("10000000"), "{health:?}");
    load(&mut cluster, &json!({"model": model.text()}));
    assert_eq!(cluster.complete(3).status, 200);
}

//! What a running cluster does for its clients.

use crate::support::{Cluster, Setup, TinyModel, demo_model};
use serde_json::json;

#[test]
fn a_model_split_over_two_workers_answers() {
    let mut cluster = Setup::new(demo_model(), 2).coordinator_args(&["--split", "4,2"]).start();
    cluster.wait_until_ready();
    let answer = cluster.chat("What is 27 + 46?");
    assert!(answer.text().contains("73"), "{answer:?}");
    assert_eq!(cluster.engines().len(), 2);
    let plan = cluster.process("coordinator").output();
    for words in ["worker0", "worker1", "0-3", "4-5"] {
        assert!(plan.contains(words), "no {words} in the plan\n{plan}");
    }
    let status = cluster.get("/v1/cluster");
    assert_eq!(status.body["workers"].as_array().map(Vec::len), Some(2), "{status:?}");
}

#[test]
fn what_is_streamed_is_what_is_answered_whole() {
    let model = TinyModel::new();
    let cluster = Cluster::serving(model.path(), 2);
    let whole = cluster.complete(40);
    let streamed: String = cluster.stream(40).filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned)).collect();
    assert_eq!(whole.text(), streamed);
    assert_eq!(whole.body["usage"]["completion_tokens"], 40);
    assert_eq!(whole.body["usage"]["prompt_tokens"], 5);
}

#[test]
fn a_client_that_goes_away_frees_its_place() {
    let model = TinyModel::new();
    let cluster = Cluster::serving(model.path(), 2);
    let mut stream = cluster.stream(8000);
    stream.next().unwrap();
    drop(stream);
    let idle = crate::support::wait_until(std::time::Duration::from_secs(5), || {
        let metrics = cluster.get("/metrics").body;
        let running = metrics.as_str().unwrap().lines().find(|line| line.starts_with("vllm:num_requests_running")).map(str::to_owned);
        running.is_some_and(|line| line.ends_with(" 0"))
    });
    assert!(idle, "still running\n{}", cluster.get("/metrics").body);
    assert_eq!(cluster.complete(5).status, 200);
}

#[test]
fn wrong_requests_are_refused_and_the_cluster_serves_on() {
    let model = TinyModel::new();
    let cluster = Cluster::serving(model.path(), 1);
    let prompt = json!([1, 2, 3]);
    let refused = [
        (json!({"prompt": ""}), 400, "prompt"),
        (json!({"prompt": []}), 400, "prompt"),
        (json!({"prompt": [320]}), 400, "320"),
        (json!({"prompt": [-1]}), 400, "prompt"),
        (json!({"prompt": vec![1; 9000]}), 400, "context"),
        (json!({"prompt": prompt, "temperature": -0.5}), 400, "temperature"),
        (json!({"prompt": prompt, "top_p": 0}), 400, "top_p"),
        (json!({"prompt": prompt, "top_k": -7}), 400, "top_k"),
        (json!({"prompt": prompt, "max_tokens": "many"}), 400, "max_tokens"),
        (json!({"prompt": prompt, "logit_bias": {"99999": 1}}), 400, "logit_bias"),
        (json!({"prompt": prompt, "best_of": 3}), 400, "best_of"),
        (json!({"prompt": prompt, "made_up": true}), 400, "made_up"),
        (json!({"prompt": prompt, "model": "another"}), 404, "another"),
        (json!({}), 400, "prompt"),
        (json!({"prompt": "x".repeat(100 << 20)}), 413, "bytes"),
    ];
    for (body, status, word) in refused {
        let answer = cluster.post("/v1/completions", &body);
        assert_eq!(answer.status, status, "{word}: {answer:?}");
        assert!(answer.error().contains(word), "{word}: {answer:?}");
    }
    assert_eq!(cluster.complete(3).status, 200);
}

#[test]
fn metrics_count_tokens_under_the_names_that_vllm_gave_them() {
    let model = TinyModel::new();
    let cluster = Cluster::serving(model.path(), 1);
    cluster.complete(7);
    let metrics = cluster.get("/metrics").body;
    let metrics = metrics.as_str().unwrap();
    for (name, value) in [("vllm:prompt_tokens_total", " 5"), ("vllm:generation_tokens_total", " 7")] {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in\n{metrics}"));
        assert!(line.ends_with(value), "{line}");
    }
}

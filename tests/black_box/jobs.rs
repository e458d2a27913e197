//! Jobs at the command line, as far as they go without engines.

use crate::support::{Cluster, PATIENCE, Setup, TinyModel, run, wait_until};
use serde_json::Value;
use std::{fs, path::Path};

/// A coordinator without workers: what a job is made of is read all the same.
fn coordinator() -> Cluster {
    let mut cluster = Setup::without_model(0).idle();
    cluster.start_coordinator("coordinator");
    assert!(wait_until(PATIENCE, || cluster.health().is_some()), "{}", cluster.output());
    cluster
}

fn config(folder: &Path, model: &str) -> String {
    let data = folder.join("data");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("train.jsonl"), "{\"text\": \"a b\"}\n{\"text\": }\n").unwrap();
    let path = folder.join("lora.yaml");
    let adapter = folder.join("adapter");
    fs::write(&path, format!("model: {model}\ntrain: true\nnum_layers: -1\ndata: {}\nadapter_path: {}\n", data.display(), adapter.display())).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_job_that_cannot_run_fails_with_a_sentence_and_stays_to_be_looked_at() {
    let cluster = coordinator();
    let (url, folder, model) = (cluster.url(), tempfile::tempdir().unwrap(), TinyModel::new());
    let jobs = |args: &[&str]| cluster.run(&[&["jobs", "--coordinator", &url], args].concat());
    assert!(jobs(&["list"]).expect_success().stdout.contains("no jobs yet"));

    let config = config(folder.path(), &model.text());
    let failed = cluster.run(&["train", "--coordinator", &url, "--config", &config]);
    failed.expect_refusal(1, &["train.jsonl", "failed"]);

    let list = jobs(&["list"]).expect_success().stdout;
    let id = list.lines().nth(1).and_then(|line| line.split_whitespace().next()).unwrap();
    assert!(list.contains("failed") && list.contains("0 of 1000"), "{list}");
    let shown = jobs(&["show", id]).expect_success().stdout;
    assert!(shown.contains("train.jsonl"), "{shown}");
    let json: Value = serde_json::from_str(&jobs(&["show", id, "--json"]).expect_success().stdout).unwrap();
    assert_eq!((&json["state"], &json["config"]["batch_size"]), (&Value::from("failed"), &Value::from(4)));
    let logs = jobs(&["logs", id]).expect_success().stdout;
    assert!(logs.starts_with("waiting for its turn\nrunning\n") && logs.contains("failed at iteration 0: "), "{logs}");
    assert_eq!(jobs(&["logs", id, "--follow"]).expect_success().stdout, logs);
    assert_eq!(jobs(&["metrics", id]).expect_success().stdout, "");

    // It goes on, and fails again.
    jobs(&["resume", id]).expect_refusal(1, &["train.jsonl"]);
    jobs(&["stop", id]).expect_refusal(2, &[id, "nothing to stop"]);
    let detached = cluster.run(&["train", "--coordinator", &url, "--config", &config, "--detach"]).expect_success().stdout;
    assert!(wait_until(PATIENCE, || jobs(&["show", detached.trim()]).expect_success().stdout.contains("failed")));
}

#[test]
fn what_is_wrong_about_a_job_is_said_before_it_is_one() {
    let cluster = coordinator();
    let (url, folder) = (cluster.url(), tempfile::tempdir().unwrap());
    for verb in ["stop", "show", "resume", "logs", "metrics"] {
        cluster.run(&["jobs", "--coordinator", &url, verb, "20260101-000000"]).expect_refusal(2, &["there is no job `20260101-000000`"]);
        cluster.run(&["jobs", "--coordinator", &url, verb, "../x"]).expect_refusal(2, &["not the id of a job"]);
    }
    cluster.run(&["train", "--coordinator", &url, "--model", "a/b"]).expect_refusal(2, &["neither `train` nor `test`"]);
    fs::write(folder.path().join("bad.yaml"), "iterz: 3\ntrain: true\n").unwrap();
    let bad = folder.path().join("bad.yaml");
    cluster.run(&["train", "--coordinator", &url, "--config", bad.to_str().unwrap()]).expect_refusal(3, &["bad.yaml", "`iters`"]);
    run(&["train", "--coordinator", "http://127.0.0.1:1", "--train"]).expect_refusal(4, &["127.0.0.1:1", "mlx-cluster coordinator"]);
    run(&["jobs", "list", "--coordinator", "http://127.0.0.1:1"]).expect_refusal(4, &["127.0.0.1:1"]);
}

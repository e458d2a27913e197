//! Jobs at the command line: failed, refused, stopped, cut off and resumed.

use crate::support::{Cluster, PATIENCE, Setup, TinyModel, run, wait_until};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// A coordinator without workers: what a job is made of is read all the same.
fn coordinator() -> Cluster {
    let mut cluster = Setup::without_model(0).idle();
    cluster.start_coordinator("coordinator");
    assert!(wait_until(PATIENCE, || cluster.health().is_some()), "{}", cluster.output());
    cluster
}

/// Its texts end with a token, as those of data sets have to.
fn model() -> TinyModel {
    TinyModel::new().with_json("tokenizer_config.json", &json!({"eos_token": "!"}))
}

fn config(folder: &Path, model: &str) -> String {
    let data = folder.join("data");
    fs::create_dir_all(&data).unwrap();
    fs::write(data.join("train.jsonl"), "{\"text\": \"a b\"}\n{\"text\": }\n").unwrap();
    let path = folder.join("lora.yaml");
    let adapter = folder.join("adapter");
    fs::write(
        &path,
        format!("model: {model}\ntrain: true\nnum_layers: -1\ndata: {}\nadapter_path: {}\n", data.display(), adapter.display()),
    )
    .unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_job_that_cannot_run_fails_with_a_sentence_and_stays_to_be_looked_at() {
    let cluster = coordinator();
    let (url, folder, model) = (cluster.url(), tempfile::tempdir().unwrap(), model());
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

fn adapter(folder: &Path, name: &str) -> Vec<u8> {
    fs::read(folder.join(name).join("adapters.safetensors")).unwrap()
}

/// Losses as they stand in metrics.jsonl, with their iterations.
fn losses(folder: &Path, name: &str) -> Vec<(u64, String)> {
    let text = fs::read_to_string(folder.join(name).join("metrics.jsonl")).unwrap();
    let loss = |line: &str| {
        let report: Value = serde_json::from_str(line).unwrap();
        let loss = report.get("train_loss").or_else(|| report.get("val_loss")).unwrap().to_string();
        (report["iteration"].as_u64().unwrap(), loss)
    };
    text.lines().map(loss).collect()
}

#[test]
fn a_job_that_is_stopped_or_whose_coordinator_is_killed_comes_to_the_same_bits() {
    let (folder, model) = (tempfile::tempdir().unwrap(), model());
    let rows: String = (0..12).map(|i| format!("{{\"text\": \"{}\"}}\n", "abc ".repeat(i % 5 + 1))).collect();
    for file in ["train.jsonl", "valid.jsonl"] {
        fs::write(folder.path().join(file), &rows).unwrap();
    }
    let settings = "train: true\nnum_layers: -1\nbatch_size: 2\niters: 60\nsave_every: 7\nsteps_per_report: 2\nsteps_per_eval: 25\nlearning_rate: 1e-3\n";
    let config = |name: &str| {
        let path = folder.path().join(format!("{name}.yaml"));
        let paths = format!("model: {}\ndata: {1}\nadapter_path: {1}/{name}\n", model.text(), folder.path().display());
        fs::write(&path, format!("{paths}lora_parameters: {{rank: 4, scale: 10.0, dropout: 0.1}}\n{settings}")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let mut cluster = Setup::without_model(1).start();
    cluster.wait_until_ready();
    let url = cluster.url();
    cluster.run(&["train", "--coordinator", &url, "--config", &config("whole")]).expect_success();

    let jobs = |cluster: &Cluster, args: &[&str]| cluster.run(&[&["jobs", "--coordinator", &url], args].concat());
    let started = cluster.run(&["train", "--coordinator", &url, "--config", &config("cut"), "--detach"]).expect_success().stdout;
    let id = started.trim();
    let until = |cluster: &Cluster, iteration: u64| {
        let reached = || cluster.get(&format!("/v1/jobs/{id}")).body["iteration"].as_u64() >= Some(iteration);
        assert!(wait_until(PATIENCE, reached), "{}", cluster.output());
    };
    until(&cluster, 9);
    jobs(&cluster, &["stop", id]).expect_success();
    assert!(jobs(&cluster, &["show", id]).expect_success().stdout.contains("stopped (it was asked to)"));
    jobs(&cluster, &["resume", id, "--detach"]).expect_success();
    until(&cluster, 24);
    cluster.kill("coordinator");
    cluster.start_coordinator("coordinator");
    cluster.wait_until_ready();
    let shown = jobs(&cluster, &["show", id]).expect_success().stdout;
    assert!(shown.contains("stopped (the coordinator ended)"), "{shown}");
    let changed = folder.path().join("changed.yaml");
    fs::write(&changed, "seed: 3\nbatch_size: 3\n").unwrap();
    jobs(&cluster, &["resume", id, "--config", changed.to_str().unwrap()]).expect_refusal(2, &["`seed` is 3", "`batch_size` is 3"]);
    jobs(&cluster, &["resume", id]).expect_success();

    assert!(adapter(folder.path(), "cut") == adapter(folder.path(), "whole"), "other bits");
    assert_eq!(losses(folder.path(), "cut"), losses(folder.path(), "whole"));
    jobs(&cluster, &["resume", id]).expect_refusal(2, &["has finished at iteration 60"]);
}

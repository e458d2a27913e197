//! The verbs as somebody at a terminal uses them.

use crate::support::{Cluster, TinyModel, demo_model, free_port, is_alive, run, wait_until};
use serde_json::Value;
use std::{io::Write, time::Duration};

const ONE_LINE: &str = "127.0.0.1:1";

#[test]
fn every_verb_shows_an_example() {
    for verb in ["worker", "coordinator", "generate", "chat", "plan", "status"] {
        let help = run(&[verb, "--help"]).expect_success().stdout;
        assert!(help.contains("Example") && help.contains(&format!("mlx-cluster {verb}")), "{help}");
    }
    let help = run(&["--help"]).expect_success().stdout;
    assert!(!help.contains("engine"), "{help}");
}

#[test]
fn the_tools_speak_to_a_running_coordinator() {
    let cluster = Cluster::serving(demo_model(), 2);
    let url = cluster.url();
    let answer = cluster.run(&["generate", "--url", &url, "--prompt", "What is 27 + 46?", "--temperature", "0"]).expect_success();
    assert!(answer.stdout.contains("73"), "{answer:?}");
    assert!(answer.stderr.contains("tokens/s"), "{answer:?}");

    let json =
        cluster.run(&["generate", "--url", &url, "--prompt", "Once upon a time", "--raw", "--json", "--max-tokens", "8"]).expect_success();
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!((&json["usage"]["completion_tokens"], &json["finish_reason"]), (&Value::from(8), &Value::from("length")), "{json}");

    let status = cluster.run(&["status", "--url", &url]).expect_success().stdout;
    for word in ["worker0", "worker1", "ready", "tokens/s"] {
        assert!(status.contains(word), "no {word} in\n{status}");
    }
    let status = cluster.run(&["status", "--url", &url, "--json"]).expect_success().stdout;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["workers"].as_array().map(Vec::len), Some(2), "{status}");

    cluster.run(&["generate", "--url", &url, "--prompt", "x", "--temperature", "-1"]).expect_refusal(2, &["temperature"]);
    cluster.run(&["generate", "--url", &url, "--prompt", "x", "--model", "another"]).expect_refusal(2, &["another"]);
}

#[test]
fn a_conversation_remembers_what_was_said() {
    let cluster = Cluster::serving(demo_model(), 1);
    let mut chat =
        crate::support::Process::start("chat", &mut cluster.command("chat", &["chat", "--url", &cluster.url(), "--temperature", "0"]));
    let mut stdin = chat.stdin();
    for line in ["What is 27 + 46?", "/help", "/reset", "/nonsense", "What is 11 + 12?", "/exit"] {
        writeln!(stdin, "{line}").unwrap();
    }
    let status = chat.wait(Duration::from_secs(60));
    let output = chat.output();
    assert_eq!(status.code(), Some(0), "{output}");
    for word in ["73", "23", "/reset", "/nonsense"] {
        assert!(output.contains(word), "no {word} in\n{output}");
    }
}

#[test]
fn a_model_alone_is_a_cluster_of_one_that_leaves_nothing_behind() {
    let model = demo_model();
    let home = tempfile::tempdir().unwrap();
    let url = format!("http://127.0.0.1:{}", free_port());
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_mlx-cluster"));
    command.env("MLX_CLUSTER_HOME", home.path()).env("MLX_CLUSTER_URL", &url);
    command.args(["generate", "--prompt", "What is 27 + 46?", "--temperature", "0", "--model"]).arg(&model);
    let mut generate = crate::support::Process::start("generate", &mut command);
    let mut engines = Vec::new();
    wait_until(Duration::from_secs(60), || {
        engines = generate.children();
        !engines.is_empty() || generate.has_ended()
    });
    let status = generate.wait(Duration::from_secs(60));
    assert_eq!(status.code(), Some(0), "{}", generate.output());
    assert!(generate.output().contains("73"), "{}", generate.output());
    assert!(!engines.is_empty() && engines.iter().all(|engine| !is_alive(*engine)), "{engines:?}");
}

#[test]
fn without_a_coordinator_and_a_model_the_next_step_is_named() {
    let refused = run(&["generate", "--prompt", "hello", "--url", &format!("http://{ONE_LINE}")]);
    refused.expect_refusal(4, &[ONE_LINE, "mlx-cluster coordinator"]);
    run(&["status", "--url", &format!("http://{ONE_LINE}")]).expect_refusal(4, &[ONE_LINE]);
}

#[test]
fn a_plan_needs_no_worker() {
    let model = TinyModel::new();
    let plan = run(&["plan", "--model", &model.text(), "--memory", "64GB,24GB", "--split", "3,1"]).expect_success().stdout;
    for word in ["0-2", "64.0 GB", "24.0 GB", "weights"] {
        assert!(plan.contains(word), "no {word} in\n{plan}");
    }
    run(&["plan", "--model", &model.text(), "--memory", "100kB"]).expect_refusal(6, &["100.0 kB"]);
    run(&["plan", "--model", "/nowhere/at/all"]).expect_refusal(3, &["/nowhere/at/all"]);
}

//! The verbs as somebody at a terminal uses them.

use crate::support::{Cluster, PATIENCE, Process, TinyModel, demo_model, free_port, is_alive, run, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::{collections::BTreeSet, io::Write, path::Path, process::Command};

const ONE_LINE: &str = "127.0.0.1:1";

#[test]
fn every_verb_shows_an_example() {
    for verb in ["worker", "coordinator", "generate", "chat", "plan", "status", "fuse", "evaluate"] {
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
    let status = chat.wait(PATIENCE);
    let output = chat.output();
    assert_eq!(status.code(), Some(0), "{output}");
    for word in ["73", "23", "/reset", "/nonsense"] {
        assert!(output.contains(word), "no {word} in\n{output}");
    }
}

/// `generate` with a model of its own, while no coordinator answers at its URL.
fn generate_alone(model: &Path, args: &[&str], home: &Path) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlx-cluster"));
    command.env("MLX_CLUSTER_HOME", home).env("MLX_CLUSTER_URL", format!("http://127.0.0.1:{}", free_port()));
    Process::start("generate", command.args(["generate", "--temperature", "0", "--model"]).arg(model).args(args))
}

#[test]
fn a_model_alone_is_a_cluster_of_one_that_leaves_nothing_behind() {
    let home = tempfile::tempdir().unwrap();
    let mut generate = generate_alone(&demo_model(), &["--prompt", "What is 27 + 46?"], home.path());
    let mut engines = BTreeSet::new();
    wait_until(PATIENCE, || {
        engines.extend(generate.children());
        generate.has_ended()
    });
    let status = generate.wait(PATIENCE);
    assert_eq!(status.code(), Some(0), "{}", generate.output());
    assert!(generate.output().contains("73"), "{}", generate.output());
    assert!(!engines.is_empty() && engines.iter().all(|engine| !is_alive(*engine)), "{engines:?}");
}

#[test]
fn a_cluster_of_one_ends_with_its_tool_however_that_ends() {
    let model = TinyModel::new();
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::TERM, Some(130)), (Signal::KILL, None)] {
        let home = tempfile::tempdir().unwrap();
        let mut generate = generate_alone(&model.path(), &["--prompt", "x", "--raw", "--max-tokens", "8000"], home.path());
        // The answer is one long line, so its first bytes are the sign that an engine works.
        let streams = wait_until(PATIENCE, || !generate.children().is_empty() && generate.output().ends_with(|c: char| c != '\n'));
        assert!(streams, "no answer\n{}", generate.output());
        let engines = generate.children();
        generate.signal(signal);
        assert_eq!(generate.wait(PATIENCE).code(), code, "{}", generate.output());
        assert!(wait_until(PATIENCE, || engines.iter().all(|engine| !is_alive(*engine))), "{signal:?} leaves engines");
    }
}

#[test]
fn ctrl_c_stops_an_answer_and_not_the_conversation() {
    let model = TinyModel::new();
    let cluster = Cluster::serving(model.path(), 1);
    let mut chat = Process::start("chat", &mut cluster.command("chat", &["chat", "--url", &cluster.url(), "--max-tokens", "8000"]));
    let mut stdin = chat.stdin();
    writeln!(stdin, "hello").unwrap();
    let running = || cluster.get("/v1/cluster").body["load"]["running"].as_u64();
    assert!(wait_until(PATIENCE, || running() == Some(1)), "no answer\n{}", chat.output());
    chat.signal(Signal::INT);
    assert!(wait_until(PATIENCE, || running() == Some(0)), "the answer goes on\n{}", chat.output());
    writeln!(stdin, "/help\n/exit").unwrap();
    assert_eq!(chat.wait(PATIENCE).code(), Some(0), "{}", chat.output());
    assert!(chat.output().contains("/reset"), "{}", chat.output());
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

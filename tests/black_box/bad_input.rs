//! Bad models and wrong settings: one sentence that names the cause, and an exit status that says of which kind it is.

use crate::support::{Cluster, Setup, TinyModel, free_port, run};
use serde_json::{Value, json};
use std::net::TcpListener;

/// A model, the exit status, and words that the sentence must hold.
struct BadModel {
    model: TinyModel,
    words: Vec<&'static str>,
}

fn bad(model: TinyModel, words: &[&'static str]) -> BadModel {
    BadModel { model, words: words.to_vec() }
}

/// The coordinator refuses each of these before any worker is needed.
fn expect_refusals(models: Vec<BadModel>) {
    for BadModel { model, words } in models {
        let http = format!("127.0.0.1:{}", free_port());
        let cluster = format!("test-{}", uuid::Uuid::new_v4().simple());
        let refused = run(&["coordinator", "--cluster", &cluster, "--http", &http, "--model", &model.text(), "--wait", "2"]);
        refused.expect_refusal(3, &words);
    }
}

#[test]
fn configs() {
    let config = |changes: Value| TinyModel::new().with_config(&changes);
    expect_refusals(vec![
        bad(config(json!({"model_type": "lama"})), &["`lama`", "`llama`", "models supported", "adding-an-architecture"]),
        bad(config(json!({"hidden_size": null})), &["hidden_size"]),
        bad(config(json!({"num_hidden_layers": 1_000_000_000_000u64})), &["num_hidden_layers"]),
        bad(config(json!({"num_attention_heads": 0})), &["num_attention_heads"]),
        bad(config(json!({"vocab_size": "many"})), &["vocab_size"]),
        bad(config(json!({"rope_scaling": {"rope_type": "spiral", "factor": 2}})), &["spiral"]),
        bad(TinyModel::new().with_file("config.json", b"<html>not found</html>"), &["config.json"]),
        bad(TinyModel::new().without("config.json"), &["config.json"]),
    ]);
}

#[test]
fn weights() {
    let model = TinyModel::new();
    let bytes = model.weight_bytes();
    let tensor = "model.layers.2.mlp.up_proj.weight";
    expect_refusals(vec![
        bad(TinyModel::new().without("model.safetensors"), &["safetensors"]),
        bad(TinyModel::new().with_file("model.safetensors", &bytes[..bytes.len() - 100]), &["model.safetensors"]),
        bad(TinyModel::new().with_file("model.safetensors", &bytes[..50]), &["model.safetensors"]),
        bad(TinyModel::new().with_file("model.safetensors", b""), &["model.safetensors"]),
        bad(TinyModel::new().with_file("model.safetensors", &[&bytes[..], &[0; 9]].concat()), &["model.safetensors"]),
        bad(TinyModel::new().with_tensors(|tensors| drop(tensors.remove(tensor))), &[tensor]),
        bad(TinyModel::new().with_tensors(|tensors| drop(tensors.insert(tensor.into(), vec![95, 64]))), &[tensor, "95"]),
        bad(TinyModel::new().with_tensors(|tensors| drop(tensors.insert("model.extra.weight".into(), vec![4]))), &["model.extra.weight"]),
        bad(
            TinyModel::new().with_header(|header| header[tensor]["data_offsets"] = header["model.norm.weight"]["data_offsets"].clone()),
            &["model.safetensors"],
        ),
        bad(
            TinyModel::new().with_header(|header| header[tensor]["shape"] = json!([4_294_967_296u64, 4_294_967_296u64])),
            &["model.safetensors"],
        ),
        bad(TinyModel::new().with_header(|header| header[tensor]["dtype"] = json!("F99")), &["model.safetensors"]),
    ]);
}

#[test]
fn tokenizers_and_templates() {
    let template = |text: &str| TinyModel::new().with_json("tokenizer_config.json", &json!({"chat_template": text}));
    expect_refusals(vec![
        bad(TinyModel::new().without("tokenizer.json"), &["tokenizer.json"]),
        bad(TinyModel::new().with_file("tokenizer.json", b"{\"version\": 1"), &["tokenizer.json"]),
        bad(TinyModel::new().with_json("tokenizer.json", &json!({"decoder": "u"})), &["tokenizer.json"]),
        bad(template("{% for m in messages %}"), &["template"]),
    ]);
}

#[test]
fn a_template_that_loops_or_refuses_costs_its_request_only() {
    let template = "{% if messages[0].content == 'loop' %}{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}\
                    {% elif messages[0].content == 'raise' %}{{ raise_exception('roles must alternate') }}\
                    {% elif messages[0].content == 'miss' %}{{ messages[0].missing.deeper }}\
                    {% else %}{{ messages[0].content }}{% endif %}";
    let model = TinyModel::new().with_json("tokenizer_config.json", &json!({"chat_template": template}));
    let cluster = Cluster::serving(model.path(), 1);
    let ask =
        |content: &str| cluster.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": content}], "max_tokens": 3}));
    for (content, word) in [("loop", "template"), ("raise", "roles must alternate"), ("miss", "template")] {
        let answer = ask(content);
        assert_eq!(answer.status, 400, "{content}: {answer:?}");
        assert!(answer.error().contains(word), "{content}: {answer:?}");
    }
    assert_eq!(ask("hello").status, 200);
}

#[test]
fn a_model_that_does_not_fit() {
    let model = TinyModel::new();
    let setup = Setup::new(model.path(), 2).worker_args(&["--memory-limit", "200kB"]);
    setup.start().coordinator_refuses(6, &["worker0", "worker1", "200.0 kB"]);
}

#[test]
fn no_worker_within_the_wait() {
    let model = TinyModel::new();
    let mut cluster = Setup::new(model.path(), 0).coordinator_args(&["--wait", "1"]).start();
    cluster.coordinator_refuses(4, &["worker", "1 s"]);
}

#[test]
fn ports_in_use() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, port) = (taken.local_addr().unwrap().to_string(), taken.local_addr().unwrap().port().to_string());
    let cluster = format!("test-{}", uuid::Uuid::new_v4().simple());
    run(&["coordinator", "--cluster", &cluster, "--http", &address]).expect_refusal(4, &[&port, "in use"]);
    run(&["worker", "--cluster", &cluster, "--listen", &address]).expect_refusal(4, &[&port, "in use"]);
}

#[test]
fn a_split_of_another_number_of_layers() {
    let model = TinyModel::new();
    let mut cluster = Setup::new(model.path(), 2).coordinator_args(&["--split", "3,3"]).start();
    cluster.coordinator_refuses(2, &["6 layers", "has 4"]);
}

#[test]
fn wrong_usage() {
    for args in [
        &["coordinator", "--split", "4,x"][..],
        &["coordinator", "--split", "4,0"],
        &["coordinator", "--http", "nowhere"],
        &["coordinator", "--min-workers", "0"],
        &["coordinator", "--strategy", "magic"],
        &["coordinator", "--context", "-5"],
        &["worker", "--memory-limit", "lots"],
        &["worker", "--join", "no-port"],
        &["worker", "--cluster", ""],
        &["generate"],
        &["frobnicate"],
    ] {
        let refused = run(args);
        assert_eq!(refused.status, Some(2), "{args:?}: {refused:?}");
        assert!(refused.stderr.starts_with("error: "), "{args:?}: {refused:?}");
    }
}

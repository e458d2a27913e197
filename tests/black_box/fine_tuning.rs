//! Adapters become part of their base, and models are measured on data.

use crate::support::{Cluster, Finished, TinyModel, demo_model, run};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};

const RANK: usize = 2;
const HIDDEN_SIZE: usize = 128;
const QUERY: &str = "model.layers.5.self_attn.q_proj";

/// An adapter for the queries of the demo model's last layer, all of whose factors are `value`.
fn write_adapter(folder: &Path, inputs: usize, value: f32) {
    fs::create_dir(folder).unwrap();
    let config = json!({"fine_tune_type": "lora", "num_layers": 1, "model": demo_model(), "lora_parameters": {"rank": RANK, "scale": 1.0, "dropout": 0.0}});
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes = |count: usize| value.to_le_bytes().repeat(count);
    let (a, b) = (bytes(inputs * RANK), bytes(RANK * HIDDEN_SIZE));
    let tensors = BTreeMap::from([
        (format!("{QUERY}.lora_a"), TensorView::new(Dtype::F32, vec![inputs, RANK], &a).unwrap()),
        (format!("{QUERY}.lora_b"), TensorView::new(Dtype::F32, vec![RANK, HIDDEN_SIZE], &b).unwrap()),
    ]);
    safetensors::serialize_to_file(tensors, None, &folder.join("adapters.safetensors")).unwrap();
}

fn fuse(adapter: &Path, target: &Path, args: &[&str]) -> Finished {
    let fixed = ["fuse", "--adapter-path", adapter.to_str().unwrap(), "--save-path", target.to_str().unwrap()];
    run(&[&fixed, args].concat())
}

#[test]
fn a_fused_model_is_a_model_and_differs_where_its_adapter_says() {
    let folder = tempfile::tempdir().unwrap();
    let (nothing, something) = (folder.path().join("nothing"), folder.path().join("something"));
    write_adapter(&nothing, HIDDEN_SIZE, 0.0);
    write_adapter(&something, HIDDEN_SIZE, 1.0);
    let (same, other) = (folder.path().join("same"), folder.path().join("new/other"));
    let said = fuse(&nothing, &same, &[]).expect_success().stdout;
    assert!(said.contains("1 lora changes"), "{said}");
    fuse(&something, &other, &["--model", demo_model().to_str().unwrap()]).expect_success();

    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    let (base, same_bytes, other_bytes) = (weights(&demo_model()), weights(&same), weights(&other));
    assert_eq!(base, same_bytes);
    let tensors = safetensors::SafeTensors::deserialize(&other_bytes).unwrap();
    let before = safetensors::SafeTensors::deserialize(&base).unwrap();
    let changed: Vec<_> = before.iter().filter(|(name, tensor)| tensors.tensor(name).unwrap() != *tensor).map(|(name, _)| name).collect();
    assert_eq!(changed, [format!("{QUERY}.weight")]);
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"] {
        assert!(other.join(file).is_file(), "no {file}");
    }

    let cluster = Cluster::serving(&same, 1);
    assert!(cluster.chat("What is 27 + 46?").text().contains("73"));
}

#[test]
fn what_cannot_be_fused_is_said_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (good, wide) = (folder.path().join("good"), folder.path().join("wide"));
    write_adapter(&good, HIDDEN_SIZE, 1.0);
    write_adapter(&wide, 2 * HIDDEN_SIZE, 1.0);
    let target = folder.path().join("fused");
    let demo = demo_model().display().to_string();
    fuse(&folder.path().join("none"), &target, &[]).expect_refusal(3, &["none holds no adapter", "adapter_config.json"]);
    let misfit = ["does not fit", demo.as_str(), "1 of its 2 tensors", "lora_a` of shape [256, 2], wanted is [128, 2]"];
    fuse(&wide, &target, &[]).expect_refusal(3, &misfit);
    let tiny = TinyModel::new();
    fuse(&good, &target, &["--model", tiny.path().to_str().unwrap()]).expect_refusal(3, &["made for", "does not fit"]);
    fs::create_dir(&target).unwrap();
    fs::write(target.join("mine"), "x").unwrap();
    fuse(&good, &target, &[]).expect_refusal(2, &["is there and not empty", "--save-path"]);
    let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn a_model_is_measured_on_rows_of_every_form() {
    let cluster = Cluster::serving(demo_model(), 1);
    let question = "What is 27 + 46?";
    let known = cluster.run(&["generate", "--url", &cluster.url(), "--prompt", question, "--temperature", "0", "--json"]).expect_success();
    let known: Value = serde_json::from_str(&known.stdout).unwrap();
    let answer = known["text"].as_str().unwrap();
    let rows = [
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}),
        json!({"prompt": question, "completion": format!(" {answer}\n")}),
        json!({"prompt": question, "completion": "A very wrong answer"}),
        json!({"text": "Once upon a time"}),
    ];
    let folder = tempfile::tempdir().unwrap();
    let write = |file: &str, rows: &[Value]| {
        fs::write(folder.path().join(file), rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    };
    write("test.jsonl", &rows);
    write("text.jsonl", &rows[3..]);
    let url = cluster.url();
    let data = folder.path().to_str().unwrap();
    let evaluate = |args: &[&str]| {
        let all = [&["evaluate", "--url", &url, "--json", "--data", data], args].concat();
        serde_json::from_str::<Value>(&cluster.run(&all).expect_success().stdout).unwrap()
    };
    let all = evaluate(&[]);
    assert_eq!((&all["rows"], &all["answers"], &all["exact"]), (&json!(4), &json!(3), &json!(2)), "{all}");
    assert!((all["perplexity"].as_f64().unwrap() - all["loss"].as_f64().unwrap().exp()).abs() < 1e-6, "{all}");
    let first = evaluate(&["--limit", "1"]);
    assert_eq!((&first["rows"], &first["exact_match"]), (&json!(1), &json!(1.0)), "{first}");
    assert!(first["loss"].as_f64() < all["loss"].as_f64(), "{first} {all}");

    // Of a text every token but the first counts, and the one that ends it.
    let text = evaluate(&["--split", "text"]);
    let mut ids = cluster.post("/tokenize", &json!({"prompt": "Once upon a time"})).body;
    let mut prompt: Vec<Value> = ids["tokens"].as_array_mut().unwrap().drain(..).collect();
    prompt.push(ids["eos_token_id"].clone());
    let body = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 0});
    let answer = cluster.post("/v1/completions", &body).body;
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    let wanted = -logprobs[1..].iter().map(|logprob| logprob.as_f64().unwrap()).sum::<f64>() / (logprobs.len() - 1) as f64;
    assert_eq!((text["tokens"].as_u64().unwrap() as usize, &text["exact_match"]), (logprobs.len() - 1, &Value::Null), "{text}");
    assert!((text["loss"].as_f64().unwrap() - wanted).abs() < 1e-4, "{text} {wanted}");

    write("bad.jsonl", &[json!({"text": "a"}), json!({"prompt": "a"})]);
    let evaluate = |args: &[&str]| cluster.run(&[&["evaluate", "--url", &url], args].concat());
    evaluate(&["--data", data, "--split", "bad"]).expect_refusal(3, &["bad.jsonl: line 2 has no `completion`"]);
    evaluate(&["--data", data, "--split", "none"]).expect_refusal(3, &["none.jsonl", "--data"]);
    evaluate(&["--data", data, "--raw"]).expect_refusal(2, &["line 1 has `messages`", "--raw"]);
    evaluate(&["--data", data, "--model", "another"]).expect_refusal(2, &["another"]);
}

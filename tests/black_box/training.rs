//! What a job is given that it cannot work with: one sentence each, and nothing that was there is lost.

use crate::support::{Cluster, Finished, PATIENCE, Setup, TinyModel, wait_until};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};

const ROWS: usize = 12;

/// A coordinator, a model, and a folder for what jobs read and write.
struct Bench {
    cluster: Cluster,
    model: TinyModel,
    folder: tempfile::TempDir,
}

impl Bench {
    /// Without workers, what a job is made of is read all the same.
    fn new(workers: usize) -> Self {
        let mut cluster = Setup::without_model(workers).start();
        if workers == 0 {
            assert!(wait_until(PATIENCE, || cluster.health().is_some()), "{}", cluster.output());
        } else {
            cluster.wait_until_ready();
        }
        // Texts of data sets end with a token.
        let model = TinyModel::new().with_json("tokenizer_config.json", &json!({"eos_token": "!"}));
        let bench = Self { cluster, model, folder: tempfile::tempdir().unwrap() };
        bench.data(&(0..ROWS).map(|i| format!("{{\"text\": \"{}\"}}\n", "abc ".repeat(i % 5 + 1))).collect::<String>());
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn data(&self, train: &str) {
        fs::write(self.path("train.jsonl"), train).unwrap();
    }

    fn config(&self, name: &str, changes: &Value) -> String {
        let mut config: Map<String, Value> = Map::new();
        let fixed = json!({"model": self.model.text(), "data": self.folder.path(), "adapter_path": self.path("adapter"), "train": true,
            "num_layers": -1, "batch_size": 4, "iters": 6, "save_every": 1, "steps_per_report": 1,
            "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0}});
        for part in [&fixed, changes] {
            config.extend(part.as_object().unwrap().clone());
        }
        let path = self.path(name);
        fs::write(&path, Value::from(config).to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn train(&self, changes: &Value) -> Finished {
        self.cluster.run(&["train", "--coordinator", &self.cluster.url(), "--config", &self.config("lora.json", changes)])
    }

    fn jobs(&self, args: &[&str]) -> Finished {
        self.cluster.run(&[&["jobs", "--coordinator", &self.cluster.url()], args].concat())
    }

    /// The job that was started last.
    fn last(&self) -> String {
        let list = self.cluster.get("/v1/jobs").body;
        list["data"].as_array().unwrap().last().unwrap()["id"].as_str().unwrap().to_owned()
    }

    fn checkpoints(&self, id: &str) -> PathBuf {
        self.cluster.coordinator_home().join("jobs").join(id).join("checkpoints")
    }
}

/// All numbers of a file of f32.
fn numbers(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.iter().flat_map(|(_, tensor)| tensor.data().to_vec()).collect::<Vec<_>>();
    data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn data_that_cannot_be_trained_on_are_refused_before_anything_is_loaded() {
    let bench = Bench::new(0);
    let text = |count: usize| "{\"text\": \"a b\"}\n".repeat(count);
    let question = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n";
    let answered = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let bad = format!("{}{{\"text\": }}\n[1]\n", text(4));
    let cases: [(&str, Value, &[&str]); 6] = [
        (&bad, json!({}), &["train.jsonl, line 5, column 10: not JSON", "2 lines are bad in all"]),
        ("", json!({}), &["train.jsonl", "has no rows"]),
        (&text(3), json!({}), &["train.jsonl", "has 3 examples, fewer than the batch size 4"]),
        (&[answered, question].concat(), json!({"mask_prompt": true}), &["line 2", "no message of the assistant", "unset mask_prompt"]),
        (&text(4), json!({"mask_prompt": true}), &["mask_prompt is not supported for text data"]),
        (&text(4), json!({"test": true}), &["has no test.jsonl"]),
    ];
    for (data, changes, words) in cases {
        bench.data(data);
        bench.train(&changes).expect_refusal(1, words);
    }
    // What comes last is looked at first, too.
    bench.data(&text(4));
    fs::write(bench.path("test.jsonl"), text(2)).unwrap();
    bench.train(&json!({"test": true})).expect_refusal(1, &["test.jsonl has 2 examples, fewer than the batch size 4"]);
}

#[test]
fn settings_that_mean_nothing_are_no_job() {
    let bench = Bench::new(0);
    let cases: [(Value, &[&str]); 5] = [
        (json!({"lora_parameters": {"rank": 0, "scale": 10.0, "dropout": 0.0}}), &["`lora_parameters.rank` is 0", "from 1 to 4096"]),
        (json!({"lora_parameters": {"rank": 9999, "scale": 10.0, "dropout": 0.0}}), &["`lora_parameters.rank` is 9999"]),
        (json!({"optimizer": "adamx"}), &["`optimizer` is \"adamx\"", "muon", "the nearest is `adam"]),
        (json!({"learning_rat": 1e-3}), &["`learning_rat` is not a key", "`learning_rate`"]),
        (json!({"batch_size": 0}), &["`batch_size` is 0"]),
    ];
    for (changes, words) in cases {
        bench.train(&changes).expect_refusal(3, words);
    }
    assert!(bench.jobs(&["list"]).expect_success().stdout.contains("no jobs yet"));
}

#[test]
fn an_adapter_for_another_base_is_refused_and_both_are_named() {
    let bench = Bench::new(0);
    let other = bench.path("other");
    fs::create_dir(&other).unwrap();
    let data = vec![0; 4 * 2 * 999];
    let tensor = TensorView::new(Dtype::F32, vec![999, 2], &data).unwrap();
    let file = other.join("adapters.safetensors");
    safetensors::serialize_to_file([("model.layers.0.self_attn.q_proj.lora_a", tensor)], None, &file).unwrap();
    let start = json!({"resume_adapter_file": &file});
    let words = ["adapters.safetensors", "does not fit tiny", "[999, 2], wanted is [64, 2]", "1 of its 1 tensors"];
    bench.train(&start).expect_refusal(1, &words);
    fs::write(other.join("adapter_config.json"), "{\"model\": \"owner/another\"}").unwrap();
    bench.train(&start).expect_refusal(1, &[&words[..], &["was made for owner/another, does not fit"]].concat());
    bench.train(&json!({"resume_adapter_file": bench.path("none.safetensors")})).expect_refusal(1, &["none.safetensors"]);
}

#[test]
fn a_job_that_diverges_stops_and_keeps_its_last_good_checkpoint() {
    let bench = Bench::new(1);
    let adapter = bench.path("adapter").join("adapters.safetensors");
    // The update after a loss that is a number makes the next one none.
    let sgd = |learning_rate: f64, scale: f64| {
        let lora = json!({"rank": 2, "scale": scale, "dropout": 0.0});
        json!({"optimizer": "sgd", "learning_rate": learning_rate, "lora_parameters": lora})
    };
    bench
        .train(&sgd(1e30, 10.0))
        .expect_refusal(1, &["the loss of iteration 2 is ", "lower the learning rate", "of iteration 1", "0000001/adapters.safetensors"]);
    let kept = bench.checkpoints(&bench.last()).join("0000001/adapters.safetensors");
    assert!(numbers(&adapter).iter().all(|number| number.is_finite()));
    let kept = fs::read(kept).unwrap();
    assert!(fs::read(&adapter).unwrap() == kept);
    // One that makes the weights themselves none is not saved.
    bench.train(&sgd(3e38, 1e6)).expect_refusal(1, &["not finite after iteration 1", "lower the learning rate", "of iteration 0"]);
    assert!(fs::read(&adapter).unwrap() == kept, "a job that came to nothing leaves what an earlier one made");
    let id = bench.last();
    assert!(!bench.checkpoints(&id).join("0000001").exists());

    // What it says to do can be done.
    let start = bench.checkpoints(&id).join("0000000/adapters.safetensors");
    bench.train(&json!({"resume_adapter_file": start, "learning_rate": 1e-4})).expect_success();
}

#[test]
fn a_job_that_ends_before_its_first_update_leaves_an_adapter_all_the_same() {
    let bench = Bench::new(1);
    bench.train(&json!({"iters": 1, "grad_accumulation_steps": 2})).expect_success();
    for file in ["adapters.safetensors", "adapter_config.json", "metrics.jsonl"] {
        assert!(bench.path("adapter").join(file).is_file(), "{file}");
    }
}

#[test]
fn a_job_goes_on_with_what_it_was_made_with_alone() {
    let bench = Bench::new(1);
    bench.train(&json!({})).expect_success();
    let id = bench.last();
    let more = |name: &str, changes: Value| {
        let path = bench.path(name);
        fs::write(&path, changes.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let other = more("other.json", json!({"iters": 8, "seed": 3, "batch_size": 2, "learning_rate": 1e-3}));
    let words =
        ["checkpoint at iteration 6", "`seed` is 3", "`batch_size` is 2", "`learning_rate` is 0.001, the checkpoint was made with 0.00001"];
    bench.jobs(&["resume", &id, "--config", &other]).expect_refusal(2, &words);

    let longer = more("longer.json", json!({"iters": 8}));
    let data = fs::read_to_string(bench.path("train.jsonl")).unwrap();
    bench.data(&data.replace("abc", "abd"));
    bench.jobs(&["resume", &id, "--config", &longer]).expect_refusal(1, &["the training examples are not those", "iteration 6"]);
    bench.data(&data);

    let checkpoint = bench.checkpoints(&id).join("0000006");
    forget_optimizer(&checkpoint);
    let words = ["checkpoint at iteration 6 has no optimizer state", "--warm-start"];
    bench.jobs(&["resume", &id, "--config", &longer]).expect_refusal(2, &words);
    let said = bench.jobs(&["resume", &id, "--config", &longer, "--warm-start"]).expect_success().stdout;
    assert!(said.contains("Iter 7: ") && said.contains("Iter 8: ") && !said.contains("Iter 6: Train"), "{said}");
}

/// Makes of a checkpoint a whole one that never had the state of an optimizer.
fn forget_optimizer(folder: &Path) {
    fs::remove_file(folder.join("optimizer.safetensors")).unwrap();
    let state = folder.join("state.json");
    let mut sealed: Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    sealed["contents"]["files"].as_object_mut().unwrap().remove("optimizer.safetensors").unwrap();
    let contents = sealed["contents"].to_string();
    let digest: String = Sha256::digest(&contents).iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(state, format!("{{\"sha256\": \"{digest}\", \"contents\": {contents}}}")).unwrap();
}

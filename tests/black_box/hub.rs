//! Models from the hub, here a small one on loopback, reached by the real client.

use crate::support::{PATIENCE, Setup, TinyModel, wait_until};
use mlx_cluster_hub::fake::{Access, FakeHub, Served};
use std::time::Duration;

const REPO: &str = "tiny-models/tiny-llama";

#[test]
fn a_repository_is_fetched_once_and_served_over_two_workers() {
    let (hub, model, cache) = (FakeHub::start().unwrap(), TinyModel::new(), tempfile::tempdir().unwrap());
    hub.add_folder(REPO, &model.path()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let setup = || {
        let setup = Setup::new(REPO, 2).environment("HF_ENDPOINT", hub.endpoint()).environment("HF_HOME", cache.path());
        setup.home(home.path())
    };
    let mut cluster = setup().start();
    cluster.wait_until_ready();
    let fetched = cluster.complete(12).text().to_owned();
    hub.take_seen();
    drop(cluster);

    let mut cluster = setup().environment("HF_HUB_OFFLINE", "1").start();
    cluster.wait_until_ready();
    assert_eq!(cluster.complete(12).text(), fetched);
    assert!(hub.take_seen().is_empty(), "HF_HUB_OFFLINE was not honoured");
    assert_eq!(cluster.get("/v1/models").body["data"][0]["id"], REPO);
}

#[test]
fn what_the_hub_refuses_is_said_in_a_sentence() {
    let hub = FakeHub::start().unwrap();
    let config = std::fs::read(TinyModel::new().path().join("config.json")).unwrap();
    hub.add("tiny-models/gated", Access::Gated("secret"), [("config.json", b"{}".to_vec())]);
    hub.add("tiny-models/pickled", Access::Public, [("config.json", config), ("pytorch_model.bin", vec![0; 64])]);
    for (repo, status, words) in [
        ("tiny-models/nowhere", 3, ["nowhere", "HF_TOKEN"]),
        ("tiny-models/gated", 5, ["gated", "HF_TOKEN"]),
        ("tiny-models/pickled", 3, ["pickled", "safetensors"]),
    ] {
        let cluster = Setup::new(repo, 0).environment("HF_ENDPOINT", hub.endpoint());
        let mut cluster = cluster.coordinator_args(&["--wait", "2"]).start();
        cluster.coordinator_refuses(status, &words);
    }
}

/// Bytes of weights that were served beyond the first time, without the head, which is read by whoever asks first what the model is.
fn served_again(served: &Served, head_bytes: usize) -> usize {
    let mut again = 0;
    for (file, ranges) in served {
        let mut times = vec![0usize; ranges.iter().map(|range| range.end).max().unwrap_or(0)];
        ranges.iter().cloned().flatten().for_each(|byte| times[byte] += 1);
        let from = if file.ends_with(".safetensors") { head_bytes } else { times.len() };
        again += times[from..].iter().map(|times| times.saturating_sub(1)).sum::<usize>();
    }
    again
}

fn total(served: &Served) -> usize {
    served.values().flatten().map(ExactSizeIterator::len).sum()
}

fn head_bytes(weights: &[u8]) -> usize {
    8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize
}

/// Starts three workers with nothing of the model, and counts what that costs.
fn served_for_three(layout: &[&str]) {
    let (hub, model) = (FakeHub::start().unwrap(), TinyModel::with_sizes(6, 4096));
    hub.add_folder(REPO, &model.path()).unwrap();
    let setup = Setup::new(REPO, 3).own_homes().environment("HF_ENDPOINT", hub.endpoint());
    let mut cluster = setup.coordinator_args(layout).start();
    cluster.wait_until_ready();
    assert!(!cluster.complete(8).text().is_empty());
    let (served, weights) = (hub.take_served(), model.weight_bytes());
    let model_bytes: u64 = std::fs::read_dir(model.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    let ratio = total(&served) as f64 / model_bytes as f64;
    println!("{layout:?}: the hub served {} bytes of a model of {model_bytes} for 3 workers: {ratio:.4}", total(&served));
    assert!(ratio <= 1.02, "{ratio}");
    assert_eq!(served_again(&served, head_bytes(&weights)), 0, "bytes of tensors came more than once");
}

#[test]
fn three_workers_fetch_each_byte_once_in_a_pipeline_and_in_a_tensor_group() {
    served_for_three(&["--strategy", "pipeline"]);
    served_for_three(&["--strategy", "tensor"]);
}

#[test]
fn a_worker_that_is_killed_again_and_again_loses_nothing_that_was_there() {
    const KILLS: usize = 4;
    const PIECE: usize = 16 << 10;
    let (hub, model) = (FakeHub::start().unwrap(), TinyModel::with_sizes(6, 4096));
    hub.add_folder(REPO, &model.path()).unwrap();
    let mut cluster = Setup::new(REPO, 1).own_homes().environment("HF_ENDPOINT", hub.endpoint()).start();
    hub.set_pace(Some((PIECE, Duration::from_millis(6))));
    let weights = model.weight_bytes();
    let (mut served, mut random) = (Served::new(), 20_261_120u64);
    println!("seed {random}");
    for _ in 0..KILLS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let until = total(&served) + (2 + (random >> 33) as usize % 40) * PIECE;
        let came = wait_until(PATIENCE, || {
            for (file, ranges) in hub.take_served() {
                served.entry(file).or_default().extend(ranges);
            }
            total(&served) >= until
        });
        assert!(came, "{} of {until} bytes\n{}", total(&served), cluster.output());
        cluster.kill("worker0");
        cluster.start_worker("worker0");
    }
    hub.set_pace(None);
    cluster.wait_until_ready();
    for (file, ranges) in hub.take_served() {
        served.entry(file).or_default().extend(ranges);
    }
    let again = served_again(&served, head_bytes(&weights));
    println!("{again} of {} bytes came again after {KILLS} kills", weights.len());
    // What was on its way when the process ended.
    assert!(again <= KILLS * 8 * PIECE, "{again}");
    cluster.complete(8);
}

#[test]
fn models_are_pulled_listed_verified_and_removed() {
    let (hub, model, home) = (FakeHub::start().unwrap(), TinyModel::new(), tempfile::tempdir().unwrap());
    hub.add_folder(REPO, &model.path()).unwrap();
    let cluster = Setup::new(REPO, 0).environment("HF_ENDPOINT", hub.endpoint()).environment("MLX_CLUSTER_HOME", home.path());
    let tool = cluster.environment("HF_HOME", home.path().join("hf")).idle();
    let models = |args: &[&str]| tool.run(&[&["models"], args].concat());
    models(&["list"]).expect_success();
    models(&["verify", REPO]).expect_refusal(3, &[REPO, "models list"]);
    models(&["pull", REPO, "--layers", "3-9"]).expect_refusal(2, &["layers 0-3"]);
    models(&["pull", REPO, "--layers", "1-2"]).expect_success();
    let listed = models(&["list", "--json"]).expect_success().stdout;
    let entry: serde_json::Value = serde_json::from_str(listed.trim()).unwrap();
    let (bytes, whole) = (entry["bytes"].as_u64().unwrap(), entry["of_bytes"].as_u64().unwrap());
    assert!(entry["place"] == "weight store" && bytes > whole / 4 && bytes < whole / 2, "{listed}");
    models(&["verify"]).expect_success();
    let folder = std::path::Path::new(entry["folder"].as_str().unwrap());
    let file = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "safetensors")).unwrap();
    let mut damaged = std::fs::read(&file).unwrap();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&file, damaged).unwrap();
    models(&["verify"]).expect_refusal(3, &[REPO, "damaged", "models remove"]);
    models(&["remove", REPO]).expect_success();
    models(&["remove", REPO]).expect_refusal(3, &["models list"]);

    hub.take_served();
    models(&["pull", REPO]).expect_success();
    assert!(models(&["list"]).expect_success().stdout.contains("shared cache"));
    models(&["verify", REPO]).expect_success();
    models(&["remove", REPO]).expect_refusal(2, &["--cache"]);
    models(&["remove", REPO, "--cache"]).expect_success();
    assert!(models(&["list"]).expect_success().stdout.contains("no weights"));
}

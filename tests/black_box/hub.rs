//! Models from the hub, here a small one on loopback, reached by the real client.

use crate::support::{Setup, TinyModel};
use mlx_cluster_hub::fake::{Access, FakeHub};

const REPO: &str = "tiny-models/tiny-llama";

#[test]
fn a_repository_is_fetched_once_and_served_over_two_workers() {
    let (hub, model, cache) = (FakeHub::start().unwrap(), TinyModel::new(), tempfile::tempdir().unwrap());
    hub.add_folder(REPO, &model.path()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let setup = || {
        let setup = Setup::new(REPO, 2).environment("HF_ENDPOINT", hub.endpoint()).environment("HF_HOME", cache.path());
        setup.environment("MLX_CLUSTER_HOME", home.path())
    };
    let mut cluster = setup().start();
    cluster.wait_until_ready();
    let fetched = cluster.complete(12).text().to_owned();
    let whole_file = |seen: &mlx_cluster_hub::fake::Seen| {
        seen.path.contains("/storage/") && seen.path.ends_with("model.safetensors") && seen.range.is_none()
    };
    let downloads = hub.take_seen().iter().filter(|seen| whole_file(seen)).count();
    assert!(downloads <= 1, "the weights were fetched {downloads} times");
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

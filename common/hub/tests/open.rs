//! Finding a model: metadata from the hub, refusals, offline mode, and the index without the weights.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use mlx_cluster_hub::{
    HubError, HubErrorKind, HubSettings, ModelRef, Snapshot, Token,
    fake::{Access, Fault},
};

#[tokio::test]
async fn only_metadata_is_fetched_and_only_once() {
    let world = World::new();
    let reports = Reports::default();
    let snapshot = Snapshot::open(&model(), &world.settings, &|progress| reports.add(progress)).await.unwrap();
    let commit = world.hub.commit(REPO).unwrap();
    assert_eq!(snapshot.model().to_string(), format!("{REPO}@{commit}"));
    assert_eq!(snapshot.folder(), world.settings.cache_dir.join("models--demo--tiny/snapshots").join(&commit));
    let expected = ["chat_template.jinja", "config.json", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names(snapshot.folder()), expected);
    assert_eq!(snapshot.config().unwrap()["model_type"], "qwen3");
    assert!(snapshot.file("tokenizer.json").is_some() && snapshot.file(FIRST).is_none());
    let reference = std::fs::read_to_string(world.settings.cache_dir.join("models--demo--tiny/refs/main")).unwrap();
    assert_eq!(reference, commit);
    for file in expected {
        let (done, total) = *reports.of(file).last().unwrap();
        assert!(done == total && total > 0, "{file}");
    }

    world.hub.take_seen();
    Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    let paths: Vec<_> = world.hub.take_seen().into_iter().map(|seen| seen.path).collect();
    assert!(paths.len() == 2 && paths.iter().all(|path| path.starts_with("/api/models/")), "{paths:?}");
}

#[tokio::test]
async fn the_index_needs_no_weights() {
    let world = World::new();
    let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    world.hub.take_seen();
    let index = snapshot.weight_index().await.unwrap();
    assert_eq!(index.tensors["a"].shape, [700_000]);
    assert_eq!((index.tensors["b"].file.as_str(), index.tensors["b"].bytes), (SECOND, 400));
    // As much as every header has, then the rest of this one: no byte of a tensor.
    assert_eq!(world.ranges(FIRST), [Some("bytes=0-63".to_owned()), Some("bytes=64-79".to_owned())]);
    assert!(snapshot.file(FIRST).is_none());
}

#[tokio::test]
async fn a_long_header_is_fetched_in_two_parts_also_without_ranges() {
    let name = "n".repeat(200_000);
    let files = vec![("config.json", b"{}".to_vec()), ("model.safetensors", weights(&name, 3))];
    for fault in [None, Some(Fault::IgnoreRange)] {
        let world = World::with(Access::Public, files.clone());
        for fault in fault.into_iter().cycle().take(2) {
            world.hub.fail_next("model.safetensors", fault);
        }
        let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
        let index = snapshot.weight_index().await.unwrap();
        assert_eq!(index.tensors[&name].bytes, 12);
    }
}

#[tokio::test]
async fn a_bad_weight_file_on_the_hub_is_named_before_it_is_fetched() {
    for (bytes, expected) in
        [(weights("a", 10)[..60].to_vec(), "incomplete download"), (Vec::new(), "too few"), (b"<html>".to_vec(), "web page")]
    {
        let world = World::with(Access::Public, vec![("config.json", b"{}".to_vec()), ("model.safetensors", bytes)]);
        let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
        let message = snapshot.weight_index().await.unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("model.safetensors"), "{message}");
    }
}

#[tokio::test]
async fn the_index_must_agree_with_the_repository() {
    let mut files = model_files();
    files.retain(|(name, _)| *name != SECOND);
    let world = World::with(Access::Public, files);
    let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    let message = snapshot.weight_index().await.unwrap_err().to_string();
    assert!(message.contains(SECOND) && message.contains("missing"), "{message}");

    let world = World::with(Access::Public, vec![("config.json", b"{}".to_vec()), ("pytorch_model.bin", b"x".to_vec())]);
    let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    let message = snapshot.weight_index().await.unwrap_err().to_string();
    assert!(message.contains("pickle files can run code"), "{message}");
}

async fn refused(world: &World, text: &str, token: Option<&str>) -> HubError {
    let settings = HubSettings { token: token.and_then(Token::new), ..world.settings.clone() };
    Snapshot::open(&ModelRef::parse(text).unwrap(), &settings, &silent).await.unwrap_err()
}

#[tokio::test]
async fn refusals_name_the_next_step() {
    let world = World::new();
    for (text, token, kind, expected) in [
        ("demo/missing", None, HubErrorKind::NotFound, "check the spelling; if it is private, set HF_TOKEN"),
        ("demo/missing", Some("hf_good"), HubErrorKind::NotFound, "to a token that may read it"),
        ("demo/missing", Some("bad"), HubErrorKind::Access, "rejects the token"),
        ("demo/tiny@v9", None, HubErrorKind::NotFound, "no branch, tag or commit `v9`"),
    ] {
        let error = refused(&world, text, token).await;
        assert!(error.kind() == kind && error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn gated_and_private_models_need_the_right_token() {
    for access in [Access::Gated("hf_good"), Access::Private("hf_good")] {
        let world = World::with(access.clone(), model_files());
        for token in [None, Some("hf_other")] {
            let message = refused(&world, REPO, token).await.to_string();
            let expected = if matches!(access, Access::Gated(_)) { "accept its licence at http://127" } else { "if it is private" };
            assert!(message.contains(expected) && message.contains("HF_TOKEN") && !message.contains("hf_other"), "{message}");
        }
        let settings = HubSettings { token: Token::new("hf_good"), ..world.settings.clone() };
        let snapshot = Snapshot::open(&model(), &settings, &silent).await.unwrap();
        snapshot.weight_index().await.unwrap();
    }
}

#[tokio::test]
async fn a_repository_without_config_is_not_a_model() {
    let world = World::with(Access::Public, vec![("model-q4.gguf", b"GGUF".to_vec())]);
    let message = refused(&world, REPO, None).await.to_string();
    assert!(message.contains("no config.json") && message.contains("model-q4.gguf"), "{message}");
}

#[tokio::test]
async fn an_error_page_never_stays_in_the_cache() {
    let world = World::new();
    for _ in 0..8 {
        world.hub.fail_next("config.json", Fault::Status(503));
    }
    let error = Snapshot::open(&model(), &world.settings, &silent).await.unwrap_err();
    assert!(matches!(&error, HubError::WrongSize { file, .. } if file == "config.json"), "{error}");
    while world.hub.fault_pending("config.json") {
        let _ = Snapshot::open(&model(), &world.settings, &silent).await;
    }
    let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    assert_eq!(snapshot.config().unwrap()["model_type"], "qwen3");
}

#[tokio::test]
async fn offline_uses_the_cache_and_no_network() {
    let world = World::new();
    let online = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    world.hub.take_seen();
    let cached = Snapshot::open(&model(), &world.offline(), &silent).await.unwrap();
    assert_eq!((cached.folder(), cached.model()), (online.folder(), online.model()));
    for result in [cached.weight_index().await.map(|_| ()), cached.fetch_weights(&[FIRST.to_owned()], &silent).await] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(FIRST) && message.contains("HF_HUB_OFFLINE") && message.contains("unset"), "{message}");
    }
    assert_eq!(world.hub.take_seen(), []);

    online.fetch_weights(&[FIRST.to_owned(), SECOND.to_owned()], &silent).await.unwrap();
    world.hub.take_seen();
    cached.fetch_weights(&[FIRST.to_owned()], &silent).await.unwrap();
    assert_eq!(cached.weight_index().await.unwrap().tensors.len(), 2);
    assert_eq!(world.hub.take_seen(), []);
}

#[tokio::test]
async fn offline_with_an_empty_cache_names_the_way_out() {
    let world = World::new();
    let error = Snapshot::open(&model(), &world.offline(), &silent).await.unwrap_err();
    assert!(matches!(&error, HubError::Offline { file, .. } if file == "config.json"), "{error}");
    assert_eq!(world.hub.take_seen(), []);
}

#[tokio::test]
async fn a_hub_out_of_reach_is_an_error_or_the_cache() {
    let mut world = World::new();
    let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    world.hub.stop();
    let error = Snapshot::open(&model(), &world.settings, &silent).await.unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");

    // With all weights here, the hub is not needed.
    for (name, bytes) in model_files().into_iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        std::fs::write(snapshot.folder().join(name), bytes).unwrap();
    }
    for text in [REPO.to_owned(), snapshot.model().to_string()] {
        let cached = Snapshot::open(&ModelRef::parse(&text).unwrap(), &world.settings, &silent).await.unwrap();
        assert_eq!(cached.weight_index().await.unwrap().tensors.len(), 2);
    }
}

#[tokio::test]
async fn a_folder_needs_no_hub() {
    let folder = tempfile::tempdir().unwrap();
    let settings = HubSettings::new("http://127.0.0.1:1", folder.path());
    let model = ModelRef::parse(folder.path().to_str().unwrap()).unwrap();
    let message = Snapshot::open(&model, &settings, &silent).await.unwrap_err().to_string();
    assert!(message.contains("config.json is missing"), "{message}");
    for (name, bytes) in model_files() {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    let snapshot = Snapshot::open(&model, &settings, &silent).await.unwrap();
    assert_eq!(snapshot.weight_index().await.unwrap().tensors.len(), 2);
    snapshot.fetch_weights(&[FIRST.to_owned()], &silent).await.unwrap();
    std::fs::write(folder.path().join(FIRST), b"short").unwrap();
    assert!(snapshot.fetch_weights(&[FIRST.to_owned()], &silent).await.unwrap_err().to_string().contains("too few"));
    std::fs::remove_file(folder.path().join(FIRST)).unwrap();
    assert!(snapshot.fetch_weights(&[FIRST.to_owned()], &silent).await.unwrap_err().to_string().contains("missing"));
}

#[tokio::test]
async fn a_server_that_is_no_hub_is_recognised() {
    let world = World::new();
    let settings = HubSettings { endpoint: format!("{}/storage", world.hub.endpoint()), ..world.settings.clone() };
    let error = Snapshot::open(&model(), &settings, &silent).await.unwrap_err();
    assert!(matches!(error, HubError::RepoNotFound { .. } | HubError::NotAHub { .. }), "{error}");
    for endpoint in ["not an address", "mailto:a@b"] {
        let settings = HubSettings { endpoint: endpoint.to_owned(), ..world.settings.clone() };
        let message = Snapshot::open(&model(), &settings, &silent).await.unwrap_err().to_string();
        assert!(message.contains(endpoint), "{message}");
    }
}

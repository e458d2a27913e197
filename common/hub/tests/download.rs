//! Fetching weights: resumed, verified, once per machine.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use mlx_cluster_hub::{HubError, Snapshot, fake::Fault};

async fn open(world: &World) -> Snapshot {
    let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
    world.hub.take_seen();
    snapshot
}

fn content(name: &str) -> Vec<u8> {
    model_files().into_iter().find(|(file, _)| *file == name).unwrap().1
}

async fn fetch_first(snapshot: &Snapshot) -> Result<(), HubError> {
    snapshot.fetch_weights(&[FIRST.to_owned()], &silent).await
}

#[tokio::test]
async fn chosen_files_arrive_with_progress() {
    let world = World::new();
    let snapshot = open(&world).await;
    let reports = Reports::default();
    snapshot.fetch_weights(&[FIRST.to_owned(), FIRST.to_owned()], &|progress| reports.add(progress)).await.unwrap();
    assert_eq!(std::fs::read(snapshot.file(FIRST).unwrap()).unwrap(), content(FIRST));
    assert!(snapshot.file(SECOND).is_none());
    let total = content(FIRST).len() as u64;
    let steps = reports.of(FIRST);
    assert!(steps.len() >= 3 && steps.is_sorted() && *steps.last().unwrap() == (total, total), "{steps:?}");

    world.hub.take_seen();
    fetch_first(&snapshot).await.unwrap();
    assert_eq!(world.hub.take_seen(), []);
}

#[tokio::test]
async fn a_worker_attaches_to_the_commit_and_fetches_its_part() {
    let world = World::new();
    let pinned = open(&world).await.model().clone();
    let elsewhere = tempfile::tempdir().unwrap();
    let settings = mlx_cluster_hub::HubSettings { cache_dir: elsewhere.path().to_path_buf(), ..world.settings.clone() };
    let snapshot = Snapshot::attach(&pinned, &settings).await.unwrap();
    assert_eq!(world.hub.take_seen(), []);
    snapshot.fetch_weights(&[SECOND.to_owned()], &silent).await.unwrap();
    assert_eq!(names(snapshot.folder()), [SECOND]);
    assert_eq!(std::fs::read(snapshot.folder().join(SECOND)).unwrap(), content(SECOND));
}

#[tokio::test]
async fn a_broken_connection_is_resumed_at_once() {
    let world = World::new();
    let snapshot = open(&world).await;
    // More breaks than retries: each brings new bytes, so none of them counts as the last straw.
    for _ in 0..4 {
        world.hub.fail_next(FIRST, Fault::CutAfter(500_000));
    }
    world.hub.fail_next(FIRST, Fault::Status(503));
    fetch_first(&snapshot).await.unwrap();
    assert_eq!(std::fs::read(snapshot.file(FIRST).unwrap()).unwrap(), content(FIRST));
    let ranges = world.ranges(FIRST);
    assert_eq!(ranges.len(), 6);
    assert!(ranges[0].is_none() && ranges[1..].iter().all(Option::is_some), "{ranges:?}");
    assert_eq!(ranges[4], ranges[5]);
}

#[tokio::test]
async fn an_interrupted_download_continues_in_the_next_run() {
    let mut world = World::new();
    let snapshot = open(&world).await;
    world.hub.fail_next(FIRST, Fault::CutAfter(1_500_000));
    for _ in 0..world.settings.retries {
        world.hub.fail_next(FIRST, Fault::Status(502));
    }
    let error = fetch_first(&snapshot).await.unwrap_err();
    let kept = std::fs::metadata(world.incomplete()).unwrap().len();
    assert!(matches!(error, HubError::Interrupted { done_bytes, .. } if done_bytes == kept && kept > 0), "{error}");
    assert!(snapshot.file(FIRST).is_none());
    world.hub.take_seen();

    fetch_first(&open(&world).await).await.unwrap();
    assert_eq!(world.ranges(FIRST), [Some(format!("bytes={kept}-"))]);
    assert_eq!(std::fs::read(snapshot.file(FIRST).unwrap()).unwrap(), content(FIRST));

    world.hub.stop();
    let error = snapshot.fetch_weights(&[SECOND.to_owned()], &silent).await.unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn a_hub_without_ranges_starts_over() {
    let world = World::new();
    let snapshot = open(&world).await;
    world.hub.fail_next(FIRST, Fault::CutAfter(700_000));
    world.hub.fail_next(FIRST, Fault::IgnoreRange);
    fetch_first(&snapshot).await.unwrap();
    assert_eq!(std::fs::read(snapshot.file(FIRST).unwrap()).unwrap(), content(FIRST));
}

#[tokio::test]
async fn damaged_bytes_are_thrown_away() {
    let world = World::new();
    let snapshot = open(&world).await;
    world.hub.fail_next(FIRST, Fault::FlipBit);
    let error = fetch_first(&snapshot).await.unwrap_err();
    assert!(matches!(&error, HubError::WrongHash { file, .. } if file == FIRST), "{error}");
    assert!(snapshot.file(FIRST).is_none());
    fetch_first(&snapshot).await.unwrap();
    assert_eq!(world.ranges(FIRST), [None, None]);
}

#[tokio::test]
async fn a_part_that_belongs_to_something_else_is_replaced() {
    for wrong in [vec![7; 1000], vec![7; 9_000_000], vec![7; content(FIRST).len()]] {
        let world = World::new();
        let snapshot = open(&world).await;
        world.hub.fail_next(FIRST, Fault::CutAfter(10));
        for _ in 0..world.settings.retries {
            world.hub.fail_next(FIRST, Fault::Status(500));
        }
        fetch_first(&snapshot).await.unwrap_err();
        std::fs::write(world.incomplete(), wrong).unwrap();
        fetch_first(&snapshot).await.unwrap();
        assert_eq!(std::fs::read(snapshot.file(FIRST).unwrap()).unwrap(), content(FIRST));
    }
}

#[tokio::test]
async fn a_truncated_file_in_the_cache_is_fetched_again() {
    let world = World::new();
    let snapshot = open(&world).await;
    fetch_first(&snapshot).await.unwrap();
    let blob = std::fs::canonicalize(snapshot.file(FIRST).unwrap()).unwrap();
    std::fs::File::options().write(true).open(blob).unwrap().set_len(5000).unwrap();
    fetch_first(&snapshot).await.unwrap();
    assert_eq!(std::fs::read(snapshot.file(FIRST).unwrap()).unwrap(), content(FIRST));
}

#[tokio::test]
async fn two_workers_on_one_machine_fetch_a_file_once() {
    let world = World::new();
    let snapshot = open(&world).await;
    let other = open(&world).await;
    let (one, two) = tokio::join!(fetch_first(&snapshot), fetch_first(&other));
    one.unwrap();
    two.unwrap();
    assert_eq!(world.ranges(FIRST).len(), 1);
}

#[tokio::test]
async fn the_token_goes_to_the_hub_and_nowhere_else() {
    let world = World::with(mlx_cluster_hub::fake::Access::Gated("hf_good"), model_files());
    let settings = mlx_cluster_hub::HubSettings { token: mlx_cluster_hub::Token::new("hf_good"), ..world.settings.clone() };
    let snapshot = Snapshot::open(&model(), &settings, &silent).await.unwrap();
    fetch_first(&snapshot).await.unwrap();
    let seen = world.hub.take_seen();
    for request in seen {
        let expected = (!request.path.starts_with("/storage")).then_some("hf_good");
        assert_eq!(request.token.as_deref(), expected, "{request:?}");
    }
}

#[tokio::test]
async fn names_that_leave_the_folder_are_refused() {
    let world = World::new();
    let snapshot = open(&world).await;
    for file in ["../x.safetensors", "a/b.safetensors", "config.json", ".x.safetensors", ""] {
        let error = snapshot.fetch_weights(&[file.to_owned()], &silent).await.unwrap_err();
        assert!(matches!(error, HubError::BadFileName { .. }), "{error}");
    }
    let error = snapshot.fetch_weights(&["none.safetensors".to_owned()], &silent).await.unwrap_err();
    assert!(matches!(&error, HubError::FileNotInRepo { file, .. } if file == "none.safetensors"), "{error}");
    assert_eq!(world.hub.take_seen().len(), 1);
}

#[test]
fn opening_and_fetching_can_run_on_any_thread() {
    fn is_send<T: Send>(_: &T) {}
    let world = World::new();
    let model = model();
    let task = async {
        let snapshot = Snapshot::open(&model, &world.settings, &silent).await?;
        snapshot.weight_index().await?;
        snapshot.fetch_weights(&[], &silent).await
    };
    is_send(&task);
}

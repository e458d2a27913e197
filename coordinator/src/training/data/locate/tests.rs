//! Data sets of a pretended hub, and what is said where there are none.

use super::*;
use mlx_cluster_hub::{
    HubError,
    fake::{Access, FakeHub},
};
use std::time::Duration;

const BOTH: Wanted = Wanted { train: true, test: true };
const TRAIN: Wanted = Wanted { train: true, test: false };

struct World {
    hub: FakeHub,
    _home: tempfile::TempDir,
    settings: HubSettings,
}

impl World {
    fn new(files: &[&str]) -> Self {
        let hub = FakeHub::start().unwrap();
        // One of them so large that it is not in git.
        let content = |name: &str| if name.starts_with("train") { "x".repeat(40_000) } else { name.to_owned() }.into_bytes();
        hub.add("datasets/demo/data", Access::Public, files.iter().map(|name| (*name, content(name))));
        let home = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            retries: 1,
            retry_delay: Duration::from_millis(1),
            stall_timeout: Duration::from_secs(5),
            ..HubSettings::new(&hub.endpoint(), &home.path().join("hub"))
        };
        Self { hub, _home: home, settings }
    }

    async fn named(&self, wanted: Wanted) -> Result<Located, DataError> {
        let source = DataSource::Named { data: "demo/data".to_owned(), features: Features::default() };
        locate(&source, wanted, &self.settings, &|_| {}).await
    }

    async fn listed(&self, set: HubSet) -> Result<Located, DataError> {
        locate(&DataSource::Listed(vec![set]), BOTH, &self.settings, &|_| {}).await
    }
}

fn hub_set() -> HubSet {
    let path = "demo/data".to_owned();
    let (revision, config_name, test_split) = (None, None, Some("test".to_owned()));
    HubSet { path, revision, config_name, train_split: None, valid_split: None, test_split, features: Features::default() }
}

fn names(split: &Option<Split>) -> Vec<String> {
    let files = split.iter().flat_map(|split| &split.parts).flat_map(|part| &part.pieces).flat_map(|piece| &piece.files);
    files.map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_data_set_is_fetched_once_and_then_cached() {
    let mut world = World::new(&["train.jsonl", "valid.jsonl", "test.jsonl", "README.md"]);
    let first = world.named(BOTH).await.unwrap();
    let train = &first.train.as_ref().unwrap().parts[0];
    assert!(train.columns && train.pieces[0].files[0].starts_with(world.settings.cache_dir.join("datasets--demo--data")));
    assert_eq!(std::fs::metadata(&train.pieces[0].files[0]).unwrap().len(), 40_000);
    assert_eq!(std::fs::read_to_string(&first.valid.as_ref().unwrap().parts[0].pieces[0].files[0]).unwrap(), "valid.jsonl");
    assert_eq!(first.train.as_ref().unwrap().name, "demo/data (train)");
    assert_eq!(world.hub.take_served().len(), 3);

    assert_eq!(world.named(BOTH).await.unwrap(), first);
    assert!(world.hub.take_served().is_empty());
    world.hub.take_seen();
    world.settings.offline = true;
    assert_eq!(world.named(BOTH).await.unwrap(), first);
    assert!(world.hub.take_seen().is_empty());
    world.settings.offline = false;
    world.hub.stop();
    assert_eq!(world.named(BOTH).await.unwrap(), first);
}

#[tokio::test]
async fn only_what_is_wanted_is_fetched() {
    let world = World::new(&["train.jsonl", "test.jsonl"]);
    let located = world.named(TRAIN).await.unwrap();
    assert_eq!((names(&located.train), names(&located.valid), names(&located.test)), (vec!["train.jsonl".to_owned()], vec![], vec![]));
    assert_eq!(located.notes, ["demo/data has no valid.jsonl: training goes on without validation"]);
    assert!(world.hub.take_served().keys().eq(["train.jsonl"]));
}

#[tokio::test]
async fn splits_are_made_of_numbered_files_too() {
    let files = ["train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "train-x-of-y.jsonl", "validation.jsonl", "test.jsonl"];
    let world = World::new(&files);
    let parts = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"];
    let located = world.named(BOTH).await.unwrap();
    assert_eq!((names(&located.train), names(&located.valid)), (parts.map(str::to_owned).to_vec(), vec!["validation.jsonl".to_owned()]));

    let located = world.listed(hub_set()).await.unwrap();
    assert_eq!((names(&located.train), names(&located.valid)), (parts.map(str::to_owned).to_vec(), parts.map(str::to_owned).to_vec()));
    assert_eq!(located.train.unwrap().name, "demo/data (train[:80%])");
    let slice = located.valid.unwrap().parts[0].pieces[0].slice.clone().unwrap();
    assert_eq!((slice.from, slice.to, slice.percent), (Some(-10), None, true));

    let set = HubSet { train_split: Some("nowhere[:3]".to_owned()), ..hub_set() };
    let error = world.listed(set).await.unwrap_err().to_string();
    assert!(error.starts_with("demo/data has no JSON lines for the split `nowhere` (looked for nowhere.jsonl"), "{error}");
    let error = world.listed(HubSet { test_split: None, ..hub_set() }).await.unwrap_err().to_string();
    assert!(error.starts_with("the data set demo/data has no test_split"), "{error}");
}

#[tokio::test]
async fn an_entry_is_opened_at_its_revision() {
    let world = World::new(&["train.jsonl", "test.jsonl"]);
    world.listed(hub_set()).await.unwrap();
    let at = |revision: &str| HubSet { revision: Some(revision.to_owned()), ..hub_set() };
    world.listed(at("main")).await.unwrap();
    let error = world.listed(at("v9")).await.unwrap_err().to_string();
    assert!(error.contains("v9"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    let error = world.listed(HubSet { path, ..at("v9") }).await.unwrap_err().to_string();
    assert!(error.contains("is a folder, which has no revisions: leave it out"), "{error}");
}

#[tokio::test]
async fn a_configuration_is_refused() {
    let world = World::new(&["train.jsonl", "test.jsonl"]);
    let error = world.listed(HubSet { config_name: Some("socratic".to_owned()), ..hub_set() }).await.unwrap_err().to_string();
    assert!(error.starts_with("`hf_dataset.config.name` is `socratic`, but of demo/data only JSON lines"), "{error}");
}

#[tokio::test]
async fn several_sets_follow_each_other() {
    let world = World::new(&["train.jsonl", "test.jsonl"]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("train.jsonl"), "{}").unwrap();
    let here = HubSet { path: folder.path().display().to_string(), ..hub_set() };
    let source = DataSource::Listed(vec![hub_set(), here]);
    let located = locate(&source, TRAIN, &world.settings, &|_| {}).await.unwrap();
    assert_eq!(located.train.as_ref().unwrap().parts.len(), 2);
    assert_eq!(names(&located.train), ["train.jsonl", "train.jsonl"]);
    let error = locate(&DataSource::Listed(vec![]), TRAIN, &world.settings, &|_| {}).await.unwrap_err();
    assert!(matches!(error, DataError::NoSource), "{error}");
}

#[tokio::test]
async fn parquet_is_named_with_the_way_out() {
    for file in ["train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"] {
        let world = World::new(&[file, "README.md"]);
        for error in [world.named(TRAIN).await.unwrap_err(), world.listed(hub_set()).await.unwrap_err()] {
            assert!(matches!(&error, DataError::Parquet { example, .. } if example == file), "{error}");
            assert!(error.to_string().contains("convert it to JSON lines"), "{error}");
        }
    }
}

#[tokio::test]
async fn files_in_folders_are_shown_but_not_taken() {
    let world = World::new(&["data/train.jsonl", "README.md"]);
    let error = world.named(TRAIN).await.unwrap_err().to_string();
    assert!(error.contains("it holds README.md, data/train.jsonl): name another split, or convert or copy"), "{error}");
}

#[tokio::test]
async fn sources_that_do_not_exist_are_named() {
    let mut world = World::new(&["test.jsonl"]);
    let error = world.named(TRAIN).await.unwrap_err().to_string();
    assert_eq!(error, "demo/data has no train.jsonl: training needs one example a line in it");
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut errors = Vec::new();
    for data in ["", "demo/other", "./nowhere", file.path().to_str().unwrap()] {
        let source = DataSource::Named { data: data.to_owned(), features: Features::default() };
        errors.push(locate(&source, TRAIN, &world.settings, &|_| {}).await.unwrap_err().to_string());
    }
    assert!(errors[0].starts_with("`data` is empty"), "{}", errors[0]);
    assert!(errors[1].contains("shows no data set `demo/other`"), "{}", errors[1]);
    assert!(errors[2].contains("`./nowhere` is neither a folder here nor a hub repository"), "{}", errors[2]);
    assert!(errors[3].contains("is a file: give the folder"), "{}", errors[3]);

    world.settings.offline = true;
    let error = world.named(TRAIN).await.unwrap_err();
    assert!(matches!(error, DataError::Hub(HubError::Offline { .. })), "{error}");
    world.settings.offline = false;
    world.hub.stop();
    let error = world.named(TRAIN).await.unwrap_err();
    assert!(matches!(error, DataError::Hub(HubError::Unreachable { .. })), "{error}");
}

#[tokio::test]
async fn private_and_gated_sets_need_a_token() {
    let world = World::new(&[]);
    world.hub.add("datasets/demo/data", Access::Gated("hf_good"), [("train.jsonl", b"{}".to_vec())]);
    let error = world.named(TRAIN).await.unwrap_err().to_string();
    assert!(error.contains("accept its licence at") && error.contains("/datasets/demo/data"), "{error}");
    let settings = HubSettings { token: mlx_cluster_hub::Token::new("hf_good"), ..world.settings.clone() };
    let source = DataSource::Named { data: "demo/data".to_owned(), features: Features::default() };
    locate(&source, TRAIN, &settings, &|_| {}).await.unwrap();
}

//! Tensors fetched by ranges into a store of our own, from a hub that misbehaves.
#![allow(clippy::unwrap_used)]

mod common;

use common::{FIRST, SECOND, World, model, silent, weights};
use mlx_cluster_hub::{Batch, Description, HubError, HubErrorKind, ModelRef, ModelStore, Snapshot, fake::Fault};
use std::{collections::BTreeSet, path::PathBuf};

struct Fixture {
    world: World,
    snapshot: Snapshot,
    description: Description,
    store: ModelStore,
}

impl Fixture {
    async fn new() -> Self {
        let world = World::new();
        let snapshot = Snapshot::open(&model(), &world.settings, &silent).await.unwrap();
        let description = snapshot.describe().await.unwrap();
        let ModelRef::Repo(repo) = snapshot.model().clone() else { panic!("a repository") };
        let store = ModelStore::new(&world.home.path().join("models"), &repo).unwrap();
        world.hub.take_served();
        Self { world, snapshot, description, store }
    }

    async fn fetch(&self, tensors: &[&str]) -> Result<(), HubError> {
        let _lock = self.store.lock(std::time::Duration::from_secs(5)).await?;
        let contents = self.store.contents(&self.description, None)?;
        let wanted: BTreeSet<_> = tensors.iter().copied().filter(|name| !contents.tensors.contains_key(*name)).collect();
        for batch in Batch::cut(&self.description, &wanted) {
            let mut writer = self.store.writer(batch)?;
            let file = &self.description.files[&writer.batch().file];
            self.snapshot.ranges().unwrap().fill(&mut writer, file, &|_| ()).await?;
            writer.finish()?;
        }
        let contents = self.store.contents(&self.description, None)?;
        self.store.check_whole_files(&self.description, &contents)
    }

    /// Bytes of the data of a file that the hub has served.
    fn served(&self, file: &str) -> usize {
        self.world.hub.take_served().remove(file).unwrap_or_default().into_iter().map(|range| range.len()).sum()
    }

    fn parts(&self) -> Vec<PathBuf> {
        let paths = std::fs::read_dir(self.store.folder()).unwrap().map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "part")).collect()
    }

    fn holds(&self, tensor: &str) -> bool {
        self.store.contents(&self.description, None).unwrap().tensors.contains_key(tensor)
    }
}

#[tokio::test]
async fn tensors_arrive_as_they_are_and_not_in_the_shared_cache() {
    let it = Fixture::new().await;
    it.fetch(&["a", "b"]).await.unwrap();
    let contents = it.store.contents(&it.description, None).unwrap();
    for (tensor, file, bytes) in [("a", FIRST, weights("a", 700_000)), ("b", SECOND, weights("b", 100))] {
        let (held, slot) = (&contents.tensors[tensor], it.description.slot(tensor).unwrap().1);
        let stored = std::fs::read(&held.path).unwrap();
        assert!(stored[held.offset as usize..][..held.bytes as usize] == bytes[slot.offset as usize..]);
        assert!(held.digest.is_some() && it.snapshot.file(file).is_none());
    }
    assert_eq!((it.served(FIRST), it.parts().len()), (2_800_000, 0));
    it.fetch(&["a", "b"]).await.unwrap();
    assert_eq!(it.served(FIRST), 0);
}

#[tokio::test]
async fn a_hub_that_fails_for_a_while_costs_no_byte_twice() {
    for faults in [
        vec![Fault::Status(429), Fault::Status(503)],
        vec![Fault::CutAfter(1_000_000), Fault::Status(500)],
        vec![Fault::OtherRange, Fault::IgnoreRange],
    ] {
        let it = Fixture::new().await;
        faults.iter().for_each(|fault| it.world.hub.fail_next(FIRST, *fault));
        it.fetch(&["a"]).await.unwrap();
        assert!(it.holds("a") && !it.world.hub.fault_pending(FIRST), "{faults:?}");
        if !faults.contains(&Fault::IgnoreRange) {
            assert_eq!(it.served(FIRST), 2_800_000, "{faults:?}");
        }
    }
}

#[tokio::test]
async fn a_hub_that_keeps_failing_is_named_and_what_came_is_kept() {
    for (fault, words) in
        [(Fault::Status(503), "answers 503"), (Fault::OtherRange, "and sends bytes"), (Fault::IgnoreRange, "honours ranges")]
    {
        let it = Fixture::new().await;
        it.world.hub.fail_next(FIRST, Fault::CutAfter(1_000_000));
        (0..2).for_each(|_| it.world.hub.fail_next(FIRST, fault));
        let error = it.fetch(&["a"]).await.unwrap_err();
        assert!(error.to_string().contains(words) && error.kind() == HubErrorKind::Network, "{error}");
        assert!(!it.holds("a") && it.parts().len() == 1);
        it.world.hub.take_served();
        it.fetch(&["a"]).await.unwrap();
        assert_eq!(it.served(FIRST), 1_800_000, "{fault:?}");
    }
}

#[tokio::test]
async fn a_file_that_changes_under_its_commit_is_an_error_that_says_so() {
    let it = Fixture::new().await;
    it.world.hub.swap(common::REPO, FIRST, weights("a", 700_001));
    let error = it.fetch(&["a"]).await.unwrap_err();
    assert!(matches!(&error, HubError::Changed { file, .. } if file == FIRST) && error.to_string().contains("models remove"), "{error}");
    let it = Fixture::new().await;
    it.world.hub.fail_next(FIRST, Fault::OtherTotal);
    assert!(matches!(it.fetch(&["a"]).await.unwrap_err(), HubError::Changed { .. }));
}

#[tokio::test]
async fn a_whole_file_with_another_hash_is_thrown_away() {
    let it = Fixture::new().await;
    it.world.hub.fail_next(FIRST, Fault::FlipBit);
    let error = it.fetch(&["a"]).await.unwrap_err();
    assert!(matches!(&error, HubError::WrongHash { file, .. } if file == FIRST), "{error}");
    assert!(!it.holds("a"));
    it.fetch(&["a"]).await.unwrap();
    assert!(it.holds("a"));
}

#[tokio::test]
async fn damage_on_the_disk_is_found() {
    let it = Fixture::new().await;
    it.fetch(&["a", "b"]).await.unwrap();
    assert!(it.store.verify(&it.description).unwrap().is_empty());
    let held = it.store.contents(&it.description, None).unwrap().tensors["b"].clone();
    let mut bytes = std::fs::read(&held.path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&held.path, bytes).unwrap();
    assert_eq!(it.store.verify(&it.description).unwrap(), ["b"]);
}

#[tokio::test]
async fn a_disk_that_is_too_small_is_told_before() {
    let it = Fixture::new().await;
    let _lock = it.store.lock(std::time::Duration::ZERO).await.unwrap();
    assert!(matches!(it.store.check_free_space(u64::MAX), Err(HubError::DiskFull { .. })));
    let error = it.store.lock(std::time::Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, HubError::Locked { .. }), "{error}");
}

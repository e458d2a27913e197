//! Batches that are interrupted at any byte of their data and their digests.

use super::*;
use crate::{description::Description, description::WeightFile, store::ModelStore};
use safetensors::{Dtype, tensor::TensorView};
use std::collections::{BTreeMap, BTreeSet};

const FILE: &str = "model-00001-of-00001.safetensors";

/// Some tensors of odd sizes, one of them empty; the published file with them.
fn published() -> (Description, Vec<u8>) {
    let data: Vec<u8> = (0..4000u32).map(|index| (index * 31 % 251) as u8).collect();
    let sizes = [("a", 300), ("b", 0), ("c", 7), ("d", 1200), ("e", 64)];
    let views = sizes.map(|(name, bytes)| (name, TensorView::new(Dtype::U8, vec![bytes], &data[bytes..2 * bytes]).unwrap()));
    let bytes = safetensors::serialize(views, None).unwrap();
    let head_bytes = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let file = WeightFile::new(FILE, bytes[..head_bytes].to_vec(), bytes.len() as u64, None).unwrap();
    (Description { config: Vec::new(), files: BTreeMap::from([(FILE.to_owned(), file)]) }, bytes)
}

fn all(description: &Description) -> Batch {
    let names: BTreeSet<&str> = description.tensors().into_keys().collect();
    Batch::cut(description, &names).remove(0)
}

/// The bytes of the batch from where the writer stands.
fn rest<'a>(writer: &BatchWriter, published: &'a [u8]) -> &'a [u8] {
    let range = writer.batch().next_range(writer.position()).unwrap();
    &published[range.start as usize..range.end as usize]
}

fn store(folder: &Path) -> ModelStore {
    let repo = "a/b@0123456789abcdef0123456789abcdef01234567".parse().unwrap();
    let store = ModelStore::new(folder, &repo).unwrap();
    fs::create_dir_all(store.folder()).unwrap();
    store
}

fn check(store: &ModelStore, description: &Description, published: &[u8]) {
    let contents = store.contents(description, None).unwrap();
    for (name, (_, slot)) in description.tensors() {
        let held = &contents.tensors[name];
        let stored = fs::read(&held.path).unwrap();
        assert_eq!(
            stored[held.offset as usize..][..held.bytes as usize],
            published[slot.offset as usize..][..slot.bytes as usize],
            "{name}"
        );
        assert!(held.digest.is_some(), "{name}");
    }
}

#[test]
fn a_batch_goes_on_wherever_it_was_cut_off() {
    let (description, published) = published();
    let batch = all(&description);
    // Everywhere around the ends of tensors, and here and there inside of them.
    let ends = [0, 300, 307, 1507, batch.bytes()];
    for cut in (0..=batch.bytes()).filter(|cut| cut % 97 == 0 || ends.iter().any(|end| cut.abs_diff(*end) < 2)) {
        let folder = tempfile::tempdir().unwrap();
        let store = store(folder.path());
        let mut writer = store.writer(batch.clone()).unwrap();
        let data = rest(&writer, &published)[..cut as usize].to_vec();
        writer.append_all(&data).unwrap();
        let sealed = writer.sealed_bytes();
        drop(writer);
        let mut writer = store.writer(batch.clone()).unwrap();
        assert_eq!((writer.position(), writer.sealed_bytes()), (cut, sealed), "cut at {cut}");
        if cut < batch.bytes() {
            let data = rest(&writer, &published).to_vec();
            writer.append_all(&data).unwrap();
        }
        assert!(writer.is_complete());
        writer.finish().unwrap();
        check(&store, &description, &published);
    }
}

#[test]
fn digests_that_were_cut_off_or_do_not_agree_count_for_nothing() {
    let (description, published) = published();
    let batch = all(&description);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let mut writer = store.writer(batch.clone()).unwrap();
    let data = rest(&writer, &published).to_vec();
    writer.append_all(&data[..1540]).unwrap();
    let (part, sealed) = (writer.part.clone(), writer.sealed_bytes());
    drop(writer);
    let (bytes, lines) = (fs::read(&part).unwrap(), fs::read(part.with_extension(DIGESTS)).unwrap());
    for kept in 0..=lines.len() {
        fs::write(&part, &bytes).unwrap();
        fs::write(part.with_extension(DIGESTS), &lines[..kept]).unwrap();
        let writer = store.writer(batch.clone()).unwrap();
        assert!(writer.sealed_bytes() <= sealed && writer.position() <= 1540);
    }
    let mut flipped = bytes.clone();
    let at = flipped.len() - 1000;
    flipped[at] ^= 1;
    fs::write(&part, &flipped).unwrap();
    fs::write(part.with_extension(DIGESTS), &lines).unwrap();
    let mut writer = store.writer(batch).unwrap();
    let data = rest(&writer, &published).to_vec();
    writer.append_all(&data).unwrap();
    writer.finish().unwrap();
    check(&store, &description, &published);
}

#[test]
fn what_is_complete_of_a_batch_stays_when_the_rest_is_not_wanted_any_more() {
    let (description, published) = published();
    let batch = all(&description);
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let mut writer = store.writer(batch.clone()).unwrap();
    let data = rest(&writer, &published)[..310].to_vec();
    writer.append_all(&data).unwrap();
    let kept: Vec<_> = batch.tensors[..batch.tensors.len() - writer.remaining().len()].iter().map(|(name, _)| name.as_str()).collect();
    writer.settle().unwrap();
    assert!(store.begun(&description).unwrap().is_empty());
    let contents = store.contents(&description, None).unwrap();
    assert_eq!(contents.tensors.keys().map(String::as_str).collect::<BTreeSet<_>>(), kept.iter().copied().collect());
    let missing = description.tensors().into_keys().filter(|name| !kept.contains(name)).collect();
    for batch in Batch::cut_at(&description, &missing, 100) {
        let mut writer = store.writer(batch).unwrap();
        while !writer.is_complete() {
            let data = writer.batch().next_range(writer.position()).map(|range| &published[range.start as usize..range.end as usize]);
            writer.append_all(data.unwrap_or_default()).unwrap();
        }
        writer.finish().unwrap();
    }
    check(&store, &description, &published);
}

#[test]
fn a_tensor_with_another_digest_begins_anew() {
    let (description, published) = published();
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path());
    let mut writer = store.writer(all(&description)).unwrap();
    let data = rest(&writer, &published).to_vec();
    let first = writer.missing_of_tensor().unwrap() as usize;
    assert_eq!(writer.append(&data).unwrap(), first);
    let damaged = writer.seal(Some(&[7; 32])).unwrap().unwrap_err();
    assert!(damaged.to_string().contains("arrived damaged") && writer.position() == 0);
    writer.append_all(&data).unwrap();
    writer.finish().unwrap();
    check(&store, &description, &published);
}

//! Tensors of one published file that are fetched and kept together: one safetensors file of the store.

use super::Digest;
use crate::{
    description::Description,
    headers::{LENGTH_BYTES, TensorSlot, parse_entries, read_head},
};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use std::{collections::BTreeSet, ops::Range, path::Path};

/// A batch is complete at about this size, unless one tensor alone is larger.
pub(crate) const BATCH_BYTES: u64 = 256 << 20;
/// However small they are.
const BATCH_TENSORS: usize = 4096;
/// The key in a file's metadata that names the published file.
const PUBLISHED: &str = "published";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The published file that holds them.
    pub file: String,
    /// In the order of their data there.
    pub tensors: Vec<(String, TensorSlot)>,
}

impl Batch {
    /// Cuts `wanted` tensors into batches, file by file in the order of their data.
    pub fn cut(description: &Description, wanted: &BTreeSet<&str>) -> Vec<Batch> {
        Self::cut_at(description, wanted, BATCH_BYTES)
    }

    pub(crate) fn cut_at(description: &Description, wanted: &BTreeSet<&str>, batch_bytes: u64) -> Vec<Batch> {
        let mut batches = Vec::new();
        for (file, of) in &description.files {
            let here = of.header.tensors.iter().filter(|(name, _)| wanted.contains(name.as_str()));
            let mut tensors: Vec<_> = here.map(|(name, slot)| (name.clone(), slot.clone())).collect();
            tensors.sort_by(|(a, at_a), (b, at_b)| (at_a.offset, a).cmp(&(at_b.offset, b)));
            let mut batch = Batch { file: file.clone(), tensors: Vec::new() };
            for tensor in tensors {
                let is_full = batch.tensors.len() >= BATCH_TENSORS || batch.bytes() + tensor.1.bytes > batch_bytes;
                if !batch.tensors.is_empty() && is_full {
                    batches.push(std::mem::replace(&mut batch, Batch { file: file.clone(), tensors: Vec::new() }));
                }
                batch.tensors.push(tensor);
            }
            if !batch.tensors.is_empty() {
                batches.push(batch);
            }
        }
        batches
    }

    /// What a file of the store, finished or begun, consists of; None when it has nothing to do with this model.
    pub(super) fn read(path: &Path, description: &Description) -> Option<Batch> {
        let (head, _) = read_head(path).ok()?;
        let json = head.get(LENGTH_BYTES as usize..)?;
        let published = serde_json::from_slice::<serde_json::Value>(json).ok()?;
        let file = published.get("__metadata__")?.get(PUBLISHED)?.as_str()?.to_owned();
        let of = description.files.get(&file)?;
        let names = parse_entries(&file, json).ok()?;
        let tensors = names.into_iter().map(|(name, _)| Some((name.clone(), of.header.tensors.get(&name)?.clone())));
        let batch = Batch { tensors: tensors.collect::<Option<_>>()?, file };
        (batch.head_of(batch.tensors.len(), head.len()) == head).then_some(batch)
    }

    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|(_, slot)| slot.bytes).sum()
    }

    /// The same for the same tensors, on every machine. Begins with `model`, as the names of weight files do.
    pub(crate) fn stem(&self) -> String {
        let mut hash = Sha256::new();
        for name in [&self.file].into_iter().chain(self.tensors.iter().map(|(name, _)| name)) {
            hash.update((name.len() as u64).to_le_bytes());
            hash.update(name);
        }
        format!("model-{}", &hexadecimal(&hash.finalize().into())[..24])
    }

    /// All bytes before the data of the batch's own file.
    pub(crate) fn head(&self) -> Vec<u8> {
        self.head_of(self.tensors.len(), 0)
    }

    /// The head when only the first `count` tensors are there, filled up with spaces to `bytes`, as the format allows.
    pub(super) fn head_of(&self, count: usize, bytes: usize) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), json!({PUBLISHED: self.file}));
        let mut offset = 0;
        for (name, slot) in self.tensors.iter().take(count) {
            let end = offset + slot.bytes;
            header.insert(name.clone(), json!({"dtype": slot.dtype.name(), "shape": slot.shape, "data_offsets": [offset, end]}));
            offset = end;
        }
        let mut json = serde_json::Value::Object(header).to_string().into_bytes();
        let aligned = (json.len() + LENGTH_BYTES as usize).next_multiple_of(8).max(bytes);
        json.resize(aligned - LENGTH_BYTES as usize, b' ');
        [&(json.len() as u64).to_le_bytes()[..], &json].concat()
    }

    /// Which bytes of the published file come next when `position` bytes of the batch are there; as many as lie together.
    pub(crate) fn next_range(&self, position: u64) -> Option<Range<u64>> {
        let mut before = 0;
        let mut range: Option<Range<u64>> = None;
        for (_, slot) in &self.tensors {
            let end = slot.offset + slot.bytes;
            match &mut range {
                Some(range) if range.end == slot.offset => range.end = end,
                Some(_) => break,
                None if position < before + slot.bytes => range = Some(slot.offset + (position - before)..end),
                None => {}
            }
            before += slot.bytes;
        }
        range
    }
}

pub(crate) fn hexadecimal(digest: &Digest) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

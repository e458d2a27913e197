//! Which tensors of a model are here, and where.

use super::{DIGESTS, Digest, WEIGHTS, batch::Batch, files_with, writer::journal_line};
use crate::{
    description::Description,
    error::HubError,
    headers::{TensorHeader, read_header},
};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// A tensor that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub path: PathBuf,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
    /// Where it was noted when the tensor came.
    pub digest: Option<Digest>,
}

/// The tensors of a model that are here and complete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pub tensors: BTreeMap<String, Held>,
    /// Published files that are in the shared cache, whole.
    pub whole_files: Vec<String>,
}

impl Contents {
    pub(super) fn scan(folder: &Path, description: &Description, cached: Option<&Path>) -> Result<Contents, HubError> {
        let mut contents = Contents::default();
        for (file, of) in &description.files {
            let Some(path) = cached.map(|cached| cached.join(file)) else { break };
            if read_header(&path).is_ok_and(|found| found == of.header) {
                contents.add(&path, &of.header, |_| None);
                contents.whole_files.push(file.clone());
            }
        }
        for path in files_with(folder, WEIGHTS) {
            let Some((batch, header)) = Batch::read(&path, description).zip(read_header(&path).ok()) else {
                tracing::warn!(path = %path.display(), "a file of the weight store is damaged or of another model, and is thrown away");
                fs::remove_file(&path).map_err(|source| HubError::Disk { action: "remove", path: path.clone(), source })?;
                continue;
            };
            if !contents.whole_files.contains(&batch.file) {
                let digests = digests(&path.with_extension(DIGESTS), &batch);
                contents.add(&path, &header, |name| digests.get(name).copied());
            }
        }
        Ok(contents)
    }

    /// What one file adds. Of a tensor that is in two files, the first one counts.
    fn add(&mut self, path: &Path, header: &TensorHeader, digest: impl Fn(&str) -> Option<Digest>) {
        for (name, slot) in &header.tensors {
            let held = Held { path: path.to_path_buf(), offset: slot.offset, bytes: slot.bytes, digest: digest(name) };
            self.tensors.entry(name.clone()).or_insert(held);
        }
    }

    /// Adds a batch that was finished just now.
    pub fn add_batch(&mut self, store: &super::ModelStore, batch: &Batch) {
        let path = store.folder().join(format!("{}.{WEIGHTS}", batch.stem()));
        let digests = digests(&path.with_extension(DIGESTS), batch);
        let mut offset = batch.head().len() as u64;
        for (name, slot) in &batch.tensors {
            let held = Held { path: path.clone(), offset, bytes: slot.bytes, digest: digests.get(name.as_str()).copied() };
            self.tensors.entry(name.clone()).or_insert(held);
            offset += slot.bytes;
        }
    }
}

/// What was noted about the tensors of a batch.
fn digests<'a>(path: &Path, batch: &'a Batch) -> BTreeMap<&'a str, Digest> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let noted = text.split_inclusive('\n').zip(&batch.tensors).map_while(|(line, (name, slot))| {
        let digest = digest_of(line)?;
        (journal_line(&digest, slot.bytes, name) == line).then_some((name.as_str(), digest))
    });
    noted.collect()
}

fn digest_of(line: &str) -> Option<Digest> {
    let hex = line.split(' ').next().filter(|hex| hex.len() == 64 && hex.is_ascii())?;
    let mut digest = [0; 32];
    for (byte, at) in digest.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    Some(digest)
}

//! A checkpoint in the making: nothing of it can be seen before all of it is on the disk.

use super::{
    Checkpoint, CheckpointError, CheckpointState, Checkpoints, KEPT, Part, STATE_FILE, SavedTensor, aside,
    read::digest,
    remove,
    state::{Contents, FileDigest},
    tensors::Spool,
};
use crate::training::files::{FileError, Output, attempt, check_free, sync_folder};
use std::{collections::BTreeMap, fs, io::Write, path::Path};

/// For heads of files, folders and the state.
const BESIDE_TENSORS_BYTES: u64 = 1 << 20;

/// Takes tensors in any order. Dropping it leaves nothing behind.
#[derive(Debug)]
pub struct CheckpointWriter {
    place: Checkpoints,
    adapters: Spool,
    /// None: the next optimizer starts anew.
    optimizer: Option<Spool>,
}

impl CheckpointWriter {
    pub(super) fn new(place: Checkpoints, has_optimizer: bool) -> Self {
        let (adapters, optimizer) = (Spool::new(&place.folder), has_optimizer.then(|| Spool::new(&place.folder)));
        Self { place, adapters, optimizer }
    }

    pub fn add(&mut self, tensor: SavedTensor) -> Result<(), CheckpointError> {
        match (tensor.part, &mut self.optimizer) {
            (Part::Adapters, _) => self.adapters.add(tensor),
            (Part::Optimizer, Some(spool)) => spool.add(tensor),
            // The engines send more than this checkpoint is to hold.
            (Part::Optimizer, None) => Ok(()),
        }
    }

    /// Puts the checkpoint into its place, and removes what is older than the one before it. Where that fails, the older ones are as they
    /// were.
    pub fn finish(self, state: CheckpointState) -> Result<Checkpoint, CheckpointError> {
        let Self { place, adapters, optimizer } = self;
        let iteration = state.iteration;
        let bytes = adapters.bytes() + optimizer.as_ref().map_or(0, Spool::bytes) + BESIDE_TENSORS_BYTES;
        let partial = place.partial(iteration);
        let contents = (|| {
            check_free(&place.folder, bytes)?;
            remove(&partial)?;
            attempt("make", &partial, || fs::create_dir(&partial))?;
            let contents = fill(&partial, adapters, optimizer, state)?;
            place.put(iteration)?;
            Ok(contents)
        })();
        let contents = contents.map_err(|error: FileError| {
            if let Err(error) = remove(&partial) {
                tracing::warn!(%error, "what is left of a checkpoint cannot be removed");
            }
            error.of_writing(&place.folder, bytes)
        })?;
        if let Err(error) = place.prune(iteration) {
            tracing::warn!(%error, "old checkpoints cannot be removed");
        }
        Ok(Checkpoint::new(place.of(iteration), contents))
    }
}

fn fill(folder: &Path, adapters: Spool, optimizer: Option<Spool>, state: CheckpointState) -> Result<Contents, FileError> {
    let mut files = BTreeMap::new();
    for (part, spool) in [(Part::Adapters, Some(adapters)), (Part::Optimizer, optimizer)] {
        let Some(spool) = spool else { continue };
        let path = folder.join(part.file());
        let mut output = Output::create(&path)?;
        attempt("write", &path, || Ok(spool.write(&mut output)?))?;
        output.finish()?;
        let FileDigest { bytes, sha256 } = digest(&path)?;
        files.insert(part.file().to_owned(), FileDigest { bytes, sha256 });
    }
    let contents = Contents { state, files };
    let path = folder.join(STATE_FILE);
    let mut output = Output::create(&path)?;
    attempt("write", &path, || output.write_all(&contents.to_json()?))?;
    output.finish()?;
    sync_folder(folder)?;
    Ok(contents)
}

impl Checkpoints {
    /// Moves what was made into its place; one that is there makes room, and comes back when that fails.
    fn put(&self, iteration: u64) -> Result<(), FileError> {
        let (place, partial, replaced) = (self.of(iteration), self.partial(iteration), self.replaced(iteration));
        let is_taken = place.exists();
        if is_taken {
            remove(&replaced)?;
            attempt("rename", &place, || fs::rename(&place, &replaced))?;
        }
        let put = attempt("rename", &partial, || fs::rename(&partial, &place));
        if put.is_err() && is_taken {
            attempt("rename", &replaced, || fs::rename(&replaced, &place))?;
        }
        put?;
        sync_folder(&self.folder)
    }

    /// Keeps the checkpoint of `iteration` and the one before it. Later ones belong to a past that was given up.
    fn prune(&self, iteration: u64) -> Result<(), FileError> {
        let iterations = self.iterations()?;
        let kept: Vec<u64> = iterations.iter().copied().filter(|number| *number <= iteration).take(KEPT).collect();
        for number in iterations.into_iter().filter(|number| !kept.contains(number)) {
            remove(&self.of(number))?;
        }
        for name in self.entries()?.into_iter().filter(|name| aside(name).is_some()) {
            remove(&self.folder.join(name))?;
        }
        sync_folder(&self.folder)
    }
}

//! What this worker holds of a model, shared between who fetches it and who serves it to other workers.

use mlx_cluster_hub::{Contents, Description, HubError, ModelStore, RepoRef};
use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

#[derive(Debug)]
pub(crate) struct LiveModel {
    pub(super) repo: RepoRef,
    pub(super) store: ModelStore,
    pub(super) description: Description,
    /// Of all tensors of the model, in order.
    names: Vec<String>,
    /// The model's folder in the shared cache.
    cached: PathBuf,
    contents: Mutex<Contents>,
    /// Rises as long as something comes, so that others see that waiting is worth it.
    fetched_bytes: AtomicU64,
}

impl LiveModel {
    /// Blocks on the disk.
    pub(super) fn open(repo: RepoRef, store: ModelStore, description: Description, cached: PathBuf) -> Result<Self, HubError> {
        let contents = Mutex::new(store.contents(&description, Some(&cached))?);
        let names = description.tensors().into_keys().map(str::to_owned).collect();
        Ok(Self { repo, store, description, names, cached, contents, fetched_bytes: AtomicU64::new(0) })
    }

    /// Looks at the disk again: somebody else may have changed what is there. Blocks on the disk.
    pub(super) fn look_again(&self) -> Result<(), HubError> {
        let contents = self.store.contents(&self.description, Some(&self.cached))?;
        *self.contents() = contents;
        Ok(())
    }

    pub(super) fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fetched(&self, bytes: u64) {
        self.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes.load(Ordering::Relaxed)
    }

    /// One bit for each tensor of the model in the order of names.
    pub(super) fn bits(&self) -> Vec<u8> {
        let contents = self.contents();
        let mut bits = vec![0u8; self.names.len().div_ceil(8)];
        for (index, name) in self.names.iter().enumerate() {
            if contents.tensors.contains_key(name) {
                bits[index / 8] |= 1 << (index % 8);
            }
        }
        bits
    }

    /// The names that such bits stand for; whatever is beyond the last tensor stands for nothing.
    pub(super) fn names_of(&self, bits: &[u8]) -> BTreeSet<String> {
        let is_set = |index: &usize| bits.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1);
        self.names.iter().enumerate().filter(|(index, _)| is_set(index)).map(|(_, name)| name.clone()).collect()
    }
}

//! Fetches tensors into the store from the hub alone.

use super::{Batch, ModelStore};
use crate::{description::Description, error::HubError, snapshot::Snapshot};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicU64, Ordering},
};

const CONCURRENT_BATCHES: usize = 4;

impl ModelStore {
    /// Fetches those of `wanted` that are not here; `progress` is told bytes here and bytes in all. Returns the bytes of all of them. Needs
    /// the lock.
    ///
    /// # Errors
    /// [`HubError::Offline`] when something is missing and the hub must not be asked.
    pub async fn pull(
        &self,
        snapshot: &Snapshot,
        description: &Description,
        wanted: &BTreeSet<&str>,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<u64, HubError> {
        let mut writers = Vec::new();
        for batch in self.begun(description)? {
            let goes_on = batch.tensors.iter().all(|(name, _)| wanted.contains(name.as_str()));
            let writer = self.writer(batch)?;
            if goes_on { writers.push(writer) } else { writer.settle()? }
        }
        let contents = self.contents(description, Some(snapshot.folder()))?;
        let begun: BTreeSet<_> = writers.iter().flat_map(|writer| &writer.batch().tensors).map(|(name, _)| name.clone()).collect();
        let missing = wanted.iter().copied().filter(|name| !contents.tensors.contains_key(*name) && !begun.contains(*name)).collect();
        for batch in Batch::cut(description, &missing) {
            writers.push(self.writer(batch)?);
        }
        let tensors = description.tensors();
        let total = wanted.iter().filter_map(|name| tensors.get(name)).map(|(_, slot)| slot.bytes).sum();
        let to_come: u64 = writers.iter().map(|writer| writer.batch().bytes() - writer.position()).sum();
        self.check_free_space(to_come)?;
        let done = AtomicU64::new(total - to_come);
        progress(total - to_come, total);
        let running = writers.into_iter().map(|mut writer| {
            let done = &done;
            async move {
                let file = writer.batch().file.clone();
                let (ranges, of) = snapshot.ranges().zip(description.files.get(&file)).ok_or_else(|| snapshot.missing(&file))?;
                let came = |bytes: u64| progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
                ranges.fill(&mut writer, of, &came).await?;
                writer.finish()
            }
        });
        stream::iter(running.collect::<Vec<_>>()).buffer_unordered(CONCURRENT_BATCHES).try_collect::<()>().await?;
        self.check_whole_files(description, &self.contents(description, Some(snapshot.folder()))?)?;
        Ok(total)
    }
}

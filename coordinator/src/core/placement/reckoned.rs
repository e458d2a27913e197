//! What was reckoned about one model before, so that planning again only searches.

use super::layout::Group;
use mlx_cluster_common::cache::CacheOptions;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Belongs to one model. It changes how long a plan takes and never what it is.
#[derive(Default)]
pub struct Reckoned(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// What the groups were reckoned with.
    caches: Option<CacheOptions>,
    /// By shares, and whether only the first rank was asked for.
    groups: BTreeMap<(Vec<u32>, bool), Arc<Group>>,
    /// Shares and layers of groups that cover the model.
    covered: BTreeSet<(Vec<u32>, u32, u32)>,
}

impl fmt::Debug for Reckoned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reckoned").finish_non_exhaustive()
    }
}

impl Reckoned {
    /// Entries are whole or not there, so a panic elsewhere leaves nothing half done.
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was reckoned with other caches.
    pub(super) fn with_caches(&self, caches: CacheOptions) {
        let mut kept = self.kept();
        if kept.caches != Some(caches) {
            kept.groups.clear();
            kept.caches = Some(caches);
        }
    }

    pub(super) fn group(&self, shares: &[u32], first_only: bool) -> Option<Arc<Group>> {
        self.kept().groups.get(&(shares.to_vec(), first_only)).cloned()
    }

    pub(super) fn keep_group(&self, shares: &[u32], first_only: bool, group: &Arc<Group>) {
        self.kept().groups.insert((shares.to_vec(), first_only), Arc::clone(group));
    }

    pub(super) fn is_covered(&self, shares: &[u32], layers: &Range<u32>) -> bool {
        self.kept().covered.contains(&(shares.to_vec(), layers.start, layers.end))
    }

    pub(super) fn keep_covered(&self, shares: &[u32], layers: &Range<u32>) {
        self.kept().covered.insert((shares.to_vec(), layers.start, layers.end));
    }
}

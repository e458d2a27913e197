//! The files of a model: found in a folder, in the Hugging Face cache or on the hub, and checked before anyone uses them.
//!
//! The coordinator opens a [`Snapshot`] (metadata files only), reads the [weight index](Snapshot::weight_index) from the
//! headers, and plans; each worker [attaches](Snapshot::attach) to the same commit and fetches the weight files of its layers.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapter;
mod cache;
mod cached;
mod dataset;
mod description;
mod download;
mod error;
#[cfg(feature = "fake-hub")]
pub mod fake;
mod headers;
mod index;
mod json_file;
mod model_ref;
mod range;
mod remote;
mod settings;
mod shards;
mod snapshot;
mod store;

pub use adapter::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterFileError, AdapterFiles};
pub use cache::free_disk_bytes;
pub use cached::{cached_models, damaged_blobs, remove_cached};
pub use dataset::DatasetRepo;
pub use description::{Description, Descriptions, WeightFile};
pub use error::{HubError, HubErrorKind};
pub use headers::{TensorHeader, TensorSlot, WeightFileError, read_header};
pub use index::{IndexError, WEIGHT_INDEX_FILE, folder_weight_index, partial_weight_index};
pub use json_file::{JsonFileError, read_config, read_json, read_json_if_present};
pub use model_ref::{ModelRef, ModelRefError, RepoKind, RepoRef};
pub use settings::{HubSettings, Token};
pub use shards::{SHARD_BYTES_MAX, Shard, ShardTensor, plan_shards, weight_index_file};
pub use snapshot::Snapshot;
pub use store::{Batch, BatchWriter, Contents, Damaged, Digest, Held, HeldModel, ModelStore, StoreLock, TensorRanges, held_models};

/// How far the transfer of one file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    pub file: &'a str,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Called about once a megabyte for each file, from the task that fetches; must not block. A file that was here already is
/// reported once, as complete.
pub type OnProgress<'a> = &'a (dyn Fn(Progress<'_>) + Send + Sync);

//! Fine-tuning: from a data set to steps of the engines, and what is kept of them.

pub mod checkpoint;
pub mod data;
mod engines;
pub mod events;
pub mod files;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod jobs;
pub mod metrics;
pub mod reports;
pub mod runs;
pub mod store;
pub mod tensorboard;

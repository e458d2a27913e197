//! Fine-tuning: from a data set to steps of the engines, and what is kept of them.

pub mod checkpoint;
pub mod data;
mod engines;
pub mod events;
mod examples;
pub mod files;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod jobs;
pub mod metrics;
mod progress;
pub mod reports;
pub mod runner;
pub mod runs;
pub mod store;
pub mod tensorboard;

//! Fine-tuning: from a data set to steps of the engines.

pub mod data;
mod engines;
pub mod tensorboard;

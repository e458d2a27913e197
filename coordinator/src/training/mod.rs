//! Fine-tuning: from a data set to steps of the engines.

pub mod data;
pub mod tensorboard;

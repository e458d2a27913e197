//! Fine-tuning jobs.

pub mod tensorboard;

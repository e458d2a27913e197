//! Fine-tuning: what a stage does with micro-batches, losses, optimizers, and the random numbers that training draws.

mod batch;
mod load;
pub mod losses;
pub mod optimizers;
pub mod random;
pub mod stage;

pub use load::Source;

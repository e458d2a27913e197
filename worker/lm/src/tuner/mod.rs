//! Fine-tuning: losses, optimizers, and the random numbers that training draws.

pub mod losses;
pub mod optimizers;
pub mod random;

//! Fine-tuning: what a stage does with micro-batches, losses, optimizers, and the random numbers that training draws.

mod batch;
mod buckets;
mod load;
pub mod losses;
pub mod optimizers;
mod pieces;
pub mod random;
pub mod stage;
mod state;

pub use load::Source;
pub use state::Saved;

use crate::error::LmError;
use mlx_rs::memory;

/// Frees MLX's spare buffers when they hold more than `threshold` bytes; gives the most bytes that were in use so far.
pub fn tidy(threshold: u64) -> Result<u64, LmError> {
    if memory::cache_memory()? as u64 > threshold {
        memory::clear_cache()?;
    }
    Ok(memory::peak_memory()? as u64)
}

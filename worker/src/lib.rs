//! What one Mac does for the cluster: a supervisor that never touches MLX, and engines that each hold one shard.

pub mod engine;
mod kernels;
pub mod supervisor;

//! The maths of one shard: weights, blocks, caches, sampling on MLX. Knows nothing of processes, networks or the cluster.

pub mod activations;
pub mod adapter;
pub mod blocks;
pub mod cache;
pub mod compiled;
mod entries;
pub mod error;
pub mod ffi;
pub mod fuse;
pub mod group;
pub mod linear;
pub mod packing;
pub mod parameters;
pub mod probe;
pub mod rope;
pub mod sample;
mod sequences;
pub mod served;
pub mod shard;
mod stack;
pub mod tuner;
pub mod weights;

pub use error::LmError;
pub use mlx_rs::Array;

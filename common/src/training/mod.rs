//! The nouns of fine-tuning: what is trained, by which optimizer, on which schedule, spread how over engines.

pub mod adapter;
pub mod batch;
pub mod fine_tune;
pub mod fuse;
pub mod matrices;
pub mod optimizer;
pub mod role;
pub mod schedule;

pub use adapter::{Adapter, AdapterConfig, AdapterError, Change};
pub use batch::{MicroBatch, Row};
pub use fine_tune::{FineTune, LoraParameters};
pub use fuse::{FuseError, FusePlan};
pub use matrices::{MatrixKind, ModelMatrix};
pub use optimizer::Optimizer;
pub use role::{Parallel, TrainingRole};
pub use schedule::{Decay, Schedule, Warmup};

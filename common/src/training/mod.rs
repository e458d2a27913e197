//! The nouns of fine-tuning: what is trained, by which optimizer, on which schedule, spread how over engines.

pub mod adapter;
pub mod batch;
pub mod config;
pub mod fine_tune;
pub mod fuse;
pub mod matrices;
pub mod modules;
pub mod optimizer;
pub mod plan;
pub mod role;
pub mod schedule;
pub mod strategy;
pub mod trained;

pub use adapter::{Adapter, AdapterConfig, AdapterError, Change};
pub use batch::{MicroBatch, Row};
pub use config::{TrainingConfig, TrainingConfigError};
pub use fine_tune::{FineTune, LoraParameters};
pub use fuse::{FuseError, FusePlan};
pub use matrices::{MatrixKind, ModelMatrix};
pub use modules::{Module, ModuleShape, TrainedError};
pub use optimizer::Optimizer;
pub use plan::{MICRO_TOKENS_MIN, PIECE_TOKENS_MIN, TrainingPlan};
pub use role::{Parallel, TrainingRole};
pub use schedule::{Decay, Schedule, Warmup};
pub use strategy::TrainStrategy;
pub use trained::{Trained, trainable};

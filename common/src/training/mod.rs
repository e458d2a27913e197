//! The nouns of fine-tuning: what is trained, by which optimizer, on which schedule, spread how over engines.

pub mod batch;
pub mod fine_tune;
pub mod optimizer;
pub mod plan;
pub mod role;
pub mod schedule;
pub mod strategy;
pub mod trained;

pub use batch::{MicroBatch, Row};
pub use fine_tune::{FineTune, LoraParameters};
pub use optimizer::Optimizer;
pub use plan::TrainingPlan;
pub use role::{Parallel, TrainingRole};
pub use schedule::{Decay, Schedule, Warmup};
pub use strategy::TrainStrategy;
pub use trained::{Trained, trainable};

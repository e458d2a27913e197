//! What the cluster should do: discovery, membership, placement, admission, the HTTP API and its text.
//!
//! [`core`] decides and is pure; `driver` asks it and carries out what it says; [`discovery`], `links` and `grpc` are the
//! network; [`api`] and [`chat`] face the client, and meet the rest in [`serving`] only.

pub mod adapters;
pub mod api;
pub mod chat;
mod cluster_file;
pub mod core;
pub mod discovery;
mod driver;
#[cfg(test)]
mod driver_tests;
mod error;
#[cfg(test)]
mod fakes;
mod grpc;
mod links;
mod loading;
pub mod model;
mod plan_only;
pub mod report;
mod run;
mod runners;
pub mod serving;
pub mod training;

pub use cluster_file::{ClusterFacts, ClusterFileError, read_cluster_file};
pub use error::{CoordinatorError, ErrorKind};
pub use loading::{LoadAnswer, LoadError, LoadRequest};
pub use plan_only::{PlanNodes, PlanOnlyOptions, plan_only};
pub use run::{CoordinatorOptions, run, run_with};

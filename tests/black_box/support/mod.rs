//! What all black-box tests stand on: processes that never outlive their test, clusters of them, tiny models, HTTP.

mod cluster;
mod http;
mod process;
mod tiny_model;

pub(crate) use cluster::{Cluster, Finished, Setup, demo_model, free_port, run};
pub(crate) use process::{PATIENCE, Process, is_alive, wait_until};
pub(crate) use tiny_model::TinyModel;

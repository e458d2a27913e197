//! The engine process: one shard of one model, fed with steps by its neighbours.
//!
//! `run` reads what it shall be from stdin, loads, and serves. One thread owns every MLX array (`lead` on the first stage, `relay`
//! on the others); tasks around it move messages (`service` and `inbound` take them, `downstream` sends them). The process ends when stdin
//! closes, which is when its worker ends, however that came about.

mod adapters;
pub mod boot;
mod downstream;
mod hops;
mod inbound;
mod lead;
mod load;
mod pace;
mod ranks;
mod relay;
mod run;
mod scheduler;
mod service;
mod tensors;
mod training;
mod watchdog;

pub use run::{probe, run};

use mlx_cluster_common::ids::Epoch;
use mlx_cluster_proto::wire;
use ranks::Join;
use tokio::sync::mpsc;

/// Messages between a task and the thread that owns the arrays; who is slower makes the other wait.
const CHANNEL: usize = 256;

/// What the tasks hand to the thread that owns the arrays.
enum Command {
    /// A new epoch: forget all sequences; outputs go here from now on, and steps to the other ranks of this stage.
    Link {
        epoch: Epoch,
        output: Option<mpsc::Sender<Outgoing>>,
        ranks: Vec<mpsc::Sender<Outgoing>>,
        join: Option<Join>,
    },
    /// To all engines but the lead.
    Step(Box<wire::StepFrame>),
    /// To the lead.
    Open {
        epoch: Epoch,
        deliveries: mpsc::Sender<wire::Delivery>,
    },
    Session(mlx_cluster_common::request::SessionCommand),
    Adapter(adapters::Order),
    Close,
    Result(wire::StepResult),
    /// The epoch cannot go on: the node at fault and what happened.
    Broken {
        epoch: Epoch,
        node: String,
        message: String,
    },
}

/// What the thread hands to the task that sends it on.
enum Outgoing {
    Step(wire::StepFrame),
    Result(wire::StepResult),
}

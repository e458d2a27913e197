//! What a coordinator tells the person who started it, line by line.

use crate::serving::InstanceState;
use mlx_cluster_common::plan::Plan;
use std::{io::Write, sync::Arc};

/// Something worth a line.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// Nobody is here yet, and what to do about it.
    Waiting {
        found: usize,
        wanted: usize,
        cluster: String,
        join_address: String,
    },
    WorkerFound {
        name: String,
        chip: String,
        usable: String,
    },
    Planned(Plan),
    State(InstanceState),
    /// The model answers at this address.
    Ready {
        url: String,
    },
}

/// Takes reports; called from the coordinator's own task, must not block.
pub type Reporter = Arc<dyn Fn(Report) + Send + Sync>;

/// Lines on standard output.
pub fn lines() -> Reporter {
    Arc::new(|report| {
        // A closed pipe is no reason to stop serving.
        drop(writeln!(std::io::stdout().lock(), "{}", line(&report)));
    })
}

/// Nothing.
pub fn quiet() -> Reporter {
    Arc::new(|_| {})
}

fn line(report: &Report) -> String {
    match report {
        Report::Waiting { found, wanted, cluster, join_address } => format!(
            "waiting for workers: {found} of {wanted} found; start `mlx-cluster worker{}` on each machine, with `--join {join_address}` where \
             multicast does not pass",
            if cluster == "default" { String::new() } else { format!(" --cluster {cluster}") }
        ),
        Report::WorkerFound { name, chip, usable } => format!("worker {name}: {chip}, {usable} usable"),
        Report::Planned(plan) => plan.to_string(),
        Report::State(InstanceState::Recovering { cause }) => format!("recovering: {cause}"),
        Report::State(InstanceState::Failed { message }) => format!("failed: {message}"),
        Report::State(state) => state.name().replace('_', " "),
        Report::Ready { url } => format!("ready: {url}"),
    }
}

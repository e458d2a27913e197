//! What the worker tells an engine on stdin, and what the engine answers on stdout, one line each.

use mlx_cluster_common::engine::EngineSpec;
use serde::{Deserialize, Serialize};
use std::{net::SocketAddr, path::PathBuf};

/// The first and only line on stdin. The pipe stays open as long as the worker lives: an engine ends when it closes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Boot {
    pub spec: EngineSpec,
    /// The folder that holds config.json and the weight files, all of them complete.
    pub folder: PathBuf,
    /// Where to serve; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// The worker's name, for messages.
    pub node_name: String,
}

/// A line on the engine's stdout. Everything else it has to say goes to stderr.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootLine {
    Loading {
        done_bytes: u64,
        total_bytes: u64,
    },
    Ready {
        port: u16,
        /// For the collectives of its group; 0, or left out, when it is alone.
        #[serde(default)]
        group_port: u16,
    },
    /// It cannot work and says why; the process ends right after. `hopeless`: starting it again would fail the same way.
    /// `lost`: the worker whose engine it lost, when that is all that was wrong.
    Failed {
        cause: String,
        hopeless: bool,
        #[serde(default)]
        lost: Option<String>,
    },
}

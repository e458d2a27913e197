//! The nouns of mlx-cluster, without clock, disk, network or MLX: what coordinator and workers both speak of.

pub mod architectures;
pub mod cache;
pub mod config;
pub mod dtype;
pub mod engine;
pub mod ids;
pub mod links;
pub mod nearest;
pub mod plan;
pub mod prediction;
pub mod published;
pub mod request;
pub mod sampling;
pub mod spec;
pub mod step;
pub mod tensor;
pub mod training;
pub mod units;
pub mod weights;

/// Nodes work together only when they speak the same version of the wire protocol; raised with every incompatible change.
pub const PROTOCOL_VERSION: u32 = 5;

/// The version of this build, as `--version` prints it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The mDNS service type under which workers and coordinators announce themselves.
pub const MDNS_SERVICE: &str = "_mlx-cluster._tcp.local.";

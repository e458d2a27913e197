//! The wire between nodes: protobuf messages, their conversions to and from the nouns, and the one place where connections are made.

pub mod convert;
mod links;
pub mod net;
mod training;

/// The generated messages, clients and servers.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod wire {
    tonic::include_proto!("mlx_cluster.v1");
}

pub use convert::WireError;

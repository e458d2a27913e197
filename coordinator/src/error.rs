//! Why a coordinator ends, each with its cause and the next step.

use crate::{
    adapters::ServeAdapterError,
    core::{event::ClusterFailure, placement::WhyNot},
    model::ModelError,
    training::store::StoreError,
};
use mlx_cluster_hub::HubErrorKind;
use std::{io, net::SocketAddr};

#[derive(Debug, thiserror::Error)]
pub enum CoordinatorError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Adapter(#[from] ServeAdapterError),
    #[error(transparent)]
    Plan(#[from] WhyNot),
    #[error(transparent)]
    Cluster(ClusterFailure),
    #[error("port {} of {} is in use: stop the program that listens there, or give another one with {flag} {}:PORT", address.port(), address.ip(), address.ip())]
    PortInUse { flag: &'static str, address: SocketAddr },
    #[error("cannot listen on {address}: {source}; give another address with {flag}")]
    Listen { flag: &'static str, address: SocketAddr, source: io::Error },
    #[error(
        "cluster `{cluster}` has a coordinator already, {other}: use that one, stop it, or give this one and its workers another --cluster name"
    )]
    SecondCoordinator { cluster: String, other: String },
    #[error("no worker to plan with: {cause}; start `mlx-cluster worker`, or say with --memory 64GB,24GB what the machines have")]
    NoNodes { cause: String },
    #[error("multicast DNS cannot be used: {0}; say with --memory what the machines have")]
    Mdns(mdns_sd::Error),
    #[error(transparent)]
    Jobs(#[from] StoreError),
    #[error("the HTTP server ended: {0}")]
    Http(io::Error),
    #[error("the service for workers ended: {0}")]
    Grpc(tonic::transport::Error),
    #[error("a task of the coordinator failed: {cause}; please report this")]
    Task { cause: String },
}

/// What an exit status follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    Usage,
    BadFile,
    Network,
    Access,
    Resources,
    Internal,
}

impl CoordinatorError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Model(error) => match error.kind() {
                HubErrorKind::NotFound | HubErrorKind::BadFile => ErrorKind::BadFile,
                HubErrorKind::Network => ErrorKind::Network,
                HubErrorKind::Access => ErrorKind::Access,
                HubErrorKind::Resources => ErrorKind::Resources,
            },
            Self::Adapter(ServeAdapterError::Task { .. }) => ErrorKind::Internal,
            Self::Adapter(_) | Self::Cluster(ClusterFailure::Adapter { .. }) => ErrorKind::BadFile,
            Self::Plan(why) | Self::Cluster(ClusterFailure::DoesNotFit(why)) if why.is_usage() => ErrorKind::Usage,
            Self::Plan(_)
            | Self::Cluster(ClusterFailure::DoesNotFit(_) | ClusterFailure::DoesNotFitBeside { .. } | ClusterFailure::Engine { .. }) => {
                ErrorKind::Resources
            }
            Self::Cluster(_) | Self::PortInUse { .. } | Self::Listen { .. } => ErrorKind::Network,
            Self::SecondCoordinator { .. } | Self::NoNodes { .. } | Self::Mdns(_) => ErrorKind::Network,
            Self::Jobs(_) => ErrorKind::Resources,
            Self::Http(_) | Self::Grpc(_) | Self::Task { .. } => ErrorKind::Internal,
        }
    }
}

impl From<ClusterFailure> for CoordinatorError {
    fn from(failure: ClusterFailure) -> Self {
        match failure {
            ClusterFailure::DoesNotFit(why) => Self::Plan(why),
            failure => Self::Cluster(failure),
        }
    }
}

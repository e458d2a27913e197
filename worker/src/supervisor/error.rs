//! Why a worker does not start, or ends before it is told to.

use super::home::HomeError;
use std::{io, net::SocketAddr};

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error("`{name}` cannot be a worker's name: use up to 40 letters (a-z), digits, `-` and `_`")]
    Name { name: String },
    #[error("`{name}` cannot be a cluster's name: use 1 to 63 characters that can be printed")]
    ClusterName { name: String },
    #[error("cannot listen on {address}: {source}; {}", listen_hint(source))]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot find the program that this is, to start engines with it: {source}")]
    Program { source: io::Error },
    #[error("{part} of the worker ended by itself ({cause}); please report this")]
    EndedEarly { part: &'static str, cause: String },
}

fn listen_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "choose another port with --listen, or port 0 for any that is free",
        io::ErrorKind::AddrNotAvailable => "give --listen an address of this machine, such as 0.0.0.0:0",
        io::ErrorKind::PermissionDenied => "give --listen a port above 1023",
        _ => "check --listen",
    }
}

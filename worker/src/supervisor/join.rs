//! `--join`: tells a coordinator that multicast does not reach where this worker is, until a coordinator holds it.

use super::{
    driver::Observation,
    local::{Local, address_towards},
};
use mlx_cluster_proto::{WireError, net, wire};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

const ATTEMPT_DEADLINE: Duration = Duration::from_secs(10);
/// A coordinator that has heard of us connects within this time, or is asked again.
const HELD_DEADLINE: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Why a coordinator does not know of us.
#[derive(Debug, thiserror::Error)]
enum JoinError {
    #[error(transparent)]
    Connect(#[from] net::ConnectError),
    #[error("the coordinator at {address} refuses: {message}")]
    Refused { address: String, message: String },
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the coordinator at {address} does not answer within {} s", ATTEMPT_DEADLINE.as_secs())]
    TooSlow { address: String },
    #[error("{coordinator} knows of this worker but does not take it: it may have a worker too many, or not reach {addresses}")]
    NotTaken { coordinator: String, addresses: String },
}

/// Joins again whenever no coordinator holds this worker, for as long as the worker runs.
pub(crate) async fn keep_joined(address: String, local: Arc<Local>, mut observed: watch::Receiver<Observation>, stop: CancellationToken) {
    let joining = async {
        let (mut backoff, mut last_reason) = (BACKOFF_MIN, String::new());
        while observed.wait_for(|observation| !observation.held).await.is_ok() {
            match attempt(&address, &local, &mut observed).await {
                Ok(()) => (backoff, last_reason) = (BACKOFF_MIN, String::new()),
                Err(error) => {
                    let reason = error.to_string();
                    if reason != last_reason {
                        tracing::warn!("cannot join: {reason}; trying again until it works");
                        last_reason = reason;
                    }
                    sleep(backoff).await;
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
            }
        }
    };
    // The worker ends, whether or not it was joined.
    let _ = stop.run_until_cancelled(joining).await;
}

/// Ok once a coordinator holds this worker.
async fn attempt(address: &str, local: &Local, observed: &mut watch::Receiver<Observation>) -> Result<(), JoinError> {
    let call = async {
        let addresses = addresses(address, local).await;
        Ok::<_, JoinError>((call(address, local, addresses.clone()).await?, addresses))
    };
    let too_slow = || JoinError::TooSlow { address: address.to_owned() };
    let (coordinator, addresses) = timeout(ATTEMPT_DEADLINE, call).await.map_err(|_| too_slow())??;
    let held = timeout(HELD_DEADLINE, observed.wait_for(|observation| observation.held)).await;
    match held {
        Ok(_) => Ok(()),
        Err(_) => Err(JoinError::NotTaken { coordinator, addresses: addresses.join(", ") }),
    }
}

/// The coordinator's name, once it knows of us.
async fn call(address: &str, local: &Local, addresses: Vec<String>) -> Result<String, JoinError> {
    let channel = net::connect("the coordinator", &[address.to_owned()]).await?;
    let mut client = wire::cluster_client::ClusterClient::new(channel);
    let refused = |status: tonic::Status| JoinError::Refused { address: address.to_owned(), message: status.message().to_owned() };
    let reply = client.join(wire::JoinRequest { hello: Some(local.hello()), addresses }).await.map_err(refused)?;
    let hello = reply.into_inner().hello.ok_or(WireError::Missing("hello"))?;
    hello.check(&local.cluster.0)?;
    Ok(hello.name)
}

/// Ours, best first for this coordinator: one on this machine may use loopback.
async fn addresses(coordinator: &str, local: &Local) -> Vec<String> {
    let proven = address_towards(coordinator).await;
    let mut addresses = local.addresses(proven);
    if let Some(ip) = proven.filter(|ip| ip.is_loopback() && local.listen.ip().is_unspecified()) {
        addresses.insert(0, std::net::SocketAddr::new(ip, local.listen.port()).to_string());
        addresses.dedup();
    }
    addresses
}

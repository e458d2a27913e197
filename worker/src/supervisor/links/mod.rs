//! Measures the ways to the other workers of the cluster: at first sight, when somebody moved, and now and then while engines are idle.
//! `schedule` decides and is pure; one worker takes part in one measurement at a time.

pub(super) mod answer;
mod interface;
#[cfg(any(target_os = "macos", test))]
mod macos;
mod probe;
mod schedule;

use super::{driver::Request, local::Local};
use mlx_cluster_common::{engine::Peer, links::LinkFacts};
use probe::ProbeError;
use schedule::{Next, Outcome, Schedule};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{Semaphore, mpsc, watch},
    time::{Instant, sleep, timeout_at},
};

/// Whether this node's own addresses are other ones is looked at so often.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Of the second and later addresses of a neighbour, when it refuses.
const RETRIES: usize = 3;
const RETRY_AFTER: Duration = Duration::from_millis(20);

/// What decides about measuring.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Situation {
    pub(crate) neighbours: Vec<Peer>,
    /// Engines load or compute.
    pub(crate) is_busy: bool,
}

/// Takes part in measurements on behalf of this node.
pub(crate) struct Surveyor {
    pub(crate) local: Arc<Local>,
    pub(crate) situation: watch::Receiver<Situation>,
    pub(crate) requests: mpsc::Sender<Request>,
    /// One permit: for measuring, or for being measured.
    pub(crate) turn: Arc<Semaphore>,
}

impl Surveyor {
    /// Ends with the driver.
    pub(crate) async fn run(mut self) {
        let started = Instant::now();
        let mut schedule = Schedule::new(self.local.id.clone());
        let (mut addresses, mut told) = (self.local.addresses(None), Vec::new());
        loop {
            let situation = self.situation.borrow_and_update().clone();
            schedule.want(&situation.neighbours, started.elapsed());
            let now = self.local.addresses(None);
            if now != addresses {
                addresses = now;
                schedule.renew_all(started.elapsed());
            }
            let links = schedule.links();
            if links != told {
                told = links.clone();
                if self.requests.send(Request::Links(links)).await.is_err() {
                    return;
                }
            }
            let look = Instant::now() + LOOK_EVERY;
            let until = match schedule.next(started.elapsed(), situation.is_busy) {
                Next::Measure(peer) => {
                    let outcome = self.measure(&peer).await;
                    schedule.take(&peer, outcome, started.elapsed());
                    continue;
                }
                Next::WaitUntil(time) => look.min(started + time),
                Next::Nothing => look,
            };
            if let Ok(Err(_)) = timeout_at(until, self.situation.changed()).await {
                return;
            }
        }
    }

    /// All ways to one neighbour.
    async fn measure(&self, peer: &Peer) -> Outcome {
        // Not waited for: whoever measures this worker would find it taken at the next address.
        let Ok(_turn) = self.turn.try_acquire() else { return Outcome::Refused };
        let mut links = Vec::new();
        for address in &peer.addresses {
            let mut result = probe::probe(self.local.hello(), &peer.name, address).await;
            for _ in 0..RETRIES {
                // It tried to measure between two addresses; nobody lets it now.
                if links.is_empty() || !matches!(result, Err(ProbeError::Refused(_))) {
                    break;
                }
                sleep(RETRY_AFTER).await;
                result = probe::probe(self.local.hello(), &peer.name, address).await;
            }
            match result {
                Ok(figures) => {
                    let exit = interface::towards(address).await;
                    tracing::debug!(neighbour = peer.name, address, ?figures, ?exit, "measured");
                    links.push(LinkFacts {
                        from: self.local.id.clone(),
                        to: peer.node.clone(),
                        interface: exit.interface,
                        medium: exit.medium,
                        address: host(address),
                        round_trip_seconds: figures.round_trip_seconds,
                        bytes_per_second: figures.bytes_per_second,
                    });
                }
                Err(ProbeError::Refused(reason)) => {
                    tracing::debug!(neighbour = peer.name, address, reason, "measured later");
                    return Outcome::Refused;
                }
                Err(error) => tracing::debug!(neighbour = peer.name, address, %error, "this way cannot be measured"),
            }
        }
        match links.is_empty() {
            true => Outcome::Failed,
            false => Outcome::Measured(links),
        }
    }
}

/// Without the port.
fn host(address: &str) -> String {
    match address.parse::<SocketAddr>() {
        Ok(address) => address.ip().to_string(),
        Err(_) => address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned(),
    }
}

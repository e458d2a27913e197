//! Where a job runs: the coordinator that was named or that runs on this machine, else a cluster of one in this process.

use crate::{
    client::Client,
    failure::{Exit, Failure},
    local_cluster::LocalCluster,
    target::{DEFAULT_URL, interrupted},
};
use mlx_cluster_common::cache::CacheOptions;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

/// For the API of a coordinator in this process.
const START_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

pub(crate) struct Place {
    pub(crate) client: Client,
    /// It ends with this process, and so do its jobs.
    pub(crate) local: Option<LocalCluster>,
}

impl Place {
    /// `url` is None where the user named none.
    pub(crate) async fn reach(url: Option<&str>, stop: &CancellationToken) -> anyhow::Result<Self> {
        let client = Client::new(url.unwrap_or(DEFAULT_URL))?;
        match (client.cluster().await, url) {
            (Ok(_), _) => Ok(Self { client, local: None }),
            (Err(cause), Some(_)) => {
                let hint = "start one with `mlx-cluster coordinator`, or leave --coordinator out to use this machine alone";
                Err(Failure::new(Exit::Network, format!("{cause}: {hint}")).into())
            }
            (Err(_), None) => {
                let local = LocalCluster::start(None, None, CacheOptions::default()).await?;
                let mut place = Self { client: Client::new(local.url())?, local: Some(local) };
                match place.answers(stop).await {
                    Ok(()) => Ok(place),
                    Err(error) => Err(place.close().await.err().unwrap_or(error)),
                }
            }
        }
    }

    /// Waits for the coordinator in this process.
    async fn answers(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            match self.client.cluster().await {
                Err(error) if begun.elapsed() > START_MAX => return Err(error),
                Err(_) => {}
                Ok(_) => return Ok(()),
            }
            tokio::select! {
                error = ended(&mut self.local) => return Err(error),
                () = stop.cancelled() => return Err(interrupted()),
                () = sleep(POLL) => {}
            }
        }
    }

    /// Stops what was started.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        match self.local {
            Some(local) => local.stop().await,
            None => Ok(()),
        }
    }
}

/// Resolves when a cluster of one ends although nobody asked it to.
pub(crate) async fn ended(local: &mut Option<LocalCluster>) -> anyhow::Error {
    match local {
        Some(local) => local.ended().await,
        None => std::future::pending().await,
    }
}

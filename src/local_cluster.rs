//! A cluster of one: coordinator and worker as tasks of this process, its engine as a child that cannot outlive it.

use crate::home::home;
use anyhow::Context;
use mlx_cluster_coordinator::CoordinatorOptions;
use mlx_cluster_worker::supervisor::{self, WorkerOptions};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

/// For the engine to come up; nobody else has to be found.
const WORKER_WAIT: Duration = Duration::from_secs(30);
/// Worker and coordinator both promise to end faster.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

pub(crate) struct LocalCluster {
    url: String,
    stop: CancellationToken,
    /// Coordinator and worker; neither ends by itself unless it fails.
    parts: JoinSet<anyhow::Result<()>>,
}

impl LocalCluster {
    /// Starts both parts under a name of their own, on free ports of loopback.
    pub(crate) async fn start(model: &str, context_tokens: Option<u32>) -> anyhow::Result<Self> {
        let cluster = format!("alone-{}", uuid::Uuid::new_v4().simple());
        let [http, listen] = free_addresses().context("no free port on 127.0.0.1")?;
        let home = home()?;
        let coordinator = CoordinatorOptions {
            model: Some(model.to_owned()),
            cluster: cluster.as_str().into(),
            http,
            listen: Some(listen),
            min_workers: 1,
            context_tokens,
            wait_for_workers: WORKER_WAIT,
            home: home.clone(),
            quiet: true,
            ..CoordinatorOptions::default()
        };
        let worker = WorkerOptions {
            cluster: cluster.as_str().into(),
            name: None,
            listen: Some((Ipv4Addr::LOCALHOST, 0).into()),
            join: Some(listen.to_string()),
            memory_limit: None,
            home,
            engine_command: None,
            quiet: true,
        };
        let stop = CancellationToken::new();
        let mut parts = JoinSet::new();
        let (coordinator_stop, worker_stop) = (stop.clone(), stop.clone());
        parts.spawn(async move { Ok(mlx_cluster_coordinator::run(coordinator, coordinator_stop).await?) });
        parts.spawn(async move { Ok(supervisor::run(worker, worker_stop).await?) });
        Ok(Self { url: format!("http://{http}"), stop, parts })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Resolves when a part ends although nobody asked it to, with the reason.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        match self.parts.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Err(panic)) => anyhow::Error::from(panic).context("a part of the cluster broke; please report this"),
            Some(Ok(Ok(()))) | None => anyhow::anyhow!("the cluster ended by itself; please report this"),
        }
    }

    /// Stops both; the first failure of either is returned.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        let all = async {
            let mut result = Ok(());
            while let Some(ended) = self.parts.join_next().await {
                result = result.and(ended.map_err(anyhow::Error::from).flatten());
            }
            result
        };
        timeout(STOP_TIMEOUT, all)
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the cluster did not stop within {} s", STOP_TIMEOUT.as_secs())))
    }
}

/// Two different ones, free now.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let any = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let (one, other) = (any()?, any()?);
    Ok([one.local_addr()?, other.local_addr()?])
}

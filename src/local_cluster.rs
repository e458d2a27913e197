//! A cluster of one: coordinator and worker as tasks of this process, its engine as a child that cannot outlive it.

use crate::home::home;
use anyhow::Context;
use mlx_cluster_common::cache::CacheOptions;
use mlx_cluster_coordinator::CoordinatorOptions;
use mlx_cluster_worker::supervisor::{self, WorkerOptions};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    time::Duration,
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

/// For the engine to come up; nobody else has to be found.
const WORKER_WAIT: Duration = Duration::from_secs(30);
/// Of each part; both promise to end faster when nothing runs.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

pub(crate) struct LocalCluster {
    url: String,
    coordinator: Part,
    worker: Part,
}

/// A task that ends when it is told to, or because it fails.
struct Part {
    stop: CancellationToken,
    /// None once its end was seen.
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

impl LocalCluster {
    /// Starts both parts under a name of their own, on free ports of loopback. Without a model it is idle.
    pub(crate) async fn start(model: Option<&str>, context_tokens: Option<u32>, caches: CacheOptions) -> anyhow::Result<Self> {
        let cluster = format!("alone-{}", uuid::Uuid::new_v4().simple());
        let [http, listen] = free_addresses().context("no free port on 127.0.0.1")?;
        let home = home()?;
        let coordinator = CoordinatorOptions {
            model: model.map(str::to_owned),
            cluster: cluster.as_str().into(),
            http,
            listen: Some(listen),
            context_tokens,
            caches,
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
        Ok(Self {
            url: format!("http://{http}"),
            coordinator: Part::start(|stop| async move { Ok(mlx_cluster_coordinator::run(coordinator, stop).await?) }),
            worker: Part::start(|stop| async move { Ok(supervisor::run(worker, stop).await?) }),
        })
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Resolves when a part ends although nobody asked it to, with the reason.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        let ended = tokio::select! {
            ended = self.coordinator.ended() => ended,
            ended = self.worker.ended() => ended,
        };
        ended.err().unwrap_or_else(|| anyhow::anyhow!("the cluster ended by itself; please report this"))
    }

    /// Stops the coordinator, then the worker; the first failure of either is returned.
    pub(crate) async fn stop(self) -> anyhow::Result<()> {
        let coordinator = self.coordinator.stop().await;
        let worker = self.worker.stop().await;
        coordinator.and(worker)
    }
}

impl Part {
    fn start<F, Fut>(run: F) -> Self
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let stop = CancellationToken::new();
        Self { task: Some(tokio::spawn(run(stop.clone()))), stop }
    }

    async fn ended(&mut self) -> anyhow::Result<()> {
        let Some(task) = &mut self.task else { return std::future::pending().await };
        let ended = task.await;
        self.task = None;
        ended.context("a part of the cluster broke; please report this")?
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        self.stop.cancel();
        if self.task.is_none() {
            return Ok(());
        }
        let late = |_| Err(anyhow::anyhow!("the cluster did not stop within {} s", STOP_TIMEOUT.as_secs()));
        timeout(STOP_TIMEOUT, self.ended()).await.unwrap_or_else(late)
    }
}

/// Two different ones, free now.
fn free_addresses() -> std::io::Result<[SocketAddr; 2]> {
    let any = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let (one, other) = (any()?, any()?);
    Ok([one.local_addr()?, other.local_addr()?])
}

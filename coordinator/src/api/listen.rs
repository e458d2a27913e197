//! The listening side: connections with their limits, and an end that lets open answers finish.

use super::{Api, guard::Guard, router};
use crate::{serving::Serving, training::jobs::Jobs};
use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use std::{io, pin::pin, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

const CONNECTIONS_MAX: usize = 1024;

/// For all headers of a request to arrive; also how long a connection may idle between requests.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(10);

/// Read at once; a request line with its headers may take up to twice as much.
const READ_BYTES_MAX: usize = 32 << 10;

/// Open answers may go on for so long after the shutdown began; a process must be gone 10 s after it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// For the last error events to reach their clients.
const CUT_TIMEOUT: Duration = Duration::from_millis(500);

const METRICS_UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// After an `accept` that failed, such as for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves the API until `shutdown`, then lets open answers finish for a few seconds.
///
/// # Errors
/// When the address of the listener cannot be told, or the figures cannot be set up.
pub async fn serve(listener: TcpListener, serving: Serving, jobs: Jobs, shutdown: CancellationToken) -> io::Result<()> {
    let guard = Guard { loopback: listener.local_addr()?.ip().is_loopback() };
    let api = Arc::new(Api::new(serving, jobs, guard).map_err(io::Error::other)?);
    let app = router(Arc::clone(&api));
    let mut connections = JoinSet::new();
    accept(&listener, &api, &app, &mut connections, &shutdown).await;
    drop(listener);
    api.stopping.cancel();
    let drained = timeout(DRAIN_TIMEOUT, all_ended(&mut connections)).await;
    if drained.is_err() {
        tracing::info!(connections = connections.len(), "open answers are cut off");
        api.cut.cancel();
        // Those that do not end now are aborted when the set is dropped.
        let _ = timeout(CUT_TIMEOUT, all_ended(&mut connections)).await;
    }
    Ok(())
}

enum Next {
    Accepted(io::Result<TcpStream>),
    Ended,
    Upkeep,
    Shutdown,
}

async fn accept(listener: &TcpListener, api: &Api, app: &Router, connections: &mut JoinSet<()>, shutdown: &CancellationToken) {
    let mut upkeep = interval(METRICS_UPKEEP_INTERVAL);
    upkeep.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let next = tokio::select! {
            () = shutdown.cancelled() => Next::Shutdown,
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => Next::Accepted(accepted.map(|(stream, _)| stream)),
            Some(_) = connections.join_next() => Next::Ended,
            _ = upkeep.tick() => Next::Upkeep,
        };
        match next {
            Next::Accepted(Ok(stream)) => {
                connections.spawn(connection(stream, app.clone(), api.stopping.clone()));
            }
            Next::Accepted(Err(error)) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
            Next::Ended => {}
            Next::Upkeep => api.metrics.upkeep(),
            Next::Shutdown => return,
        }
    }
}

async fn connection(stream: TcpStream, app: Router, stopping: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY on a connection");
    }
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS_TIMEOUT).max_buf_size(READ_BYTES_MAX);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app)));
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stopping.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended early");
    }
}

async fn all_ended(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

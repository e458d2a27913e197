//! Answers another worker that measures the way here: an echo for each frame, from a thread, as an engine would.

use super::probe::LARGE_BYTES_LAST;
use futures_util::Stream;
use mlx_cluster_proto::{WireError, wire};
use std::{pin::Pin, sync::Arc, time::Duration};
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Response, Status, Streaming};

/// A message with the largest data, and some.
pub(crate) const FRAME_BYTES_MAX: usize = LARGE_BYTES_LAST + (64 << 10);
const FIRST_FRAME_DEADLINE: Duration = Duration::from_secs(1);
/// Whoever measures needs less, of both.
const DEADLINE: Duration = Duration::from_secs(5);
const FRAMES_MAX: usize = 64;

pub(crate) type Echoes = Pin<Box<dyn Stream<Item = Result<wire::ProbeEcho, Status>> + Send>>;

/// Refuses while this worker measures, or is measured by somebody else: both would come out wrong.
pub(crate) async fn answer(
    mut frames: Streaming<wire::ProbeFrame>,
    cluster: &str,
    turn: &Arc<Semaphore>,
    tasks: &TaskTracker,
) -> Result<Response<Echoes>, Status> {
    let first = match timeout(FIRST_FRAME_DEADLINE, frames.message()).await {
        Ok(first) => first?.ok_or(WireError::Missing("hello"))?,
        Err(_) => return Err(Status::deadline_exceeded("no first frame within 1 s")),
    };
    first.hello.ok_or(WireError::Missing("hello"))?.check(cluster)?;
    let turn = Arc::clone(turn).try_acquire_owned().map_err(|_| Status::resource_exhausted("it measures another way just now"))?;
    let (received, mut thread_in) = mpsc::channel::<wire::ProbeFrame>(1);
    let (echoes, echoed) = mpsc::channel(1);
    // The end of the stream, or its deadline, ends the thread.
    tasks.spawn_blocking(move || {
        let mut is_open = echoes.blocking_send(Ok(wire::ProbeEcho {})).is_ok();
        while let (true, Some(_)) = (is_open, thread_in.blocking_recv()) {
            is_open = echoes.blocking_send(Ok(wire::ProbeEcho {})).is_ok();
        }
        drop(turn);
    });
    tasks.spawn(timeout(DEADLINE, async move {
        for _ in 0..FRAMES_MAX {
            let Ok(Some(frame)) = frames.message().await else { return };
            if received.send(frame).await.is_err() {
                return;
            }
        }
    }));
    Ok(Response::new(Box::pin(ReceiverStream::new(echoed))))
}

//! Serves what this worker holds of a model to other workers, also while its engines run.

use super::{Store, live::LiveModel};
use futures_util::Stream;
use mlx_cluster_hub::{Held, RepoRef};
use mlx_cluster_proto::{WireError, wire};
use sha2::{Digest as _, Sha256};
use std::{io::SeekFrom, pin::Pin, sync::Arc, time::Duration};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status};

/// Streams at the same time, to all workers together. Who comes later waits for [`TURN_DEADLINE`] and is then told to try again.
const STREAMS_MAX: usize = 8;
const TURN_DEADLINE: Duration = Duration::from_secs(10);
/// Who does not take a message for so long is given up.
const SEND_DEADLINE: Duration = Duration::from_secs(30);
const MESSAGE_BYTES: u64 = 1 << 20;
/// Messages on their way to one worker.
const MESSAGES_MAX: usize = 4;

#[derive(Debug)]
pub(crate) struct WeightsService {
    store: Arc<Store>,
    turns: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl WeightsService {
    /// Streams run as `tasks`, and end with `stop`.
    pub(crate) fn new(store: Arc<Store>, tasks: TaskTracker, stop: CancellationToken) -> Self {
        Self { store, turns: Arc::new(Semaphore::new(STREAMS_MAX)), tasks, stop }
    }

    async fn model(&self, model: Option<wire::ModelAt>) -> Result<Option<Arc<LiveModel>>, Status> {
        let model = model.ok_or(WireError::Missing("model"))?;
        let hello = model.hello.ok_or(WireError::Missing("hello"))?;
        hello.check(&self.store.cluster.0)?;
        let repo: Result<RepoRef, _> = format!("{}@{}", model.id, model.commit).parse();
        let repo = repo.map_err(|error| Status::invalid_argument(error.to_string()))?;
        self.store.known(&repo).await.map_err(|error| self.failed(&error.to_string()))
    }

    async fn needed(&self, model: Option<wire::ModelAt>) -> Result<Arc<LiveModel>, Status> {
        let unknown = || Status::not_found(format!("worker {} does not know this model", self.store.worker));
        self.model(model).await?.ok_or_else(unknown)
    }

    fn failed(&self, cause: &str) -> Status {
        Status::internal(format!("worker {}: {cause}", self.store.worker))
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, Status> {
        let busy = || Status::resource_exhausted(format!("worker {} serves {STREAMS_MAX} others already", self.store.worker));
        let turn = timeout(TURN_DEADLINE, Arc::clone(&self.turns).acquire_owned()).await;
        turn.ok().and_then(Result::ok).ok_or_else(busy)
    }

    /// Runs `work`, which sends into the stream that is returned.
    fn stream<T: Send + 'static, F>(&self, turn: OwnedSemaphorePermit, work: impl FnOnce(Outbox<T>) -> F) -> Outgoing<T>
    where
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(MESSAGES_MAX);
        let outbox = Outbox { sender: sender.clone() };
        let work = work(outbox);
        self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(async move {
            if let Err(status) = work.await {
                // Whoever is gone does not ask why.
                let _ = sender.try_send(Err(status));
            }
            drop(turn);
        }));
        Box::pin(ReceiverStream::new(receiver))
    }
}

/// Where the messages of one stream go.
struct Outbox<T> {
    sender: mpsc::Sender<Result<T, Status>>,
}

impl<T> Outbox<T> {
    async fn send(&self, message: T) -> Result<(), Status> {
        let sent = timeout(SEND_DEADLINE, self.sender.send(Ok(message))).await;
        sent.ok().and_then(Result::ok).ok_or_else(|| Status::cancelled("nobody reads this stream"))
    }
}

#[tonic::async_trait]
impl wire::weights_server::Weights for WeightsService {
    type DescribeStream = Outgoing<wire::DescribedFile>;
    type ReadStream = Outgoing<wire::TensorData>;

    async fn inventory(&self, request: Request<wire::ModelAt>) -> Result<Response<wire::HeldTensors>, Status> {
        let model = self.model(Some(request.into_inner())).await?;
        Ok(Response::new(wire::HeldTensors {
            described: model.is_some(),
            held: model.as_ref().map(|model| model.bits()).unwrap_or_default().into(),
            fetched_bytes: model.as_ref().map_or(0, |model| model.fetched_bytes()),
            reaches_hub: !self.store.hub.offline,
        }))
    }

    async fn describe(&self, request: Request<wire::ModelAt>) -> Result<Response<Self::DescribeStream>, Status> {
        let model = self.needed(Some(request.into_inner())).await?;
        let turn = self.turn().await?;
        Ok(Response::new(self.stream(turn, |outbox| async move { describe(&model, &outbox).await })))
    }

    async fn read(&self, request: Request<wire::ReadRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let wire::ReadRequest { model, tensors, position } = request.into_inner();
        let model = self.needed(model).await?;
        let held: Result<Vec<Held>, Status> = {
            let contents = model.contents();
            let held =
                |name: &String| contents.tensors.get(name).cloned().ok_or_else(|| Status::not_found(format!("no tensor `{name}` here")));
            tensors.iter().map(held).collect()
        };
        let (held, turn, worker) = (held?, self.turn().await?, self.store.worker.clone());
        Ok(Response::new(self.stream(turn, move |outbox| async move { read(&held, position, &worker, &outbox).await })))
    }
}

async fn describe(model: &LiveModel, outbox: &Outbox<wire::DescribedFile>) -> Result<(), Status> {
    let config = (super::CONFIG_FILE, &model.description.config, model.description.config.len() as u64, None);
    let files = model.description.files.iter().map(|(name, file)| (name.as_str(), &file.head, file.header.file_bytes, file.etag.clone()));
    for (name, content, file_bytes, etag) in [config].into_iter().chain(files) {
        for content in content.chunks(MESSAGE_BYTES as usize) {
            let content = content.to_vec().into();
            outbox.send(wire::DescribedFile { name: name.to_owned(), content, file_bytes, etag: etag.clone() }).await?;
        }
    }
    Ok(())
}

/// Sends the tensors, the first one from `position` on. Each one's digest is the one that was noted when it came, or that of what is read now.
async fn read(tensors: &[Held], position: u64, worker: &str, outbox: &Outbox<wire::TensorData>) -> Result<(), Status> {
    use wire::tensor_data::Content;
    for (index, held) in tensors.iter().enumerate() {
        let skipped = if index == 0 { position } else { 0 };
        if skipped > held.bytes {
            return Err(Status::out_of_range(format!("the first tensor has {} bytes, {skipped} were to be skipped", held.bytes)));
        }
        let unreadable = |error: std::io::Error| Status::data_loss(format!("worker {worker} cannot read {}: {error}", held.path.display()));
        let mut file = File::open(&held.path).await.map_err(unreadable)?;
        let mut at = if held.digest.is_some() { skipped } else { 0 };
        file.seek(SeekFrom::Start(held.offset + at)).await.map_err(unreadable)?;
        let mut hash = Sha256::new();
        while at < held.bytes {
            let until = if at < skipped { skipped } else { held.bytes };
            let mut data = vec![0; MESSAGE_BYTES.min(until - at) as usize];
            let bytes = data.len() as u64;
            file.read_exact(&mut data).await.map_err(unreadable)?;
            if held.digest.is_none() {
                hash.update(&data);
            }
            if at >= skipped {
                outbox.send(wire::TensorData { content: Some(Content::Data(data.into())) }).await?;
            }
            at += bytes;
        }
        let digest = held.digest.unwrap_or_else(|| hash.finalize().into());
        outbox.send(wire::TensorData { content: Some(Content::Digest(digest.to_vec().into())) }).await?;
    }
    Ok(())
}

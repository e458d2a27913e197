//! The other workers of a plan as sources: what they hold, and how it gets here.

use super::CONFIG_FILE;
use mlx_cluster_common::engine::WeightPeer;
use mlx_cluster_hub::{BatchWriter, Description, Digest, HubError, RepoRef, WeightFile};
use mlx_cluster_proto::{
    net,
    wire::{self, Hello, tensor_data::Content, weights_client::WeightsClient},
};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::timeout;
use tonic::{Status, Streaming, transport::Channel};

/// For an answer, and for the next message of a stream.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
const MESSAGE_DEADLINE: Duration = Duration::from_secs(40);
/// Heads of all weight files of the largest models together.
const DESCRIPTION_BYTES_MAX: usize = 512 << 20;

/// Why a worker did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum PeerError {
    #[error(transparent)]
    Connect(#[from] net::ConnectError),
    #[error("worker {worker}: {}", status.message())]
    Status { worker: String, status: Status },
    #[error("worker {worker} said nothing for {} s", waited.as_secs())]
    Silent { worker: String, waited: Duration },
    #[error("worker {worker}: {cause}")]
    Wrong { worker: String, cause: String },
    /// Of this worker, not of the other one.
    #[error(transparent)]
    Disk(#[from] HubError),
}

/// What a worker holds now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Inventory {
    pub(super) described: bool,
    pub(super) held: Vec<u8>,
    pub(super) fetched_bytes: u64,
    pub(super) reaches_hub: bool,
}

/// One worker, as asked about one model.
#[derive(Debug, Clone)]
pub(super) struct PeerClient {
    pub(super) peer: WeightPeer,
    model: wire::ModelAt,
}

impl PeerClient {
    pub(super) fn new(peer: WeightPeer, hello: Hello, repo: &RepoRef) -> Self {
        let model = wire::ModelAt { hello: Some(hello), id: repo.id(), commit: repo.revision().to_owned() };
        Self { peer, model }
    }

    pub(super) async fn connect(&self) -> Result<WeightsClient<Channel>, PeerError> {
        Ok(WeightsClient::new(net::connect(&self.peer.name, &self.peer.addresses).await?))
    }

    pub(super) async fn inventory(&self, client: &mut WeightsClient<Channel>) -> Result<Inventory, PeerError> {
        let answer = self.within(ANSWER_DEADLINE, client.inventory(self.model.clone())).await?.into_inner();
        let wire::HeldTensors { described, held, fetched_bytes, reaches_hub } = answer;
        Ok(Inventory { described, held: held.into(), fetched_bytes, reaches_hub })
    }

    /// What the model consists of, as the other worker sees it; each head is checked.
    pub(super) async fn describe(&self) -> Result<Description, PeerError> {
        let mut client = self.connect().await?;
        let mut stream = self.within(ANSWER_DEADLINE, client.describe(self.model.clone())).await?.into_inner();
        let mut files: BTreeMap<String, (Vec<u8>, u64, Option<String>)> = BTreeMap::new();
        let mut total = 0;
        while let Some(message) = self.next(&mut stream).await? {
            total += message.content.len();
            if total > DESCRIPTION_BYTES_MAX {
                return Err(self.wrong("it describes a model without end"));
            }
            let (content, bytes, etag) = files.entry(message.name).or_default();
            content.extend_from_slice(&message.content);
            (*bytes, *etag) = (message.file_bytes, message.etag);
        }
        let (config, ..) = files.remove(CONFIG_FILE).ok_or_else(|| self.wrong("it describes a model without config.json"))?;
        let weight_file = |(name, (head, bytes, etag)): (String, (Vec<u8>, u64, Option<String>))| {
            let file = WeightFile::new(&name, head, bytes, etag).map_err(|error| self.wrong(&error.to_string()))?;
            Ok((name, file))
        };
        Ok(Description { config, files: files.into_iter().map(weight_file).collect::<Result<_, PeerError>>()? })
    }

    /// Completes a batch, from where it stands; every tensor is compared with its digest.
    pub(super) async fn fill(&self, writer: &mut BatchWriter, progress: &(dyn Fn(u64) + Send + Sync)) -> Result<(), PeerError> {
        let mut client = self.connect().await?.max_decoding_message_size(net::MESSAGE_BYTES_MAX);
        let tensors = writer.remaining().iter().map(|(name, _)| name.clone()).collect();
        let position = writer.position() - writer.sealed_bytes();
        let request = wire::ReadRequest { model: Some(self.model.clone()), tensors, position };
        let mut stream = self.within(MESSAGE_DEADLINE, client.read(request)).await?.into_inner();
        while !writer.is_complete() {
            let message = self.next(&mut stream).await?.ok_or_else(|| self.wrong("it ended before it had sent all"))?;
            match message.content.ok_or_else(|| self.wrong("it sent an empty message"))? {
                Content::Data(data) => {
                    if writer.append(&data)? != data.len() {
                        return Err(self.wrong("it sent more than belongs to a tensor"));
                    }
                    progress(data.len() as u64);
                }
                Content::Digest(digest) => {
                    let digest = Digest::try_from(&digest[..]).map_err(|_| self.wrong("it sent a digest that is none"))?;
                    if writer.missing_of_tensor() != Some(0) {
                        return Err(self.wrong("it sent less than a tensor"));
                    }
                    let sealed = writer.seal(Some(&digest))?;
                    sealed.map_err(|damaged| self.wrong(&damaged.to_string()))?;
                }
            }
        }
        Ok(())
    }

    async fn within<T>(&self, deadline: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, PeerError> {
        match timeout(deadline, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(status)) => Err(PeerError::Status { worker: self.peer.name.clone(), status }),
            Err(_) => Err(PeerError::Silent { worker: self.peer.name.clone(), waited: deadline }),
        }
    }

    async fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, PeerError> {
        self.within(MESSAGE_DEADLINE, stream.message()).await
    }

    fn wrong(&self, cause: &str) -> PeerError {
        PeerError::Wrong { worker: self.peer.name.clone(), cause: cause.to_owned() }
    }
}

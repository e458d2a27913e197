//! Gives one engine its part of an adapter, or tells it to drop one.

use crate::{
    adapters::OpenAdapter,
    core::{
        adapters::{ADAPTER_TIMEOUT, AdapterFailure},
        event::{EngineAt, Event},
        settings::ModelFacts,
    },
};
use mlx_cluster_common::ids::{AdapterId, Epoch};
use mlx_cluster_proto::{
    net,
    wire::{self, adapter_part::Part as Wire, engine_client::EngineClient},
};
use std::{ops::Range, sync::Arc};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

/// Of a tensor in one message.
const PIECE_BYTES: u64 = 1 << 20;
/// Messages that are read ahead of the network.
const PIECES_AHEAD: usize = 4;

pub(crate) struct LoadCall {
    pub(crate) epoch: Epoch,
    pub(crate) engine: EngineAt,
    pub(crate) layers: Range<u32>,
    pub(crate) id: AdapterId,
    pub(crate) adapter: Arc<OpenAdapter>,
    pub(crate) model: Arc<ModelFacts>,
}

impl LoadCall {
    pub(super) async fn run(self) -> Event {
        let (epoch, engine, adapter) = (self.epoch, self.engine.number, self.id);
        let late = || AdapterFailure::Unreachable(format!("it did not load an adapter within {} s", ADAPTER_TIMEOUT.as_secs()));
        let result = tokio::time::timeout(ADAPTER_TIMEOUT, self.call()).await.unwrap_or_else(|_| Err(late()));
        Event::AdapterLoaded { epoch, engine, adapter, result }
    }

    async fn call(self) -> Result<(), AdapterFailure> {
        let mut client = connect(&self.engine).await.map_err(AdapterFailure::Unreachable)?;
        let (parts, stream) = mpsc::channel(PIECES_AHEAD);
        let name = self.engine.name.clone();
        let reading = tokio::task::spawn_blocking(move || self.read(&parts));
        let answer = client.load_adapter(ReceiverStream::new(stream)).await;
        match reading.await {
            Ok(Err(message)) => return Err(AdapterFailure::Unusable(message)),
            Ok(Ok(())) => {}
            Err(error) => return Err(AdapterFailure::Unusable(format!("reading the adapter failed: {error}; please report this"))),
        }
        answer.map(drop).map_err(|status| failure(&name, &status))
    }

    /// Sends everything; ends early when nobody takes it.
    fn read(&self, parts: &mpsc::Sender<wire::AdapterPart>) -> Result<(), String> {
        let (names, bytes) = self.adapter.of_parts(&self.model, &self.model.spec.parts_of(self.layers.clone()));
        let send = |part| parts.blocking_send(wire::AdapterPart { part: Some(part) }).is_ok();
        let head = wire::AdapterHead { epoch: self.epoch.0, adapter: self.id.0, scale: self.adapter.scale, bytes };
        let mut is_taken = send(Wire::Head(head));
        for name in names {
            let mut start = 0;
            while is_taken {
                let piece = self.adapter.read(&name, start, PIECE_BYTES)?;
                if piece.data.is_empty() {
                    break;
                }
                start += piece.data.len() as u64;
                let shape = piece.shape.iter().map(|dim| *dim as u32).collect();
                is_taken =
                    send(Wire::Tensor(wire::Tensor { name: piece.name, dtype: piece.dtype.name().into(), shape, data: piece.data.into() }));
            }
        }
        Ok(())
    }
}

/// What an engine refuses, it refuses for good; anything else may be the network.
fn failure(worker: &str, status: &Status) -> AdapterFailure {
    let message = format!("worker {worker}: {}", status.message());
    match status.code() {
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented => AdapterFailure::Unusable(message),
        _ => AdapterFailure::Unreachable(message),
    }
}

pub(crate) struct DropCall {
    pub(crate) epoch: Epoch,
    pub(crate) engine: EngineAt,
    pub(crate) id: AdapterId,
}

impl DropCall {
    /// Takes as long as requests have the adapter. When the connection is lost, the epoch is over, and with it the adapter.
    pub(super) async fn run(self) -> Event {
        if let Err(message) = self.call().await {
            tracing::debug!(message, worker = self.engine.name, "an adapter was not dropped");
        }
        Event::AdapterDropped { epoch: self.epoch, engine: self.engine.number, adapter: self.id }
    }

    async fn call(&self) -> Result<(), String> {
        let mut client = connect(&self.engine).await?;
        let request = wire::DropAdapterRequest { epoch: self.epoch.0, adapter: self.id.0 };
        client.drop_adapter(request).await.map(drop).map_err(|status| status.message().to_owned())
    }
}

async fn connect(engine: &EngineAt) -> Result<EngineClient<Channel>, String> {
    let name = format!("the engine on {}", engine.name);
    let channel = net::connect(&name, &engine.addresses).await.map_err(|error| error.to_string())?;
    Ok(EngineClient::new(channel))
}

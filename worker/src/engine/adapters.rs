//! Adapters of an engine that serves: received piece by piece, put beside the matrices between two steps, and taken away again.
//!
//! They are no part of the log of steps. That is enough, because nothing is reckoned together with other engines when one is loaded, the
//! coordinator admits a sequence with an adapter only after every engine has it, and it tells engines to drop one only after the lead has said
//! that no sequence of any step has it any more.

use super::inbound::SILENCE_MAX;
use mlx_cluster_common::{
    dtype::DType,
    ids::{AdapterId, Epoch},
};
use mlx_cluster_lm::{
    ffi,
    shard::{AdapterWeights, Shard},
};
use mlx_cluster_proto::wire::{self, adapter_part::Part};
use std::collections::BTreeMap;
use tokio::{sync::oneshot, time::timeout};
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

/// Larger than any low-rank adapter in use, and a bound to what a stream can make an engine keep.
const BYTES_MAX: u64 = 8 << 30;

/// To the thread that owns the arrays.
pub(super) struct Order {
    pub(super) epoch: Epoch,
    pub(super) adapter: AdapterId,
    pub(super) change: Change,
}

pub(super) enum Change {
    /// Answered with the bytes that it takes.
    Load {
        received: Received,
        done: oneshot::Sender<Result<u64, String>>,
    },
    Drop {
        done: oneshot::Sender<()>,
    },
}

/// An adapter's tensors as they came.
pub(super) struct Received {
    scale: f32,
    tensors: BTreeMap<String, Tensor>,
}

struct Tensor {
    dtype: DType,
    shape: Vec<i32>,
    data: Vec<u8>,
}

/// Takes all parts of a stream.
pub(super) async fn receive(mut parts: Streaming<wire::AdapterPart>) -> Result<(Epoch, AdapterId, Received), Status> {
    let Some(Part::Head(head)) = next(&mut parts).await? else {
        return Err(Status::invalid_argument("an adapter starts with its head"));
    };
    if head.bytes > BYTES_MAX || !head.scale.is_finite() {
        return Err(Status::invalid_argument(format!("an adapter of {} bytes with scale {} is refused", head.bytes, head.scale)));
    }
    let mut received = Received { scale: head.scale, tensors: BTreeMap::new() };
    let mut bytes = 0;
    while let Some(part) = next(&mut parts).await? {
        let Part::Tensor(tensor) = part else { return Err(Status::invalid_argument("an adapter has one head")) };
        bytes += tensor.data.len() as u64;
        if bytes > head.bytes {
            return Err(Status::invalid_argument(format!("an adapter of {} bytes came with more", head.bytes)));
        }
        received.add(tensor)?;
    }
    if bytes < head.bytes {
        return Err(Status::invalid_argument(format!("an adapter of {} bytes came with {bytes}", head.bytes)));
    }
    Ok((Epoch(head.epoch), AdapterId(head.adapter), received))
}

async fn next(parts: &mut Streaming<wire::AdapterPart>) -> Result<Option<Part>, Status> {
    let next = timeout(SILENCE_MAX, parts.next()).await;
    let next = next.map_err(|_| Status::deadline_exceeded(format!("no part of an adapter came for {} s", SILENCE_MAX.as_secs())))?;
    next.transpose()?.map(|part| part.part.ok_or_else(|| Status::invalid_argument("an empty part of an adapter"))).transpose()
}

impl Received {
    fn add(&mut self, tensor: wire::Tensor) -> Result<(), Status> {
        if let Some(before) = self.tensors.get_mut(&tensor.name) {
            before.data.extend_from_slice(&tensor.data);
            return Ok(());
        }
        let invalid = || Status::invalid_argument(format!("`{}` is {} {:?}", tensor.name, tensor.dtype, tensor.shape));
        let dtype = DType::from_safetensors(&tensor.dtype).filter(|dtype| dtype.is_float()).ok_or_else(invalid)?;
        let shape: Option<Vec<i32>> = tensor.shape.iter().map(|dim| i32::try_from(*dim).ok()).collect();
        let shape = shape.ok_or_else(invalid)?;
        self.tensors.insert(tensor.name, Tensor { dtype, shape, data: tensor.data.to_vec() });
        Ok(())
    }

    /// Puts it beside the shard's matrices; the bytes that it takes.
    pub(super) fn load_into(self, shard: &mut Shard, adapter: AdapterId) -> Result<u64, String> {
        let array = |(name, tensor): (String, Tensor)| {
            let Tensor { dtype, shape, data } = tensor;
            let array = ffi::array_from_bytes(&data, &shape, dtype);
            let array = array.ok_or_else(|| format!("`{name}` {shape:?} of {dtype} came as {} bytes", data.len()))?;
            Ok((name, array))
        };
        let tensors = self.tensors.into_iter().map(array).collect::<Result<_, String>>()?;
        shard.load_adapter(adapter, AdapterWeights { scale: self.scale, tensors }).map_err(|error| error.to_string())
    }
}

impl Order {
    /// Carries it out at once, for the shard as it is in this epoch.
    pub(super) fn carry_out(self, shard: &mut Shard, epoch: Epoch) {
        let is_over = self.epoch != epoch;
        // Who asked may be gone.
        match self.change {
            // Whoever asked learns that the epoch is over.
            Change::Load { .. } | Change::Drop { .. } if is_over => {}
            Change::Load { received, done } => drop(done.send(received.load_into(shard, self.adapter))),
            Change::Drop { done } => match shard.drop_adapter(self.adapter) {
                Ok(()) => drop(done.send(())),
                Err(error) => tracing::warn!(%error, adapter = self.adapter.0, "an adapter is not dropped"),
            },
        }
    }
}

//! New weight files: which tensor goes to which, their heads, and the index that tells.

use mlx_cluster_common::dtype::DType;
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};

/// As mlx-lm has it: 5 GiB, and larger for a single tensor that is.
pub const SHARD_BYTES_MAX: u64 = 5 << 30;
/// The data starts at a multiple of this, as the safetensors library writes it.
const ALIGNMENT: usize = 8;

/// A tensor that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
}

/// A file that is to be written: its head, then the data of these tensors without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub file: String,
    pub head: Vec<u8>,
    pub tensors: Vec<ShardTensor>,
}

impl ShardTensor {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size()
    }
}

/// Deals tensors into files of up to `max_bytes`, in their order, named as mlx-lm names them.
pub fn plan_shards(tensors: Vec<ShardTensor>, max_bytes: u64) -> Vec<Shard> {
    let mut groups: Vec<(u64, Vec<ShardTensor>)> = Vec::new();
    for tensor in tensors {
        let bytes = tensor.bytes();
        match groups.last_mut() {
            Some((held, group)) if *held + bytes <= max_bytes => {
                *held += bytes;
                group.push(tensor);
            }
            _ => groups.push((bytes, vec![tensor])),
        }
    }
    let count = groups.len();
    let named = |(i, (_, mut tensors)): (usize, (u64, Vec<ShardTensor>))| {
        // The library puts wide types first, and a head has to be in the order of the data.
        tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.name.cmp(&b.name)));
        let file = if count > 1 { format!("model-{:05}-of-{count:05}.safetensors", i + 1) } else { "model.safetensors".into() };
        Shard { file, head: head(&tensors), tensors }
    };
    groups.into_iter().enumerate().map(named).collect()
}

fn head(tensors: &[ShardTensor]) -> Vec<u8> {
    let mut end = 0;
    let entry = |tensor: &ShardTensor| {
        let start = end;
        end += tensor.bytes() as usize;
        let shape = tensor.shape.iter().map(|dim| *dim as usize).collect();
        (tensor.name.clone(), TensorInfo { dtype: safetensors_type(tensor.dtype), shape, data_offsets: (start, end) })
    };
    let entries: Vec<_> = tensors.iter().map(entry).collect();
    let format = HashMap::from([("format".to_owned(), "mlx".to_owned())]);
    // Neither fails: names differ, offsets follow one another, and all of it is JSON.
    let metadata = Metadata::new(Some(format), entries).ok();
    let mut json = metadata.and_then(|metadata| serde_json::to_vec(&metadata).ok()).unwrap_or_default();
    json.resize(json.len().next_multiple_of(ALIGNMENT), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

fn safetensors_type(dtype: DType) -> Dtype {
    match dtype {
        DType::Bool => Dtype::BOOL,
        DType::U8 => Dtype::U8,
        DType::U16 => Dtype::U16,
        DType::U32 => Dtype::U32,
        DType::U64 => Dtype::U64,
        DType::I8 => Dtype::I8,
        DType::I16 => Dtype::I16,
        DType::I32 => Dtype::I32,
        DType::I64 => Dtype::I64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
    }
}

/// The text of [`WEIGHT_INDEX_FILE`](crate::WEIGHT_INDEX_FILE) for tensors with the files that hold them.
pub fn weight_index_file<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a str, u64)>) -> String {
    let (mut total, mut placed) = (0, BTreeMap::new());
    for (name, file, bytes) in tensors {
        total += bytes;
        placed.insert(name, file);
    }
    format!("{:#}\n", json!({"metadata": {"total_size": total}, "weight_map": placed}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::headers::parse_head;

    fn tensor(name: &str, dtype: DType, shape: &[u64]) -> ShardTensor {
        ShardTensor { name: name.into(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn shards_hold_what_fits_and_their_heads_are_valid() {
        let tensors = vec![
            tensor("a", DType::BF16, &[4, 4]),
            tensor("b", DType::F32, &[4]),
            tensor("c", DType::BF16, &[100]),
            tensor("d", DType::U32, &[2]),
        ];
        let shards = plan_shards(tensors.clone(), 64);
        let names: Vec<Vec<&str>> = shards.iter().map(|shard| shard.tensors.iter().map(|tensor| tensor.name.as_str()).collect()).collect();
        assert_eq!(names, [vec!["b", "a"], vec!["c"], vec!["d"]]);
        assert_eq!(shards[1].file, "model-00002-of-00003.safetensors");
        for shard in &shards {
            let data: u64 = shard.tensors.iter().map(ShardTensor::bytes).sum();
            let header = parse_head(&shard.file, &shard.head, shard.head.len() as u64 + data).unwrap();
            let mut offset = shard.head.len() as u64;
            for tensor in &shard.tensors {
                let slot = &header.tensors[&tensor.name];
                assert_eq!((slot.dtype, &slot.shape, slot.offset), (tensor.dtype, &tensor.shape, offset));
                offset += tensor.bytes();
            }
        }
        assert_eq!(plan_shards(tensors, SHARD_BYTES_MAX)[0].file, "model.safetensors");
    }

    #[test]
    fn an_index_places_each_tensor() {
        let text = weight_index_file([("b", "2.safetensors", 8), ("a", "1.safetensors", 4)]);
        let index: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(index, json!({"metadata": {"total_size": 12}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}));
    }
}

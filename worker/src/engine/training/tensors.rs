//! Named arrays to and from the tensors of messages.

use mlx_cluster_common::dtype::DType;
use mlx_cluster_lm::{Array, ffi};
use mlx_cluster_proto::wire;

/// Evaluates the array, and copies it once.
pub(super) fn write(name: &str, array: &Array) -> Result<wire::Tensor, String> {
    let dtype = ffi::from_mlx(array.dtype()).ok_or_else(|| format!("`{name}` is of a complex type"))?;
    let data = ffi::array_to_bytes(array).map_err(|error| error.to_string())?;
    let shape = array.shape().iter().map(|dim| *dim as u32).collect();
    Ok(wire::Tensor { name: name.to_owned(), dtype: dtype.name().into(), shape, data: data.into() })
}

pub(super) fn read(tensor: &wire::Tensor) -> Result<Array, String> {
    let dtype = DType::from_safetensors(&tensor.dtype).ok_or_else(|| format!("`{}` is of type `{}`", tensor.name, tensor.dtype))?;
    let shape: Option<Vec<i32>> = tensor.shape.iter().map(|dim| i32::try_from(*dim).ok()).collect();
    let array = shape.and_then(|shape| ffi::array_from_bytes(&tensor.data, &shape, dtype));
    array.ok_or_else(|| format!("`{}` {dtype} {:?} came as {} bytes", tensor.name, tensor.shape, tensor.data.len()))
}

//! Activations to and from the tensors of a step's frame.

use mlx_cluster_common::dtype::DType;
use mlx_cluster_lm::{Array, activations::Activations, ffi};
use mlx_cluster_proto::wire;

/// Evaluates the activations, and copies them once.
pub(super) fn write(activations: &Activations) -> Result<Vec<wire::Tensor>, String> {
    let tensor = |(tensor, array): (&mlx_cluster_common::spec::CutTensor, &Array)| {
        let data = ffi::array_to_bytes(array).map_err(|error| error.to_string())?;
        let dtype = ffi::from_mlx(array.dtype()).ok_or("activations of a complex type")?;
        let shape = array.shape().iter().map(|dim| *dim as u32).collect();
        Ok(wire::Tensor { name: tensor.name(), dtype: dtype.name().into(), shape, data: data.into() })
    };
    activations.tensors.iter().map(tensor).collect()
}

/// What came is compared with what the shard needs when it is applied.
pub(super) fn read(tensors: Vec<wire::Tensor>) -> Result<Activations, String> {
    let arrays = tensors.into_iter().map(|tensor| {
        let array = read_array(&tensor)?;
        Ok((tensor.name, array))
    });
    Activations::from_named(arrays.collect::<Result<Vec<_>, String>>()?).map_err(|error| error.to_string())
}

fn read_array(tensor: &wire::Tensor) -> Result<Array, String> {
    let dtype = DType::from_safetensors(&tensor.dtype).filter(|dtype| dtype.is_float());
    let dtype = dtype.ok_or_else(|| format!("activations of type `{}`", tensor.dtype))?;
    let shape: Option<Vec<i32>> = tensor.shape.iter().map(|dim| i32::try_from(*dim).ok()).collect();
    let shape = shape.ok_or("activations of an absurd shape")?;
    let (found, size) = (tensor.data.len(), &tensor.shape);
    ffi::array_from_bytes(&tensor.data, &shape, dtype).ok_or_else(|| format!("activations {size:?} of {dtype} came as {found} bytes"))
}

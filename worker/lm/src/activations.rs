//! What goes from one stage to the next with a step.

use crate::{error::LmError, packing::Packing};
use mlx_cluster_common::spec::{CutTensor, ModelSpec};
use mlx_rs::{Array, transforms};
use std::collections::BTreeMap;

/// The tensors that cross a cut, each `[tokens, width]`, rows in the order of the step's tokens.
#[derive(Debug, Clone)]
pub struct Activations {
    pub tensors: BTreeMap<CutTensor, Array>,
}

impl Activations {
    /// Reads tensors by their names on the wire.
    pub fn from_named(tensors: impl IntoIterator<Item = (String, Array)>) -> Result<Self, LmError> {
        let named = tensors.into_iter().map(|(name, array)| {
            let tensor = CutTensor::from_name(&name);
            tensor.map(|tensor| (tensor, array)).ok_or_else(|| LmError::WrongInput {
                wanted: "hidden states and what goes with them".into(),
                found: format!("a tensor `{}`", name.chars().take(40).collect::<String>()),
            })
        });
        Ok(Self { tensors: named.collect::<Result<_, _>>()? })
    }

    /// Compares with what has to cross the cut before layer `cut` for a step of `tokens`.
    pub fn check(&self, spec: &ModelSpec, cut: u32, tokens: i32) -> Result<(), LmError> {
        let wanted: BTreeMap<CutTensor, [i32; 2]> =
            spec.cut_tensors(cut).into_iter().map(|(tensor, width)| (tensor, [tokens, width as i32])).collect();
        let fits = wanted.len() == self.tensors.len()
            && self.tensors.iter().all(|(tensor, array)| wanted.get(tensor).is_some_and(|shape| array.shape() == shape));
        if fits {
            return Ok(());
        }
        let found: Vec<_> = self.tensors.iter().map(|(tensor, array)| (tensor.name(), array.shape())).collect();
        Err(LmError::WrongInput { wanted: format!("{wanted:?}"), found: format!("{found:?}") })
    }

    /// Starts the device on them without waiting for it.
    pub fn start(&self) -> Result<(), LmError> {
        Ok(transforms::async_eval(self.tensors.values())?)
    }

    /// Waits for the device.
    pub fn wait(&self) -> Result<(), LmError> {
        Ok(transforms::eval(self.tensors.values())?)
    }

    pub fn get(&self, tensor: CutTensor) -> Result<&Array, LmError> {
        self.tensors.get(&tensor).ok_or_else(|| LmError::WrongInput { wanted: tensor.name(), found: "nothing of that name".into() })
    }
}

/// `[B, heads, L, dims] -> [tokens, heads · dims]`
pub fn heads_to_rows(y: &Array) -> Result<Array, LmError> {
    let (tokens, width) = (y.dim(0) * y.dim(2), y.dim(1) * y.dim(3));
    Ok(y.transpose_axes(&[0, 2, 1, 3])?.reshape(&[tokens, width])?)
}

/// The other way round.
pub fn rows_to_heads(y: &Array, heads: i32, packing: &Packing) -> Result<Array, LmError> {
    Ok(y.reshape(&[packing.batch, packing.length, heads, -1])?.transpose_axes(&[0, 2, 1, 3])?)
}

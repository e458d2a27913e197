//! What stands before the first layer and after the last one.

use super::norm::Norm;
use crate::{
    error::LmError,
    linear::{Embedding, Linear},
    parameters::{Parameters, parameters},
    served::Adaptable,
    weights::Weights,
};
use mlx_cluster_common::spec::{HeadSpec, LayerInputsSpec, LogitsSpec, ModelSpec, Quantization};
use mlx_rs::{Array, ops};

/// Token ids to the residual stream, and to what some models give each layer besides.
#[derive(Debug, Clone)]
pub struct Entry {
    embedding: Embedding,
    scale: f32,
    layer_inputs: Option<LayerInputs>,
    /// Into the residual streams after the first.
    split: Vec<Linear>,
}
parameters!(Entry: embedding, layer_inputs, split);

impl Entry {
    pub fn load(weights: &mut Weights, spec: &ModelSpec, embedding: Embedding) -> Result<Self, LmError> {
        let quantization = &spec.quantization;
        let layer_inputs = spec.layer_inputs.as_ref().map(|inputs| LayerInputs::load(weights, inputs, quantization)).transpose()?;
        let split = spec.streams.iter().flat_map(|streams| &streams.split).map(|linear| Linear::load(weights, linear, quantization));
        Ok(Self { embedding, scale: spec.embedding_scale, layer_inputs, split: split.collect::<Result<_, _>>()? })
    }

    pub fn makes_layer_inputs(&self) -> bool {
        self.layer_inputs.is_some()
    }

    /// `[B, L] -> [B, L, streams · D]`, and the per-layer inputs `[B, L, layers, dims]` where there are some.
    pub fn forward(&self, ids: &Array) -> Result<(Array, Option<Array>), LmError> {
        let embedded = self.embedding.forward(ids)?;
        let x = scaled(embedded, self.scale)?;
        let layer_inputs = self.layer_inputs.as_ref().map(|inputs| inputs.forward(ids, &x)).transpose()?;
        if self.split.is_empty() {
            return Ok((x, layer_inputs));
        }
        let size = root_mean_square(&x)?;
        let mut streams = vec![x.clone()];
        for linear in &self.split {
            streams.push(as_large_as(&linear.forward(&x)?, &size)?);
        }
        Ok((ops::concatenate(&streams, -1)?, layer_inputs))
    }
}

/// Vectors a token and layer.
#[derive(Debug, Clone)]
struct LayerInputs {
    embedding: Embedding,
    projection: Linear,
    norm: Norm,
    n_ids: i32,
    dims: i32,
    embedding_scale: f32,
    projection_scale: f32,
    scale: f32,
}
parameters!(LayerInputs: embedding, projection, norm);

impl LayerInputs {
    fn load(weights: &mut Weights, spec: &LayerInputsSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self {
            embedding: Embedding::load(weights, &spec.embedding, quantization)?,
            projection: Linear::load(weights, &spec.projection, quantization)?,
            norm: Norm::load(weights, &spec.norm)?,
            n_ids: spec.embedding.vocab_size as i32,
            dims: spec.dims as i32,
            embedding_scale: spec.embedding_scale,
            projection_scale: spec.projection_scale,
            scale: spec.scale,
        })
    }

    fn forward(&self, ids: &Array, x: &Array) -> Result<Array, LmError> {
        let shape = [x.dim(0), x.dim(1), -1, self.dims];
        // Tokens beyond the table (of images and sounds) have the first row.
        let zero = Array::from_int(0).as_dtype(ids.dtype())?;
        let known = ops::select(ops::lt(ids, Array::from_int(self.n_ids))?, ids, zero)?;
        let embedded = scaled(self.embedding.forward(&known)?, self.embedding_scale)?.reshape(&shape)?;
        let projected = scaled(self.projection.forward(x)?, self.projection_scale)?.reshape(&shape)?;
        scaled(ops::add(self.norm.forward(&projected)?, embedded)?, self.scale)
    }
}

/// The residual stream to logits.
#[derive(Debug, Clone)]
pub struct Exit {
    /// Out of the residual streams after the first.
    join: Vec<Linear>,
    norm: Norm,
    head: Head,
    logits: LogitsSpec,
}
parameters!(Exit: join, norm, head);

#[derive(Debug, Clone)]
enum Head {
    Tied(Embedding),
    Linear(Linear),
}

impl Exit {
    /// `embedding` is the table of a tied head.
    pub fn load(weights: &mut Weights, spec: &ModelSpec, embedding: Option<&Embedding>) -> Result<Self, LmError> {
        let quantization = &spec.quantization;
        let head = match (&spec.head, embedding) {
            (HeadSpec::Linear(linear), _) => Head::Linear(Linear::load(weights, linear, quantization)?),
            (HeadSpec::LinearOrTied(linear), _) if weights.has(&format!("{}.weight", linear.path)) => {
                Head::Linear(Linear::load(weights, linear, quantization)?)
            }
            (HeadSpec::Tied | HeadSpec::LinearOrTied(_), Some(embedding)) => Head::Tied(embedding.clone()),
            (HeadSpec::Tied | HeadSpec::LinearOrTied(_), None) => return Err(LmError::NotLoaded { name: spec.embedding.path.clone() }),
        };
        let join = spec.streams.iter().flat_map(|streams| &streams.join).map(|linear| Linear::load(weights, linear, quantization));
        let join = join.collect::<Result<_, _>>()?;
        Ok(Self { join, norm: Norm::load(weights, &spec.final_norm)?, head, logits: spec.logits.clone() })
    }

    /// `[.., streams · D] -> [.., V]`
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
        let hidden = divided(self.norm.forward(&self.joined(x)?)?, self.logits.hidden_divisor)?;
        let logits = match &self.head {
            Head::Tied(embedding) => embedding.as_linear(&hidden)?,
            Head::Linear(linear) => linear.forward(&hidden)?,
        };
        let logits = divided(scaled(logits, self.logits.scale)?, self.logits.divisor)?;
        match self.logits.softcap {
            Some(softcap) => {
                let softcap = Array::from_f32(softcap).as_dtype(logits.dtype())?;
                Ok(ops::multiply(ops::tanh(ops::divide(&logits, &softcap)?)?, &softcap)?)
            }
            None => Ok(logits),
        }
    }

    /// The mean of all streams, each brought back and made as large as the first.
    fn joined(&self, x: &Array) -> Result<Array, LmError> {
        if self.join.is_empty() {
            return Ok(x.clone());
        }
        let streams = x.split_equal(self.join.len() as i32 + 1, -1)?;
        let size = root_mean_square(&streams[0])?;
        let mut all = vec![streams[0].clone()];
        for (linear, stream) in self.join.iter().zip(&streams[1..]) {
            all.push(as_large_as(&linear.forward(stream)?, &size)?);
        }
        Ok(ops::stack(&all, 0)?.mean_axis(0, false)?)
    }
}

/// `[.., D] -> [.., 1]`, the size of a vector.
fn root_mean_square(x: &Array) -> Result<Array, LmError> {
    Ok(ops::sqrt(x.square()?.mean_axis(-1, true)?)?)
}

fn as_large_as(x: &Array, size: &Array) -> Result<Array, LmError> {
    Ok(ops::multiply(x, ops::divide(size, root_mean_square(x)?)?)?)
}

fn scaled(x: Array, scale: f32) -> Result<Array, LmError> {
    if scale == 1.0 {
        return Ok(x);
    }
    Ok(ops::multiply(&x, Array::from_f32(scale).as_dtype(x.dtype())?)?)
}

fn divided(x: Array, divisor: f32) -> Result<Array, LmError> {
    if divisor == 1.0 {
        return Ok(x);
    }
    Ok(ops::divide(&x, Array::from_f32(divisor).as_dtype(x.dtype())?)?)
}

impl Parameters for Head {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Head::Tied(embedding) => embedding.each(visit),
            Head::Linear(linear) => linear.each(visit),
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Head::Tied(embedding) => embedding.each_mut(visit),
            Head::Linear(linear) => linear.each_mut(visit),
        }
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        match self {
            Head::Tied(embedding) => embedding.each_matrix(visit),
            Head::Linear(linear) => linear.each_matrix(visit),
        }
    }
}

//! Matrices with learned entries: linears, embeddings and stacks of experts, dense or quantised.

use crate::{error::LmError, parameters::Parameters, weights::Weights};
use mlx_cluster_common::spec::{EmbeddingSpec, ExpertsSpec, LinearSpec, Quantization, QuantizationScheme};
use mlx_rs::{Array, ops};

/// A matrix `[.., output, input]` as the checkpoint holds it.
#[derive(Debug, Clone)]
pub enum Matrix {
    Dense {
        weight: Array,
    },
    /// Affine groups along the input: `w = scale · q + bias`.
    Quantised {
        weight: Array,
        scales: Array,
        biases: Array,
        scheme: QuantizationScheme,
    },
}

impl Matrix {
    fn load(weights: &mut Weights, path: &str, quantization: &Quantization) -> Result<Self, LmError> {
        let weight = weights.take(&format!("{path}.weight"))?;
        if !weights.has(&format!("{path}.scales")) {
            return Ok(Matrix::Dense { weight });
        }
        let scales = weights.take(&format!("{path}.scales"))?;
        let biases = weights.take(&format!("{path}.biases"))?;
        let scheme = quantization.scheme(path).ok_or_else(|| LmError::NotLoaded { name: format!("quantisation of {path}") })?;
        Ok(Matrix::Quantised { weight, scales, biases, scheme })
    }

    /// `x Wᵀ`.
    fn apply(&self, x: &Array) -> Result<Array, LmError> {
        Ok(match self {
            Matrix::Dense { weight } => ops::matmul(x, weight.t())?,
            Matrix::Quantised { weight, scales, biases, scheme } => {
                ops::quantized_matmul(x, weight, scales, biases, true, scheme.group_size as i32, scheme.bits as i32)?
            }
        })
    }

    /// Rows `indices` as numbers.
    fn rows(&self, indices: &Array) -> Result<Array, LmError> {
        Ok(match self {
            Matrix::Dense { weight } => weight.take_axis(indices, 0)?,
            Matrix::Quantised { weight, scales, biases, scheme } => ops::dequantize(
                weight.take_axis(indices, 0)?,
                scales.take_axis(indices, 0)?,
                &biases.take_axis(indices, 0)?,
                scheme.group_size as i32,
                scheme.bits as i32,
            )?,
        })
    }

    /// For each row of `x` `[.., 1, 1, input]` the matrices `indices` `[.., k]` of a stack: `[.., k, 1, output]`.
    fn gather(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        Ok(match self {
            Matrix::Dense { weight } => ops::gather_mm(x, weight.swap_axes(-1, -2)?, None, indices, sorted)?,
            Matrix::Quantised { weight, scales, biases, scheme } => {
                let (group_size, bits) = (scheme.group_size as i32, scheme.bits as i32);
                ops::gather_qmm(x, weight, scales, biases, None, indices, true, group_size, bits, sorted)?
            }
        })
    }
}

impl Parameters for Matrix {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Matrix::Dense { weight } => visit(weight),
            Matrix::Quantised { weight, scales, biases, .. } => [weight, scales, biases].into_iter().for_each(visit),
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Matrix::Dense { weight } => visit(weight),
            Matrix::Quantised { weight, scales, biases, .. } => [weight, scales, biases].into_iter().for_each(visit),
        }
    }
}

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
}

impl Linear {
    pub fn load(weights: &mut Weights, spec: &LinearSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let matrix = Matrix::load(weights, &spec.path, quantization)?;
        let bias = spec.bias.then(|| weights.take(&format!("{}.bias", spec.path))).transpose()?;
        Ok(Self { matrix, bias })
    }

    /// `[.., input] -> [.., output]`.
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
        Ok(match (&self.matrix, &self.bias) {
            // One fused operation where MLX has it, as mlx-lm does, so that the bits agree.
            (Matrix::Dense { weight }, Some(bias)) => ops::addmm(bias, x, weight.t(), None, None)?,
            (matrix, Some(bias)) => ops::add(matrix.apply(x)?, bias)?,
            (matrix, None) => matrix.apply(x)?,
        })
    }
}

impl Parameters for Linear {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.matrix.each(visit);
        self.bias.iter().for_each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.matrix.each_mut(visit);
        self.bias.iter_mut().for_each(visit);
    }
}

/// Token ids to vectors, and, for a tied head, vectors to logits.
#[derive(Debug, Clone)]
pub struct Embedding {
    matrix: Matrix,
}

impl Embedding {
    pub fn load(weights: &mut Weights, spec: &EmbeddingSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { matrix: Matrix::load(weights, &spec.path, quantization)? })
    }

    /// `[..] -> [.., dims]`.
    pub fn forward(&self, ids: &Array) -> Result<Array, LmError> {
        self.matrix.rows(ids)
    }

    /// `[.., dims] -> [.., vocab_size]`.
    pub fn as_linear(&self, x: &Array) -> Result<Array, LmError> {
        self.matrix.apply(x)
    }
}

impl Parameters for Embedding {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.matrix.each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.matrix.each_mut(visit);
    }
}

/// One linear an expert.
#[derive(Debug, Clone)]
pub struct Experts {
    matrix: Matrix,
}

impl Experts {
    pub fn load(weights: &mut Weights, spec: &ExpertsSpec, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { matrix: Matrix::load(weights, &spec.path, quantization)? })
    }

    /// `x` `[.., 1, 1, input]` (or `[rows, 1, input]` sorted by expert) through the experts `indices`.
    pub fn forward(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        self.matrix.gather(x, indices, sorted)
    }
}

impl Parameters for Experts {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        self.matrix.each(visit);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        self.matrix.each_mut(visit);
    }
}

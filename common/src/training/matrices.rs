//! The modules of a model that adapters change: linears, stacks of experts and embeddings, with the tensors that they are made of.

use crate::{
    dtype::DType,
    spec::{ModelSpec, QuantizationScheme, Weight},
    weights::{Parameter, WeightMap},
};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixKind {
    Linear,
    Experts,
    Embedding,
    /// One matrix a head, which mlx-lm's adapters leave alone.
    HeadLinear,
}

/// A matrix of the model, or a stack of them, `[.., output, input]`; of an embedding `[vocab_size, dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelMatrix<'a> {
    pub path: &'a str,
    pub kind: MatrixKind,
    /// Of the matrix as numbers, quantised or not.
    pub shape: Vec<u64>,
    pub weight: &'a Parameter,
    /// None where the matrix is not quantised.
    pub quantised: Option<Quantised<'a>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Quantised<'a> {
    pub scheme: QuantizationScheme,
    pub scales: &'a Parameter,
    /// None for modes without.
    pub biases: Option<&'a Parameter>,
}

impl ModelMatrix<'_> {
    /// The type of the matrix as numbers, as MLX dequantises it.
    pub fn dtype(&self) -> DType {
        match &self.quantised {
            None => self.weight.dtype,
            Some(quantised) if quantised.scales.dtype.is_float() => quantised.scales.dtype,
            Some(_) => DType::BF16,
        }
    }
}

/// By path. A head that is tied to the embedding is none.
pub fn matrices<'a>(spec: &'a ModelSpec, map: &'a WeightMap) -> BTreeMap<&'a str, ModelMatrix<'a>> {
    let mut modules = BTreeMap::new();
    for part in spec.parts() {
        let parameters: BTreeMap<&str, &Parameter> =
            map.parts.get(&part).into_iter().flatten().map(|parameter| (parameter.name.as_str(), parameter)).collect();
        for weight in spec.weights(part) {
            let (kind, shape) = match weight {
                Weight::Linear(linear) => (MatrixKind::Linear, vec![linear.output_dims, linear.input_dims]),
                Weight::Embedding(embedding) => (MatrixKind::Embedding, vec![embedding.vocab_size, embedding.dims]),
                Weight::Experts(experts) => (MatrixKind::Experts, vec![experts.n_experts, experts.output_dims, experts.input_dims]),
                Weight::HeadLinear(linear) => (MatrixKind::HeadLinear, vec![linear.n_heads, linear.output_dims, linear.input_dims]),
                Weight::Norm(_) | Weight::Convolution(_) | Weight::Tensor(_) => continue,
            };
            let path = weight.path();
            let find = |suffix: &str| parameters.get(format!("{path}.{suffix}").as_str()).copied();
            let Some(weight) = find("weight") else { continue };
            let quantised = find("scales").zip(spec.quantization.scheme(path));
            let quantised = quantised.map(|(scales, scheme)| Quantised { scheme, scales, biases: find("biases") });
            let shape = shape.into_iter().map(u64::from).collect();
            modules.insert(path, ModelMatrix { path, kind, shape, weight, quantised });
        }
    }
    modules
}

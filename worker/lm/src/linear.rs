//! Matrices with learned entries: linears, embeddings, stacks of experts and of heads, dense or quantised.

pub use crate::parameters::Parameters;
use crate::{
    adapter::{LowRank, LowRankStack, LowRankTable},
    error::LmError,
    ffi::{self, Quantised},
    group::{Group, Vocabulary},
    parameters::parameters,
    served::{
        Adaptable, Kind, Site, Stacks,
        rows::{self, Rows},
    },
    weights::Weights,
};
use mlx_cluster_common::spec::{EmbeddingSpec, ExpertsSpec, LinearSpec, Quantization, QuantizationScheme};
use mlx_rs::{Array, ops};

/// A matrix `[.., output, input]` as the checkpoint holds it.
#[derive(Debug, Clone)]
pub enum Matrix {
    Dense {
        weight: Array,
    },
    /// Groups along the input.
    Quantised {
        weight: Array,
        scales: Array,
        /// As the scheme has them.
        biases: Option<Array>,
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
        let scheme = quantization.scheme(path).ok_or_else(|| LmError::NotLoaded { name: format!("quantisation of {path}") })?;
        let biases = scheme.has_biases().then(|| weights.take(&format!("{path}.biases"))).transpose()?;
        Ok(Matrix::Quantised { weight, scales, biases, scheme })
    }

    /// Of weights that go on being used.
    pub(crate) fn of(weights: &Weights, path: &str, quantization: &Quantization) -> Result<Self, LmError> {
        let names = ["weight", "scales", "biases"].map(|name| format!("{path}.{name}"));
        Self::load(&mut weights.only(names.iter().map(String::as_str)), path, quantization)
    }

    /// Of the numbers: `[.., output, input]`.
    pub(crate) fn shape(&self) -> Vec<i32> {
        match self {
            Matrix::Dense { weight } => weight.shape().to_vec(),
            Matrix::Quantised { scales, scheme, .. } => {
                let mut shape = scales.shape().to_vec();
                shape.iter_mut().last().into_iter().for_each(|groups| *groups *= scheme.group_size as i32);
                shape
            }
        }
    }

    /// As numbers, `[.., output, input]`.
    pub(crate) fn dense(&self) -> Result<Array, LmError> {
        match self {
            Matrix::Dense { weight } => Ok(weight.clone()),
            Matrix::Quantised { weight, scales, biases, scheme } => {
                ffi::dequantize(&Quantised { weight, scales, biases: biases.as_ref(), scheme: *scheme })
            }
        }
    }

    /// `x Wᵀ`; `x` `[.., input]`.
    fn apply(&self, x: &Array) -> Result<Array, LmError> {
        match self {
            Matrix::Dense { weight } => Ok(ops::matmul(x, weight.t())?),
            Matrix::Quantised { weight, scales, biases, scheme } => {
                ffi::quantized_matmul(x, &Quantised { weight, scales, biases: biases.as_ref(), scheme: *scheme }, true)
            }
        }
    }

    /// A stack of matrices, each to its own part of `x` `[.., stack, rows, input]`: `x Wᵀ`, or `x W` without `transpose`.
    pub(crate) fn apply_each(&self, x: &Array, transpose: bool) -> Result<Array, LmError> {
        match self {
            Matrix::Dense { weight } if transpose => Ok(ops::matmul(x, weight.swap_axes(-1, -2)?)?),
            Matrix::Dense { weight } => Ok(ops::matmul(x, weight)?),
            Matrix::Quantised { weight, scales, biases, scheme } => {
                ffi::quantized_matmul(x, &Quantised { weight, scales, biases: biases.as_ref(), scheme: *scheme }, transpose)
            }
        }
    }

    /// Rows `indices` as numbers; bfloat16 where the scales are bytes, as in mlx.
    pub(crate) fn rows(&self, indices: &Array) -> Result<Array, LmError> {
        match self {
            Matrix::Dense { weight } => Ok(weight.take_axis(indices, 0)?),
            Matrix::Quantised { weight, scales, biases, scheme } => {
                let biases = biases.as_ref().map(|biases| biases.take_axis(indices, 0)).transpose()?;
                let (weight, scales) = (weight.take_axis(indices, 0)?, scales.take_axis(indices, 0)?);
                ffi::dequantize(&Quantised { weight: &weight, scales: &scales, biases: biases.as_ref(), scheme: *scheme })
            }
        }
    }

    /// For each row of `x` `[.., 1, 1, input]` the matrices `indices` `[.., k]` of a stack: `[.., k, 1, output]`.
    fn gather(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        match self {
            Matrix::Dense { weight } => Ok(ops::gather_mm(x, weight.swap_axes(-1, -2)?, None, indices, sorted)?),
            Matrix::Quantised { weight, scales, biases, scheme } => {
                let stack = Quantised { weight, scales, biases: biases.as_ref(), scheme: *scheme };
                ffi::gather_quantized_matmul(x, &stack, indices, sorted)
            }
        }
    }
}

impl Parameters for Matrix {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Matrix::Dense { weight } => visit(weight),
            Matrix::Quantised { weight, scales, biases, .. } => {
                [weight, scales].into_iter().for_each(&mut *visit);
                biases.each(visit);
            }
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Matrix::Dense { weight } => visit(weight),
            Matrix::Quantised { weight, scales, biases, .. } => {
                [weight, scales].into_iter().for_each(&mut *visit);
                biases.each_mut(visit);
            }
        }
    }

    fn each_matrix(&mut self, _: &mut dyn FnMut(Adaptable<'_>)) {}
}

/// Implements [`Parameters`] for a block with one matrix that adapters can sit on.
macro_rules! adaptable {
    ($type:ident as $kind:ident: $($field:ident),+) => {
        impl Parameters for $type {
            fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
                $(self.$field.each(visit);)+
            }

            fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
                $(self.$field.each_mut(visit);)+
            }

            fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
                visit(Adaptable { matrix: &self.matrix, kind: Kind::$kind, site: &self.site, stacks: &mut self.stacks });
            }
        }
    };
}

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
    across: Across,
    /// While it is trained.
    low_rank: Option<Box<LowRank>>,
    site: Site,
    /// While it is served.
    stacks: Option<Box<Stacks>>,
}
adaptable!(Linear as Linear: matrix, bias, stacks);

/// What becomes of the outputs that the ranks of a group have.
#[derive(Debug, Clone)]
enum Across {
    /// Each keeps its own.
    Nothing,
    /// They are added up.
    Sum(Group),
    /// They stand side by side.
    Gather(Vocabulary),
}

impl Linear {
    pub fn load(weights: &mut Weights, spec: &LinearSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let matrix = Matrix::load(weights, &spec.path, quantization)?;
        let bias = spec.bias.then(|| weights.take(&format!("{}.bias", spec.path))).transpose()?;
        let across = match (weights.sum_over(&spec.path), weights.vocabulary(&spec.path)) {
            (Some(group), _) => Across::Sum(group),
            (None, Some(vocabulary)) => Across::Gather(vocabulary),
            (None, None) => Across::Nothing,
        };
        let low_rank = LowRank::load(weights, &spec.path)?.map(Box::new);
        Ok(Self { matrix, bias, across, low_rank, site: Site::of(weights, &spec.path), stacks: None })
    }

    /// Leaves the sum over the ranks to the caller, who sums more than this; None when there is nothing to sum.
    pub fn without_sum(self) -> Option<Self> {
        // DoRA's factor on each output is by the whole matrix, and comes after the sum.
        let is_dora = self.low_rank.as_ref().is_some_and(|low_rank| low_rank.is_dora());
        match self.across {
            Across::Sum(_) if self.bias.is_none() && !is_dora => Some(Self { across: Across::Nothing, ..self }),
            _ => None,
        }
    }

    /// `[.., input] -> [.., output]`.
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
        if let (Some(stacks), Some(rows)) = (&self.stacks, rows::current()) {
            return self.adapted(x, stacks, &rows);
        }
        match &self.across {
            Across::Nothing => self.own(x),
            Across::Gather(vocabulary) => vocabulary.gather(&self.own(x)?),
            // The bias is added once, and on every rank, so that all ranks have the same graph and meet in the same order.
            Across::Sum(group) => {
                let sum = group.all_sum(&self.without_bias(x)?)?;
                let sum = self.with_gain(sum, x, Some(group))?;
                self.bias.as_ref().map_or(Ok(sum.clone()), |bias| Ok(ops::add(sum, bias)?))
            }
        }
    }

    /// Each row with its adapter.
    fn adapted(&self, x: &Array, stacks: &Stacks, rows: &Rows) -> Result<Array, LmError> {
        let biased = |y: &Array| self.bias.as_ref().map_or(Ok(y.clone()), |bias| Ok::<_, LmError>(ops::add(y, bias)?));
        if let Across::Sum(group) = &self.across {
            let sum = group.all_sum(&stacks.add_to(&self.matrix.apply(x)?, x, rows)?)?;
            return biased(&stacks.gained(sum, rows)?);
        }
        let own = match &self.bias {
            // What DoRA multiplies has no bias in it.
            Some(_) if stacks.has_gains() => {
                let adapted = stacks.gained(stacks.add_to(&self.matrix.apply(x)?, x, rows)?, rows)?;
                rows.choose(&self.plain(x)?, &biased(&adapted)?)?
            }
            _ => stacks.gained(stacks.add_to(&self.plain(x)?, x, rows)?, rows)?,
        };
        match &self.across {
            Across::Gather(vocabulary) => vocabulary.gather(&own),
            Across::Nothing | Across::Sum(_) => Ok(own),
        }
    }

    fn without_bias(&self, x: &Array) -> Result<Array, LmError> {
        match &self.low_rank {
            Some(low_rank) => low_rank.apply(x, &self.matrix, || self.matrix.apply(x)),
            None => self.matrix.apply(x),
        }
    }

    fn with_gain(&self, y: Array, x: &Array, across: Option<&Group>) -> Result<Array, LmError> {
        let gain = self.low_rank.as_ref().map(|low_rank| low_rank.gain(&self.matrix, across)).transpose()?.flatten();
        gain.map_or(Ok(y.clone()), |gain| Ok(ops::multiply(gain.as_dtype(x.dtype())?, &y)?))
    }

    fn own(&self, x: &Array) -> Result<Array, LmError> {
        match &self.low_rank {
            None => self.plain(x),
            Some(low_rank) if !low_rank.is_dora() => low_rank.apply(x, &self.matrix, || self.plain(x)),
            Some(_) => {
                let y = self.with_gain(self.without_bias(x)?, x, None)?;
                self.bias.as_ref().map_or(Ok(y.clone()), |bias| Ok(ops::add(&y, bias)?))
            }
        }
    }

    fn plain(&self, x: &Array) -> Result<Array, LmError> {
        Ok(match (&self.matrix, &self.bias) {
            // One fused operation where MLX has it, as mlx-lm does, so that the bits agree.
            (Matrix::Dense { weight }, Some(bias)) => ops::addmm(bias, x, weight.t(), None, None)?,
            (matrix, Some(bias)) => ops::add(matrix.apply(x)?, bias)?,
            (matrix, None) => matrix.apply(x)?,
        })
    }
}

/// Token ids to vectors, and, for a tied head, vectors to logits.
#[derive(Debug, Clone)]
pub struct Embedding {
    matrix: Matrix,
    /// When the ranks of a group have a part of the rows each.
    vocabulary: Option<Vocabulary>,
    low_rank: Option<Box<LowRankTable>>,
    site: Site,
    stacks: Option<Box<Stacks>>,
}
adaptable!(Embedding as Table: matrix, stacks);

impl Embedding {
    pub fn load(weights: &mut Weights, spec: &EmbeddingSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let (matrix, vocabulary) = (Matrix::load(weights, &spec.path, quantization)?, weights.vocabulary(&spec.path));
        let low_rank = LowRankTable::load(weights, &spec.path)?.map(Box::new);
        if let (Some(_), Matrix::Quantised { .. }) = (low_rank.as_ref().filter(|table| table.is_dora()), &matrix) {
            return Err(LmError::Adapter { path: spec.path.clone(), cause: "DoRA does not work on a quantised embedding".into() });
        }
        Ok(Self { matrix, vocabulary, low_rank, site: Site::of(weights, &spec.path), stacks: None })
    }

    /// `[..] -> [.., dims]`.
    pub fn forward(&self, ids: &Array) -> Result<Array, LmError> {
        let rows = match &self.vocabulary {
            None => self.matrix.rows(ids)?,
            Some(vocabulary) => vocabulary.look_up(ids, |own| self.matrix.rows(own))?,
        };
        if let (Some(stacks), Some(adapters)) = (&self.stacks, rows::current()) {
            return stacks.add_to_table_rows(&rows, ids, &adapters);
        }
        self.low_rank.as_ref().map_or(Ok(rows.clone()), |low_rank| low_rank.add_to_rows(&rows, ids))
    }

    /// `[.., dims] -> [.., vocab_size]`.
    pub fn as_linear(&self, x: &Array) -> Result<Array, LmError> {
        let own = self.matrix.apply(x)?;
        let own = self.low_rank.as_ref().map_or(Ok(own.clone()), |low_rank| low_rank.add_to_logits(&own, x, &self.matrix))?;
        let logits = self.vocabulary.as_ref().map_or(Ok(own.clone()), |vocabulary| vocabulary.gather(&own))?;
        match (&self.stacks, rows::current()) {
            (Some(stacks), Some(rows)) => stacks.add_to_logits(&logits, x, &rows),
            _ => Ok(logits),
        }
    }
}

/// One linear an expert.
#[derive(Debug, Clone)]
pub struct Experts {
    matrix: Matrix,
    /// `[n_experts, output]`
    bias: Option<Array>,
    low_rank: Option<Box<LowRankStack>>,
    site: Site,
    stacks: Option<Box<Stacks>>,
}
adaptable!(Experts as Experts: matrix, bias, stacks);

impl Experts {
    pub fn load(weights: &mut Weights, spec: &ExpertsSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let matrix = Matrix::load(weights, &spec.path, quantization)?;
        let bias = spec.bias.then(|| weights.take(&format!("{}.bias", spec.path))).transpose()?;
        let bias = match (bias, weights.sum_over(&spec.path)) {
            // Every rank adds it to what will be a sum: as it is on the first, as zeros on others. Whole experts have their own.
            (Some(bias), Some(group)) if weights.members(&spec.path).is_none() && group.rank() > 0 => {
                Some(ops::zeros_dtype(bias.shape(), bias.dtype())?)
            }
            (bias, _) => bias,
        };
        let low_rank = LowRankStack::load(weights, &spec.path)?.map(Box::new);
        Ok(Self { matrix, bias, low_rank, site: Site::of(weights, &spec.path), stacks: None })
    }

    /// `x` `[.., 1, 1, input]` (or `[rows, 1, input]` sorted by expert) through the experts `indices`.
    pub fn forward(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        let y = self.matrix.gather(x, indices, sorted)?;
        let y = match &self.bias {
            Some(bias) => ops::add(y, bias.take_axis(indices, 0)?.expand_dims(-2)?)?,
            None => y,
        };
        if let (Some(stacks), Some(rows)) = (&self.stacks, rows::current()) {
            return stacks.add_to_routed(&y, x, indices, self.matrix.shape()[0], &rows);
        }
        self.low_rank.as_ref().map_or(Ok(y.clone()), |low_rank| low_rank.add_to(&y, x, indices, sorted))
    }
}

/// One matrix a head, `[heads, output, input]`: what absorbed latent attention multiplies queries and outputs with
/// (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
#[derive(Debug, Clone)]
pub struct HeadLinear {
    matrix: Matrix,
}
parameters!(HeadLinear: matrix);

impl HeadLinear {
    pub fn load(weights: &mut Weights, path: &str, quantization: &Quantization) -> Result<Self, LmError> {
        Ok(Self { matrix: Matrix::load(weights, path, quantization)? })
    }

    /// `[B, heads, L, input] -> [B, heads, L, output]`; without `transpose` the other way, from output to input.
    pub fn forward(&self, x: &Array, transpose: bool) -> Result<Array, LmError> {
        self.matrix.apply_each(x, transpose)
    }
}

#[cfg(test)]
#[path = "linear_tests.rs"]
mod tests;

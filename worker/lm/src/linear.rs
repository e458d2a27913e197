//! Matrices with learned entries: linears, embeddings, stacks of experts and of heads, dense or quantised.

pub use crate::parameters::Parameters;
use crate::{
    adapter::{LowRank, LowRankStack, LowRankTable},
    error::LmError,
    ffi::{self, Quantised},
    group::{Group, Vocabulary},
    parameters::parameters,
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
    fn rows(&self, indices: &Array) -> Result<Array, LmError> {
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
}

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    matrix: Matrix,
    bias: Option<Array>,
    across: Across,
    low_rank: Option<Box<LowRank>>,
}
parameters!(Linear: matrix, bias);

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
        Ok(Self { matrix, bias, across, low_rank })
    }

    /// Leaves the sum over the ranks to the caller, who sums more than this; None when there is nothing to sum.
    pub fn without_sum(self) -> Option<Self> {
        match self.across {
            Across::Sum(_) if self.bias.is_none() => Some(Self { across: Across::Nothing, ..self }),
            _ => None,
        }
    }

    /// `[.., input] -> [.., output]`.
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
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
}
parameters!(Embedding: matrix);

impl Embedding {
    pub fn load(weights: &mut Weights, spec: &EmbeddingSpec, quantization: &Quantization) -> Result<Self, LmError> {
        let (matrix, vocabulary) = (Matrix::load(weights, &spec.path, quantization)?, weights.vocabulary(&spec.path));
        let low_rank = LowRankTable::load(weights, &spec.path)?.map(Box::new);
        if let (Some(_), Matrix::Quantised { .. }) = (low_rank.as_ref().filter(|table| table.is_dora()), &matrix) {
            return Err(LmError::Adapter { path: spec.path.clone(), cause: "DoRA does not work on a quantised embedding".into() });
        }
        if low_rank.as_ref().is_some_and(|table| table.is_dora()) && vocabulary.is_some() {
            return Err(LmError::Adapter {
                path: spec.path.clone(),
                cause: "DoRA does not work on an embedding that is split over ranks".into(),
            });
        }
        Ok(Self { matrix, vocabulary, low_rank })
    }

    /// `[..] -> [.., dims]`.
    pub fn forward(&self, ids: &Array) -> Result<Array, LmError> {
        let rows = match &self.vocabulary {
            None => self.matrix.rows(ids)?,
            Some(vocabulary) => vocabulary.look_up(ids, |own| self.matrix.rows(own))?,
        };
        self.low_rank.as_ref().map_or(Ok(rows.clone()), |low_rank| low_rank.add_to_rows(&rows, ids))
    }

    /// `[.., dims] -> [.., vocab_size]`.
    pub fn as_linear(&self, x: &Array) -> Result<Array, LmError> {
        let logits = self.matrix.apply(x)?;
        let logits = self.vocabulary.as_ref().map_or(Ok(logits.clone()), |vocabulary| vocabulary.gather(&logits))?;
        self.low_rank.as_ref().map_or(Ok(logits.clone()), |low_rank| low_rank.add_to_logits(&logits, x, &self.matrix))
    }
}

/// One linear an expert.
#[derive(Debug, Clone)]
pub struct Experts {
    matrix: Matrix,
    /// `[n_experts, output]`
    bias: Option<Array>,
    low_rank: Option<Box<LowRankStack>>,
}
parameters!(Experts: matrix, bias);

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
        Ok(Self { matrix, bias, low_rank: LowRankStack::load(weights, &spec.path)?.map(Box::new) })
    }

    /// `x` `[.., 1, 1, input]` (or `[rows, 1, input]` sorted by expert) through the experts `indices`.
    pub fn forward(&self, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        let y = self.matrix.gather(x, indices, sorted)?;
        let y = match &self.bias {
            Some(bias) => ops::add(y, bias.take_axis(indices, 0)?.expand_dims(-2)?)?,
            None => y,
        };
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
mod tests {
    use super::*;
    use mlx_cluster_common::spec::QuantizationMode;
    use mlx_rs::Dtype;

    fn schemes() -> Vec<QuantizationScheme> {
        let affine = [2, 3, 4, 5, 6, 8].into_iter().flat_map(|bits| {
            [32, 64, 128]
                .map(|group_size| QuantizationScheme::new(QuantizationMode::Affine, Some(group_size), Some(bits)).expect("allowed"))
        });
        let floats = [QuantizationMode::Mxfp4, QuantizationMode::Nvfp4, QuantizationMode::Mxfp8]
            .map(|mode| QuantizationScheme::new(mode, None, None).expect("allowed"));
        affine.chain(floats).collect()
    }

    fn numbers(shape: &[i32], seed: u64) -> Array {
        mlx_rs::random::normal::<f32>(shape, None, None, &mlx_rs::random::key(seed).expect("a key")).expect("random numbers")
    }

    fn quantised(weight: &Array, scheme: QuantizationScheme) -> Matrix {
        let (weight, scales, biases) = ffi::quantize(weight, scheme).expect("quantises");
        Matrix::Quantised { weight, scales, biases, scheme }
    }

    fn dense(matrix: &Matrix) -> Array {
        let Matrix::Quantised { weight, scales, biases, scheme } = matrix else { panic!("quantised") };
        let whole = Quantised { weight, scales, biases: biases.as_ref(), scheme: *scheme };
        ffi::dequantize(&whole).expect("dequantises").as_dtype(Dtype::Float32).expect("casts")
    }

    fn assert_close(found: &Array, wanted: &Array, what: &str) {
        assert_eq!(found.shape(), wanted.shape(), "{what}");
        assert!(found.all_close(wanted, 1e-4, 1e-4, None).expect("compares"), "{what}");
    }

    fn assert_same(found: &Array, wanted: &Array, what: &str) {
        assert_eq!(ffi::array_to_bytes(found).expect("bytes"), ffi::array_to_bytes(wanted).expect("bytes"), "{what}");
    }

    #[test]
    fn shapes_are_those_of_the_scheme() {
        for scheme in schemes() {
            let Matrix::Quantised { weight, scales, biases, .. } = quantised(&numbers(&[8, 256], 1), scheme) else { panic!("quantised") };
            assert_eq!(weight.dim(1) as u64, scheme.packed_columns(256u32).expect("divides"), "{scheme:?}");
            assert_eq!(scales.dim(1) as u64, scheme.groups(256u32).expect("divides"), "{scheme:?}");
            assert_eq!(scales.dtype() == Dtype::Uint8, scheme.scales_are_bytes(), "{scheme:?}");
            assert_eq!(biases.is_some(), scheme.has_biases(), "{scheme:?}");
        }
    }

    #[test]
    fn products_are_those_of_the_dequantised_matrix() {
        let (weight, x) = (numbers(&[64, 256], 1), numbers(&[3, 256], 2));
        for scheme in schemes() {
            let matrix = quantised(&weight, scheme);
            let same = ops::matmul(&x, dense(&matrix).t()).expect("multiplies");
            assert_close(&matrix.apply(&x).expect("multiplies"), &same, &format!("{scheme:?}"));
        }
    }

    #[test]
    fn affine_products_are_bit_for_bit_those_of_mlx_rs() {
        let (weight, x) = (numbers(&[64, 256], 1), numbers(&[3, 256], 2));
        for scheme in schemes().into_iter().filter(|scheme| scheme.mode == QuantizationMode::Affine) {
            let matrix = quantised(&weight, scheme);
            let Matrix::Quantised { weight, scales, biases: Some(biases), .. } = &matrix else { panic!("affine") };
            let (group_size, bits) = (scheme.group_size as i32, scheme.bits as i32);
            let wanted = ops::quantized_matmul(&x, weight, scales, biases, true, group_size, bits).expect("multiplies");
            assert_same(&matrix.apply(&x).expect("multiplies"), &wanted, &format!("{scheme:?}"));
        }
    }

    #[test]
    fn rows_are_those_of_the_dequantised_matrix() {
        let (weight, ids) = (numbers(&[64, 256], 1), Array::from_slice(&[5u32, 0, 63], &[1, 3]));
        for scheme in schemes() {
            let matrix = quantised(&weight, scheme);
            let rows = matrix.rows(&ids).expect("rows");
            assert_eq!(rows.dtype() == Dtype::Bfloat16, scheme.scales_are_bytes(), "{scheme:?}");
            let wanted = dense(&matrix).take_axis(&ids, 0).expect("rows");
            assert_same(&rows.as_dtype(Dtype::Float32).expect("casts"), &wanted, &format!("{scheme:?}"));
        }
    }

    #[test]
    fn experts_add_the_bias_of_each() {
        let (weight, bias) = (numbers(&[4, 64, 256], 1), numbers(&[4, 64], 2));
        let (x, indices) = (numbers(&[1, 2, 1, 1, 256], 3), Array::from_slice(&[3u32, 1, 0, 3], &[1, 2, 2]));
        for scheme in schemes() {
            let experts = Experts { matrix: quantised(&weight, scheme), bias: Some(bias.clone()), low_rank: None };
            let found = experts.forward(&x, &indices, false).expect("multiplies");
            let plain = Experts { matrix: Matrix::Dense { weight: dense(&experts.matrix) }, bias: None, low_rank: None };
            let own = bias.take_axis(&indices, 0).and_then(|own| own.expand_dims(-2)).expect("biases");
            let wanted = ops::add(plain.forward(&x, &indices, false).expect("multiplies"), own).expect("adds");
            assert_eq!(found.shape(), [1, 2, 2, 1, 64]);
            assert_close(&found, &wanted, &format!("{scheme:?}"));
        }
    }

    #[test]
    fn heads_multiply_in_both_directions() {
        let weight = numbers(&[2, 64, 256], 1);
        for scheme in schemes() {
            let heads = HeadLinear { matrix: quantised(&weight, scheme) };
            let plain = HeadLinear { matrix: Matrix::Dense { weight: dense(&heads.matrix) } };
            for (transpose, input, output) in [(true, 256, 64), (false, 64, 256)] {
                let x = numbers(&[1, 2, 3, input], 2);
                let found = heads.forward(&x, transpose).expect("multiplies");
                assert_eq!(found.shape(), [1, 2, 3, output]);
                assert_close(&found, &plain.forward(&x, transpose).expect("multiplies"), &format!("{scheme:?} {transpose}"));
            }
        }
    }

    #[test]
    fn loading_takes_what_the_scheme_has() {
        let mxfp4 = QuantizationScheme::new(QuantizationMode::Mxfp4, None, None).expect("allowed");
        for (scheme, parameters) in [(mxfp4, 3), (schemes()[0], 4)] {
            let (weight, scales, biases) = ffi::quantize(&numbers(&[64, 256], 1), scheme).expect("quantises");
            let arrays = [("weight", Some(weight)), ("scales", Some(scales)), ("biases", biases), ("bias", Some(numbers(&[64], 2)))];
            let arrays = arrays.into_iter().filter_map(|(suffix, array)| Some((format!("a.{suffix}"), array?)));
            let mut weights = Weights::from_arrays(arrays);
            let spec = LinearSpec { path: "a".into(), input_dims: 256, output_dims: 64, bias: true };
            let quantization = Quantization { default: Some(scheme), ..Quantization::default() };
            let linear = Linear::load(&mut weights, &spec, &quantization).expect("loads");
            weights.finish().expect("nothing is left");
            let mut count = 0;
            linear.each(&mut |_| count += 1);
            assert_eq!(count, parameters);
        }
    }

    #[test]
    fn a_misshapen_matrix_is_an_error_with_its_shapes() {
        let matrix = quantised(&numbers(&[64, 256], 1), schemes()[0]);
        let error = matrix.apply(&numbers(&[3, 128], 2)).expect_err("refused").to_string();
        assert!(error.contains("[3, 128]") && error.contains("[64, 16]"), "{error}");
    }
}

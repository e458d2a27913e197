//! Tensors without data: what they are made of, their type and shape. An operation that MLX would refuse is an error here already.

use super::{
    PublishedError,
    recipe::{Affine, QuantisedPiece, Recipe, SourceTensor},
    select::Span,
};
use crate::dtype::DType;
use std::sync::Arc;

/// Bytes that one element takes in the f32 steps of a conversion: the product and its factor.
const F32_STEP_BYTES: u64 = 8;

#[derive(Debug, Clone, PartialEq)]
pub struct SymbolicTensor {
    pub recipe: Recipe,
    pub dtype: DType,
    pub shape: Vec<u64>,
    /// Bytes that are in memory beside the tensor itself while it is made; none for what is read to where it belongs.
    pub transient_bytes: u64,
}

/// An affinely quantised matrix, or stack of matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedTensors {
    pub weight: SymbolicTensor,
    pub scales: SymbolicTensor,
    pub biases: SymbolicTensor,
}

/// Axes are counted from the front, or from -1 at the end.
impl SymbolicTensor {
    pub fn of_checkpoint(name: &str, dtype: DType, shape: Vec<u64>) -> Self {
        Self::of_source(Arc::new(SourceTensor { name: name.to_owned(), dtype, shape }))
    }

    pub(super) fn of_source(source: Arc<SourceTensor>) -> Self {
        Self { dtype: source.dtype, shape: source.shape.clone(), recipe: Recipe::Tensor(source), transient_bytes: 0 }
    }

    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size()
    }

    /// The length of an axis; 1 for an axis that is not there.
    pub fn dim(&self, axis: i32) -> u64 {
        self.axis(axis).ok().and_then(|axis| self.shape.get(axis)).copied().unwrap_or(1)
    }

    /// Equal tensors along a new first axis. They are made one after the other; one that is computed is there beside the stack for its time.
    pub fn stack(tensors: Vec<SymbolicTensor>) -> Result<Self, PublishedError> {
        let (dtype, shape) = common(&tensors, |first, other| first.shape == other.shape, "stacked with one")?;
        let shape = std::iter::once(tensors.len() as u64).chain(shape).collect();
        let transient_bytes = tensors.iter().map(|tensor| tensor.bytes() + tensor.transient_bytes).max().unwrap_or(0);
        let recipe = Recipe::Stack(tensors.into_iter().map(|tensor| tensor.recipe).collect());
        Ok(Self { transient_bytes: if recipe.is_gathered() { 0 } else { transient_bytes }, recipe, dtype, shape })
    }

    pub fn concatenate(tensors: Vec<SymbolicTensor>, axis: i32) -> Result<Self, PublishedError> {
        let along = tensors.first().map_or(Ok(0), |first| first.axis(axis))?;
        let fits = |first: &Self, other: &Self| {
            let rest =
                |tensor: &Self| tensor.shape.iter().enumerate().filter(|(i, _)| *i != along).map(|(_, dim)| *dim).collect::<Vec<_>>();
            first.shape.len() == other.shape.len() && rest(first) == rest(other)
        };
        let (dtype, mut shape) = common(&tensors, fits, "concatenated with one")?;
        shape[along] = tensors.iter().map(|tensor| tensor.shape[along]).sum();
        let transient_bytes = tensors.iter().map(|tensor| tensor.bytes() + tensor.transient_bytes).sum();
        let recipe = Recipe::Concatenate { of: tensors.into_iter().map(|tensor| tensor.recipe).collect(), axis: along };
        Ok(Self { transient_bytes: if recipe.is_gathered() { 0 } else { transient_bytes }, recipe, dtype, shape })
    }

    /// Entries `start..stop` of an axis.
    pub fn slice(self, axis: i32, start: u64, stop: u64) -> Result<Self, PublishedError> {
        self.slice_by(axis, start, stop, 1)
    }

    /// Entries `start`, `start + step`, ... of an axis.
    pub fn every(self, axis: i32, start: u64, step: u64) -> Result<Self, PublishedError> {
        let stop = self.dim(axis);
        self.slice_by(axis, start, stop, step)
    }

    fn slice_by(self, axis: i32, start: u64, stop: u64, step: u64) -> Result<Self, PublishedError> {
        let along = self.axis(axis)?;
        if start >= stop || stop > self.shape[along] || step == 0 {
            return Err(self.cannot(format!("sliced {start}..{stop} by {step} along axis {along}")));
        }
        self.select_spans(along, &[Span::new(start, stop, step)])
    }

    /// Pieces of these lengths, which have to make up the axis.
    pub fn split(self, axis: i32, lengths: &[u64]) -> Result<Vec<Self>, PublishedError> {
        if lengths.iter().sum::<u64>() != self.dim(axis) {
            return Err(self.cannot(format!("split into {lengths:?} along axis {axis}")));
        }
        let mut start = 0;
        let piece = |length: &u64| {
            start += length;
            self.clone().slice(axis, start - length, start)
        };
        lengths.iter().map(piece).collect()
    }

    /// The same elements in row-major order.
    pub fn reshape(self, shape: &[u64]) -> Result<Self, PublishedError> {
        if shape.iter().product::<u64>() != self.elements() {
            return Err(self.cannot(format!("reshaped to {shape:?}")));
        }
        Ok(self.then(shape.to_vec(), |of| Recipe::Reshape { of, shape: shape.to_vec() }))
    }

    /// Axis `i` of the result is axis `axes[i]` of this.
    pub fn transpose(self, axes: &[usize]) -> Result<Self, PublishedError> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.shape.len()) {
            return Err(self.cannot(format!("transposed by {axes:?}")));
        }
        let shape = axes.iter().map(|axis| self.shape[*axis]).collect();
        Ok(self.then(shape, |of| Recipe::Transpose { of, axes: axes.to_vec() }))
    }

    pub fn swap_last_axes(self) -> Result<Self, PublishedError> {
        let n = self.shape.len();
        if n < 2 {
            return Err(self.cannot("transposed"));
        }
        let mut axes: Vec<_> = (0..n).collect();
        axes.swap(n - 1, n - 2);
        self.transpose(&axes)
    }

    /// The same bytes read as another type.
    pub fn view(self, dtype: DType) -> Result<Self, PublishedError> {
        let row_bytes = self.dim(-1) * self.dtype.size();
        let Some(last) = self.shape.len().checked_sub(1).filter(|_| row_bytes.is_multiple_of(dtype.size())) else {
            return Err(self.cannot(format!("viewed as {dtype}")));
        };
        let mut shape = self.shape.clone();
        shape[last] = row_bytes / dtype.size();
        Ok(Self { dtype, ..self.then(shape, |of| Recipe::View { of, dtype }) })
    }

    /// For norms: one of two conventions stores `w`, the other `w - 1`.
    pub fn plus(self, addend: f32) -> Result<Self, PublishedError> {
        self.float()?;
        let shape = self.shape.clone();
        Ok(self.then(shape, |of| Recipe::Add { of, addend }))
    }

    pub fn scale(self, factor: f32) -> Result<Self, PublishedError> {
        self.float()?;
        let shape = self.shape.clone();
        Ok(self.then(shape, |of| Recipe::Scale { of, factor }))
    }

    /// Runs of `(rows, factor)`, which have to make up the first axis.
    pub fn scale_rows(self, runs: &[(u64, f32)]) -> Result<Self, PublishedError> {
        self.float()?;
        if self.shape.first().copied() != Some(runs.iter().map(|(rows, _)| rows).sum()) {
            return Err(self.cannot(format!("scaled by runs of rows {runs:?}")));
        }
        let shape = self.shape.clone();
        Ok(self.then(shape, |of| Recipe::ScaleRows { of, runs: runs.to_vec() }))
    }

    /// `w[i, j] / (sqrt(sum_i w[i, j]²) + eps)`.
    pub fn normalise_columns(self, eps: f32) -> Result<Self, PublishedError> {
        self.float()?;
        if self.shape.len() != 2 {
            return Err(self.cannot("normalised by columns"));
        }
        let (shape, elements) = (self.shape.clone(), self.elements());
        let tensor = self.then(shape, |of| Recipe::NormaliseColumns { of, eps });
        Ok(Self { transient_bytes: tensor.transient_bytes + F32_STEP_BYTES * elements, ..tensor })
    }

    /// Bytes e4m3 times scales, as BF16: scales that broadcast to the weight, else one a block of a matrix.
    pub fn dequantise_fp8(self, scales: SymbolicTensor, block: Option<[u64; 2]>) -> Result<Self, PublishedError> {
        scales.float()?;
        if self.dtype != DType::U8 {
            return Err(self.wrong_type("bytes e4m3"));
        }
        let block = match block {
            _ if scales.broadcasts_to(&self.shape) => None,
            Some(block) if self.in_blocks(block) == Some(scales.shape.clone()) => Some(block),
            _ => return Err(self.cannot(format!("scaled by {:?} in blocks {block:?}", scales.shape))),
        };
        let transient_bytes =
            self.bytes() + scales.bytes() + F32_STEP_BYTES * self.elements() + self.transient_bytes + scales.transient_bytes;
        let recipe = Recipe::Fp8 { weight: Box::new(self.recipe), scales: Box::new(scales.recipe), block };
        Ok(Self { recipe, dtype: DType::BF16, shape: self.shape, transient_bytes })
    }

    /// Rounds to affine groups along the last axis.
    pub fn quantise(self, affine: Affine) -> Result<QuantisedTensors, PublishedError> {
        self.float()?;
        let Affine { group_size, bits } = affine;
        let columns = self.dim(-1);
        let whole = columns.is_multiple_of(u64::from(group_size)) && (columns * u64::from(bits)).is_multiple_of(32);
        if self.shape.len() < 2 || !whole {
            return Err(self.cannot(format!("quantised in groups of {group_size} by {bits} bits")));
        }
        let piece = |piece, dtype, last| {
            let mut shape = self.shape.clone();
            if let Some(dim) = shape.last_mut() {
                *dim = last;
            }
            let transient_bytes = 3 * self.bytes() + self.transient_bytes;
            Self { recipe: Recipe::Quantise { of: Box::new(self.recipe.clone()), affine, piece }, dtype, shape, transient_bytes }
        };
        let (packed, groups) = (columns * u64::from(bits) / 32, columns / u64::from(group_size));
        Ok(QuantisedTensors {
            weight: piece(QuantisedPiece::Weight, DType::U32, packed),
            scales: piece(QuantisedPiece::Scales, self.dtype, groups),
            biases: piece(QuantisedPiece::Biases, self.dtype, groups),
        })
    }

    pub(super) fn then(self, shape: Vec<u64>, recipe: impl FnOnce(Box<Recipe>) -> Recipe) -> Self {
        let (operand_bytes, operand_is_gathered) = (self.bytes() + self.transient_bytes, self.recipe.is_gathered());
        let recipe = recipe(Box::new(self.recipe));
        // A reshape of what lies in rows moves nothing.
        let moves_nothing = recipe.is_gathered() || (matches!(recipe, Recipe::Reshape { .. }) && operand_is_gathered);
        Self { transient_bytes: if moves_nothing { 0 } else { operand_bytes }, recipe, dtype: self.dtype, shape }
    }

    fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    fn axis(&self, axis: i32) -> Result<usize, PublishedError> {
        let n = self.shape.len() as i32;
        let from_front = if axis < 0 { axis + n } else { axis };
        match (0..n).contains(&from_front) {
            true => Ok(from_front as usize),
            false => Err(self.cannot(format!("taken along axis {axis}"))),
        }
    }

    fn broadcasts_to(&self, shape: &[u64]) -> bool {
        let fits = |(dim, wanted): (&u64, &u64)| dim == wanted || *dim == 1;
        self.shape.len() <= shape.len() && self.shape.iter().rev().zip(shape.iter().rev()).all(fits)
    }

    fn in_blocks(&self, [rows, columns]: [u64; 2]) -> Option<Vec<u64>> {
        match self.shape[..] {
            [n, m] if rows > 0 && columns > 0 => Some(vec![n.div_ceil(rows), m.div_ceil(columns)]),
            _ => None,
        }
    }

    fn float(&self) -> Result<(), PublishedError> {
        match self.dtype.is_float() {
            true => Ok(()),
            false => Err(self.wrong_type("F32, F16 or BF16")),
        }
    }

    fn wrong_type(&self, wanted: &'static str) -> PublishedError {
        PublishedError::Type { tensor: self.first_source(), found: self.dtype, wanted }
    }

    pub(super) fn cannot(&self, action: impl Into<String>) -> PublishedError {
        PublishedError::Shape { tensor: self.first_source(), shape: self.shape.clone(), action: action.into() }
    }

    /// The name that an error says.
    pub(super) fn first_source(&self) -> String {
        self.recipe.sources().first().map(ToString::to_string).unwrap_or_default()
    }
}

impl QuantisedTensors {
    /// Group size and bits, which follow from the shapes when the matrix has `columns` columns.
    pub fn affine(&self, columns: u64) -> Result<Affine, PublishedError> {
        let Self { weight, scales, biases } = self;
        scales.float()?;
        biases.float()?;
        let (words, groups) = (weight.dim(-1), scales.dim(-1));
        let affine = Affine { group_size: (columns / groups.max(1)) as u32, bits: (words * 32 / columns.max(1)) as u32 };
        let rows = |tensor: &SymbolicTensor| tensor.shape.split_last().map(|(_, rows)| rows.to_vec());
        let exact = u64::from(affine.bits) * columns == words * 32 && u64::from(affine.group_size) * groups == columns;
        match weight.dtype == DType::U32 && exact && rows(weight) == rows(scales) && scales.shape == biases.shape {
            true => Ok(affine),
            false => Err(weight.cannot(format!("dequantised to {columns} columns with scales {:?}", scales.shape))),
        }
    }

    /// As numbers of the scales' type, with a last axis of `columns`.
    pub fn dequantise(self, columns: u64) -> Result<SymbolicTensor, PublishedError> {
        let affine = self.affine(columns)?;
        let Self { weight, scales, biases } = self;
        let rows = weight.shape.split_last().map(|(_, rows)| rows).unwrap_or_default();
        let shape = rows.iter().copied().chain([columns]).collect();
        let all = [&weight, &scales, &biases];
        let transient_bytes = all.iter().map(|tensor| tensor.bytes() + tensor.transient_bytes).sum();
        let dtype = scales.dtype;
        let [weight, scales, biases] = [weight.recipe, scales.recipe, biases.recipe].map(Box::new);
        Ok(SymbolicTensor { recipe: Recipe::Dequantise { weight, scales, biases, affine }, dtype, shape, transient_bytes })
    }
}

/// Type and shape of the first of tensors that are joined, when the others fit to it.
fn common(
    tensors: &[SymbolicTensor],
    fits: impl Fn(&SymbolicTensor, &SymbolicTensor) -> bool,
    action: &str,
) -> Result<(DType, Vec<u64>), PublishedError> {
    let Some(first) = tensors.first() else { return Err(PublishedError::Empty) };
    match tensors.iter().find(|other| other.dtype != first.dtype || !fits(first, other)) {
        None => Ok((first.dtype, first.shape.clone())),
        Some(odd) => Err(odd.cannot(format!("{action} of shape {:?} and type {}, its own is {}", first.shape, first.dtype, odd.dtype))),
    }
}

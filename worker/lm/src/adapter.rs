//! Low-rank factors beside frozen matrices, as training sees them: LoRA (Hu et al., arXiv 2106.09685) and DoRA (Liu et al., arXiv 2402.09353),
//! with mlx-lm's names, shapes and order of operations.
//!
//! Of a matrix at `PATH` they are `PATH.lora_a`, `PATH.lora_b` and, for DoRA, `PATH.m`. Every rank of a tensor-parallel group is given whole
//! factors and takes the entries that belong to its part of the matrix: so gradients, added up over the group, are those of whole factors,
//! however a block is split.

use crate::{entries::entries, error::LmError, group::Group, linear::Matrix, tuner::random, weights::Weights};
use mlx_cluster_common::tensor::Cut;
use mlx_rs::{Array, ops, stop_gradient};
use std::{ops::Range, rc::Rc};

/// What all adapters of a shard have in common while it is trained.
#[derive(Debug, Clone)]
pub struct Adaption {
    pub scale: f32,
    /// None when nothing is dropped, as in evaluation.
    pub dropout: Option<Rc<Dropout>>,
}

/// Which inputs are left out. The draw for a row depends on the seed, the module and the row's place in the data alone, so it is the same in
/// every layout.
#[derive(Debug)]
pub struct Dropout {
    pub probability: f32,
    pub seed: u64,
    pub batch: u64,
    pub first_row: u32,
    /// Tokens of each row.
    pub lengths: Vec<i32>,
}

/// The factors of a linear.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    path: Rc<str>,
    /// `[input, rank]`, of the rank's own inputs.
    a: Array,
    /// `[rank, output]`, of the rank's own outputs.
    b: Array,
    /// `[output]`: the length of each row of the adapted matrix (DoRA).
    magnitude: Option<Array>,
    adaption: Adaption,
    /// When the rank has a part of the inputs: which of how many.
    inputs: Option<(Vec<Range<u32>>, i32)>,
}

impl LowRank {
    /// None where the matrix at `path` has no factors.
    pub(crate) fn load(weights: &mut Weights, path: &str) -> Result<Option<Self>, LmError> {
        let Some(adaption) = weights.adaption().filter(|_| weights.has(&format!("{path}.lora_a"))).cloned() else {
            return Ok(None);
        };
        let (a, b) = (weights.take(&format!("{path}.lora_a"))?, weights.take(&format!("{path}.lora_b"))?);
        let name = format!("{path}.m");
        let magnitude = if weights.has(&name) { Some(weights.take(&name)?) } else { None };
        let (a, b, magnitude, inputs) = match weights.cut(path) {
            Some(Cut::Input(ranges)) => (entries(&a, 0, &ranges)?, b, magnitude, Some((ranges, a.dim(0)))),
            Some(Cut::Output(ranges)) => {
                let magnitude = magnitude.map(|m| entries(&m, 0, &ranges)).transpose()?;
                (a, entries(&b, 1, &ranges)?, magnitude, None)
            }
            Some(Cut::Member(_)) => {
                return Err(LmError::Adapter { path: path.into(), cause: "a stack of matrices has the factors of a single one".into() });
            }
            None => (a, b, magnitude, None),
        };
        Ok(Some(Self { path: path.into(), a, b, magnitude, adaption, inputs }))
    }

    /// `y` and what the factors add to it; `y` is `x Wᵀ`, with or without a bias. DoRA, as mlx-lm's, multiplies with the matrix as numbers.
    pub(crate) fn apply(&self, x: &Array, matrix: &Matrix, y: impl FnOnce() -> Result<Array, LmError>) -> Result<Array, LmError> {
        let y = match &self.magnitude {
            None => y()?,
            Some(_) => ops::matmul(x, matrix.dense()?.t())?,
        };
        let z = ops::matmul(ops::matmul(self.dropped(x)?, &self.a)?, &self.b)?;
        Ok(ops::add(y, scaled(&z, self.adaption.scale)?.as_dtype(x.dtype())?)?)
    }

    pub(crate) fn is_dora(&self) -> bool {
        self.magnitude.is_some()
    }

    /// DoRA's factor on each output, `[output]`; None for LoRA. `across` is the group that the matrix's inputs are spread over.
    pub(crate) fn gain(&self, matrix: &Matrix, across: Option<&Group>) -> Result<Option<Array>, LmError> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        let delta = ops::matmul(scaled(&self.b.t(), self.adaption.scale)?, self.a.t())?;
        let adapted = ops::add(matrix.dense()?, delta)?;
        let lengths = match across {
            None => norm_of_rows(&adapted)?,
            Some(group) => ops::sqrt(group.all_sum(&adapted.square()?.sum_axis(1, false)?)?)?,
        };
        Ok(Some(ops::divide(magnitude, stop_gradient(&lengths)?)?))
    }

    fn dropped(&self, x: &Array) -> Result<Array, LmError> {
        match &self.adaption.dropout {
            None => Ok(x.clone()),
            Some(dropout) => dropout.apply(x, &self.path, self.inputs.as_ref()),
        }
    }
}

/// The factors of a stack of experts: `a` `[experts, rank, input]`, `b` `[experts, output, rank]`.
#[derive(Debug, Clone)]
pub(crate) struct LowRankStack {
    path: Rc<str>,
    a: Array,
    b: Array,
    adaption: Adaption,
}

impl LowRankStack {
    pub(crate) fn load(weights: &mut Weights, path: &str) -> Result<Option<Self>, LmError> {
        let Some(adaption) = weights.adaption().filter(|_| weights.has(&format!("{path}.lora_a"))).cloned() else {
            return Ok(None);
        };
        let (a, b) = (weights.take(&format!("{path}.lora_a"))?, weights.take(&format!("{path}.lora_b"))?);
        let (a, b) = match weights.cut(path) {
            Some(Cut::Input(ranges)) => (entries(&a, 2, &ranges)?, b),
            Some(Cut::Output(ranges)) => (a, entries(&b, 1, &ranges)?),
            Some(Cut::Member(range)) => (entries(&a, 0, std::slice::from_ref(&range))?, entries(&b, 0, &[range])?),
            None => (a, b),
        };
        Ok(Some(Self { path: path.into(), a, b, adaption }))
    }

    /// `y` and what the factors add to it, for inputs and indices as [`Experts::forward`](crate::linear::Experts::forward) takes them.
    pub(crate) fn add_to(&self, y: &Array, x: &Array, indices: &Array, sorted: bool) -> Result<Array, LmError> {
        let dropped = match &self.adaption.dropout {
            None => x.clone(),
            Some(dropout) => dropout.apply_flat(x, &self.path)?,
        };
        let z = ops::gather_mm(&dropped, self.a.swap_axes(-1, -2)?, None, indices, sorted)?;
        let z = ops::gather_mm(&z, self.b.swap_axes(-1, -2)?, None, indices, sorted)?;
        Ok(ops::add(y, scaled(&z, self.adaption.scale)?.as_dtype(x.dtype())?)?)
    }
}

/// The factors of a table: `a` `[rows, rank]`, `b` `[rank, dims]`; `m` `[rows]`. To rows that are looked up, which come from all ranks, the
/// whole of them is added on every rank; to logits those of the rank's own rows.
#[derive(Debug, Clone)]
pub(crate) struct LowRankTable {
    path: Rc<str>,
    a: Array,
    b: Array,
    magnitude: Option<Array>,
    adaption: Adaption,
    /// The table's rows that are here, when others are on other ranks.
    own: Option<Vec<Range<u32>>>,
}

impl LowRankTable {
    pub(crate) fn load(weights: &mut Weights, path: &str) -> Result<Option<Self>, LmError> {
        let Some(adaption) = weights.adaption().filter(|_| weights.has(&format!("{path}.lora_a"))).cloned() else {
            return Ok(None);
        };
        let (a, b) = (weights.take(&format!("{path}.lora_a"))?, weights.take(&format!("{path}.lora_b"))?);
        let name = format!("{path}.m");
        let magnitude = if weights.has(&name) { Some(weights.take(&name)?) } else { None };
        let own = match weights.cut(path) {
            Some(Cut::Output(ranges)) => Some(ranges),
            None => None,
            Some(Cut::Input(_) | Cut::Member(_)) => {
                return Err(LmError::Adapter { path: path.into(), cause: "a table is split by its rows alone".into() });
            }
        };
        Ok(Some(Self { path: path.into(), a, b, magnitude, adaption, own }))
    }

    /// `y` are the rows `ids` of the table.
    pub(crate) fn add_to_rows(&self, y: &Array, ids: &Array) -> Result<Array, LmError> {
        let z = ops::matmul(self.a.take_axis(ids, 0)?, &self.b)?;
        let Some(magnitude) = &self.magnitude else {
            let z = scaled(&self.dropped(&z)?, self.adaption.scale)?;
            return Ok(ops::add(y, z.as_dtype(y.dtype())?)?);
        };
        let z = scaled(&z, self.adaption.scale)?;
        let out = ops::add(y, self.dropped(&z)?.as_dtype(y.dtype())?)?;
        let adapted = ops::add(y, &z)?;
        let lengths = ops::sqrt(adapted.square()?.sum_axis(-1, false)?)?;
        let gain = ops::divide(magnitude.take_axis(ids, 0)?, stop_gradient(&lengths)?)?;
        Ok(ops::multiply(gain.expand_dims(-1)?, out)?)
    }

    /// `y` are the logits of `x` with the rank's rows of the table as a head, which are those of `matrix`.
    pub(crate) fn add_to_logits(&self, y: &Array, x: &Array, matrix: &Matrix) -> Result<Array, LmError> {
        let a = self.own_rows(&self.a)?;
        let z = ops::matmul(ops::matmul(self.dropped(x)?, self.b.t())?, a.t())?;
        let out = ops::add(y, scaled(&z, self.adaption.scale)?.as_dtype(x.dtype())?)?;
        let Some(magnitude) = &self.magnitude else { return Ok(out) };
        let adapted = ops::add(matrix.dense()?, ops::matmul(scaled(&a, self.adaption.scale)?, &self.b)?)?;
        let gain = ops::divide(self.own_rows(magnitude)?, stop_gradient(norm_of_rows(&adapted)?)?)?;
        Ok(ops::multiply(gain, out)?)
    }

    fn own_rows(&self, whole: &Array) -> Result<Array, LmError> {
        self.own.as_ref().map_or(Ok(whole.clone()), |ranges| entries(whole, 0, ranges))
    }

    pub(crate) fn is_dora(&self) -> bool {
        self.magnitude.is_some()
    }

    fn dropped(&self, x: &Array) -> Result<Array, LmError> {
        match &self.adaption.dropout {
            None => Ok(x.clone()),
            Some(dropout) => dropout.apply(x, &self.path, None),
        }
    }
}

impl Dropout {
    /// `x` `[.., dims]` of all tokens, rows one after the other; `inputs` says which entries of the last axis are here, of how many, when others are
    /// elsewhere.
    fn apply(&self, x: &Array, path: &str, inputs: Option<&(Vec<Range<u32>>, i32)>) -> Result<Array, LmError> {
        let dims = inputs.map_or(x.dim(-1), |(_, dims)| *dims);
        let mask = self.draw(path).mask(&self.lengths, dims)?;
        let mask = inputs.map_or(Ok(mask.clone()), |(ranges, _)| entries(&mask, 1, ranges))?;
        self.masked(x, &mask.reshape(x.shape())?)
    }

    /// For routed rows, whose order follows from the router: one draw for all of them.
    fn apply_flat(&self, x: &Array, path: &str) -> Result<Array, LmError> {
        let dims = x.dim(-1);
        let mask = self.draw(path).mask(&[x.size() as i32 / dims], dims)?;
        self.masked(x, &mask.reshape(x.shape())?)
    }

    fn draw<'a>(&self, path: &'a str) -> random::Dropout<'a> {
        random::Dropout { seed: self.seed, name: path, batch: self.batch, first_row: self.first_row, rate: self.probability }
    }

    fn masked(&self, x: &Array, mask: &Array) -> Result<Array, LmError> {
        let factor = Array::from_f32(1.0 / (1.0 - self.probability)).as_dtype(x.dtype())?;
        Ok(ops::multiply(ops::multiply(&factor, mask.as_dtype(x.dtype())?)?, x)?)
    }
}

/// `[rows, columns] -> [rows]`
pub(crate) fn norm_of_rows(matrix: &Array) -> Result<Array, LmError> {
    Ok(ops::sqrt(matrix.square()?.sum_axis(1, false)?)?)
}

/// A factor in the array's type, as Python's numbers are.
fn scaled(array: &Array, factor: f32) -> Result<Array, LmError> {
    Ok(ops::multiply(Array::from_f32(factor).as_dtype(array.dtype())?, array)?)
}

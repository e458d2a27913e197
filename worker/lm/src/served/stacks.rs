//! The low-rank factors of all loaded adapters for one matrix, one above the other, so that every row of a step finds its own.

use super::rows::Rows;
use crate::{error::LmError, parameters::parameters};
use mlx_rs::{Array, Dtype, ops};

/// Ranks are those of the largest, filled up with zeros. An adapter that leaves the matrix alone has nothing but zeros.
///
/// Each row is multiplied by itself (`gather_mm`), so its arithmetic does not depend on its neighbours.
#[derive(Debug, Clone)]
pub(crate) struct Stacks {
    /// `[adapters]`
    pub(super) scales: Array,
    /// `[adapters, input, rank]`; of experts `[adapters · experts, input, rank]`; of a table `[adapters, vocab, rank]`.
    pub(super) a: Array,
    /// `[adapters, rank, output]`; of experts `[adapters · experts, rank, output]`; of a table `[adapters, rank, dims]`.
    pub(super) b: Array,
    /// DoRA: what each output is multiplied with, `[adapters, output]`, of a table `[adapters, vocab]`; ones for adapters without.
    pub(super) gains: Option<Array>,
}
parameters!(Stacks: scales, a, b, gains);

impl Stacks {
    /// `y` `[rows, .., output]` and what the factors add to it, for `x` `[rows, .., input]`.
    pub(crate) fn add_to(&self, y: &Array, x: &Array, rows: &Rows) -> Result<Array, LmError> {
        self.add_product(y, x, &self.a, &self.b, rows)
    }

    /// DoRA's factor on `y` `[rows, .., output]`, which has no bias in it yet.
    pub(crate) fn gained(&self, y: Array, rows: &Rows) -> Result<Array, LmError> {
        let Some(gains) = &self.gains else { return Ok(y) };
        let gained = ops::multiply(rows.of_each(gains, y.ndim())?.as_dtype(y.dtype())?, &y)?;
        rows.choose(&y, &gained)
    }

    pub(crate) fn has_gains(&self) -> bool {
        self.gains.is_some()
    }

    /// The same for experts `indices` of a stack of `n_experts`, as [`Experts::forward`](crate::linear::Experts::forward) takes them.
    pub(crate) fn add_to_routed(&self, y: &Array, x: &Array, indices: &Array, n_experts: i32, rows: &Rows) -> Result<Array, LmError> {
        let count = Array::from_int(n_experts).as_dtype(Dtype::Uint32)?;
        let first = ops::multiply(rows.places(indices.ndim())?, count)?;
        let own = ops::add(first, indices.as_dtype(Dtype::Uint32)?)?;
        let z = ops::gather_mm(ops::gather_mm(x, &self.a, None, &own, false)?, &self.b, None, &own, false)?;
        self.sum(y, &z, rows)
    }

    /// `y` `[rows, .., dims]` are the rows `ids` of the table.
    pub(crate) fn add_to_table_rows(&self, y: &Array, ids: &Array, rows: &Rows) -> Result<Array, LmError> {
        let (vocab, rank) = (self.a.dim(1), self.a.dim(2));
        let first = ops::multiply(rows.places(ids.ndim())?, Array::from_int(vocab).as_dtype(Dtype::Uint32)?)?;
        let own = ops::add(first, ids.as_dtype(Dtype::Uint32)?)?;
        let x = self.a.reshape(&[-1, rank])?.take_axis(&own, 0)?;
        let z = self.products(&x, &[&self.b], rows)?.reshape(y.shape())?;
        let out = self.sum(y, &z, rows)?;
        let Some(gains) = &self.gains else { return Ok(out) };
        let gain = gains.flatten(None, None)?.take_axis(&own, 0)?.expand_dims(-1)?;
        rows.choose(y, &ops::multiply(gain.as_dtype(y.dtype())?, &out)?)
    }

    /// `y` `[rows, .., vocab]` are the logits of `x` with the table as a head.
    pub(crate) fn add_to_logits(&self, y: &Array, x: &Array, rows: &Rows) -> Result<Array, LmError> {
        let out = self.add_product(y, x, &self.b.swap_axes(-1, -2)?, &self.a.swap_axes(-1, -2)?, rows)?;
        self.gained(out, rows)
    }

    fn add_product(&self, y: &Array, x: &Array, first: &Array, second: &Array, rows: &Rows) -> Result<Array, LmError> {
        let z = self.products(x, &[first, second], rows)?.reshape(y.shape())?;
        self.sum(y, &z, rows)
    }

    /// `x` `[rows, .., input]` times each row's own matrix of one stack after the other: `[rows, tokens, output]`.
    fn products(&self, x: &Array, stacks: &[&Array], rows: &Rows) -> Result<Array, LmError> {
        let n = rows.len();
        if n > 1 && x.dim(0) != n {
            return Err(LmError::Mlx(format!("{n} rows have adapters, an input is {:?}", x.shape())));
        }
        let mut z = x.reshape(&[n, -1, x.dim(-1)])?;
        for stack in stacks {
            z = ops::gather_mm(&z, *stack, None, rows.flat_places(), false)?;
        }
        Ok(z)
    }

    fn sum(&self, y: &Array, z: &Array, rows: &Rows) -> Result<Array, LmError> {
        let scaled = ops::multiply(rows.of_each(&self.scales, z.ndim())?, z)?.as_dtype(y.dtype())?;
        rows.choose(y, &ops::add(y, scaled)?)
    }
}

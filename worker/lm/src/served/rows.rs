//! Which adapter each row of a step is for, while the step's graph is built.
//!
//! It is beside the arguments of the blocks, as the order of collectives is (`group::in_order`): only matrices that adapters sit on ask for it.

use crate::{error::LmError, ffi, packing::Span};
use mlx_rs::{Array, Dtype, ops};
use std::cell::RefCell;

thread_local! {
    /// None where no row has an adapter.
    static CURRENT: RefCell<Option<Rows>> = const { RefCell::new(None) };
}

/// The slots of rows along the first axis of what blocks are given; one row stands for all there are.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    /// `[rows]`: 0 for the model itself, else one more than the adapter's place in the stacks.
    slots: Array,
    /// `[rows]`: where in the stacks, also (then for nothing) where there is none.
    places: Array,
    /// `[rows]`
    has_none: Array,
}

impl Rows {
    /// `slots` `[rows]`, whole numbers.
    pub(crate) fn new(slots: &Array) -> Result<Self, LmError> {
        let slots = slots.as_dtype(Dtype::Int32)?;
        let places = ops::maximum(ops::subtract(&slots, Array::from_int(1))?, Array::from_int(0))?.as_dtype(Dtype::Uint32)?;
        Ok(Self { has_none: ops::eq(&slots, Array::from_int(0))?, places, slots })
    }

    /// `[rows]`
    pub(crate) fn slots(&self) -> &Array {
        &self.slots
    }

    pub(crate) fn len(&self) -> i32 {
        self.slots.dim(0)
    }

    /// `[rows, 1 ..]` of as many axes as `like`, to index with.
    pub(crate) fn places(&self, n_axes: usize) -> Result<Array, LmError> {
        Ok(self.places.reshape(&self.shape(n_axes, &[]))?)
    }

    /// `[rows]`
    pub(crate) fn flat_places(&self) -> &Array {
        &self.places
    }

    /// What each row has of `[adapters, ..]`, as `[rows, 1 .., ..]` of as many axes as wanted.
    pub(crate) fn of_each(&self, array: &Array, n_axes: usize) -> Result<Array, LmError> {
        Ok(array.take_axis(&self.places, 0)?.reshape(&self.shape(n_axes, &array.shape()[1..]))?)
    }

    /// `with` where a row has an adapter, `without` (the same bits as if there were none) where not; both `[rows, ..]`.
    pub(crate) fn choose(&self, without: &Array, with: &Array) -> Result<Array, LmError> {
        Ok(ops::select(self.has_none.reshape(&self.shape(without.ndim(), &[]))?, without, with)?)
    }

    fn shape(&self, n_axes: usize, last: &[i32]) -> Vec<i32> {
        let mut shape = vec![1; n_axes];
        shape[0] = self.len();
        let from = n_axes.saturating_sub(last.len());
        shape[from..].iter_mut().zip(last).for_each(|(dim, wanted)| *dim = *wanted);
        shape
    }
}

/// Builds with these rows; what was before is there again afterwards.
pub(crate) fn with<T>(rows: Option<Rows>, build: impl FnOnce() -> T) -> T {
    let outer = CURRENT.replace(rows);
    let built = build();
    CURRENT.replace(outer);
    built
}

pub(crate) fn current() -> Option<Rows> {
    CURRENT.with_borrow(Clone::clone)
}

/// Builds with those rows of the current ones that are at `indices` `[n]`.
pub(crate) fn with_picked<T>(indices: &Array, build: impl FnOnce() -> Result<T, LmError>) -> Result<T, LmError> {
    match current().filter(|rows| rows.len() > 1) {
        Some(rows) => with(Some(Rows::new(&rows.slots.take_axis(indices, 0)?)?), build),
        None => build(),
    }
}

/// Builds for a segment alone, whose tokens all have the same adapter.
pub(crate) fn with_span<T>(span: &Span, build: impl FnOnce() -> Result<T, LmError>) -> Result<T, LmError> {
    match current().filter(|rows| rows.len() > 1) {
        Some(rows) => with(Some(Rows::new(&ffi::slice(&rows.slots, &[span.row], &[span.row + 1])?)?), build),
        None => build(),
    }
}

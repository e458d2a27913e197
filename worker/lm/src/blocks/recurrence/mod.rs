//! Mixers whose memory of a sequence has a fixed size: what they have in common.

mod convolution;
mod delta_rule;
mod fused;
mod gated_delta;
mod gated_norm;
mod selective_scan;
mod short_convolution;
mod state_space;

pub(super) use gated_delta::{GatedDelta, GatedDeltaMerge, GatedDeltaProject};
pub(super) use selective_scan::{SelectiveScan, SelectiveScanMerge, SelectiveScanProject};
pub(super) use short_convolution::{ShortConvolution, ShortConvolutionMerge, ShortConvolutionProject};
pub(super) use state_space::{StateSpace, StateSpaceMerge, StateSpaceProject};

use crate::{cache::RecurrentState, error::LmError, parameters::Parameters, served::Adaptable};
use mlx_rs::{Array, Dtype};

/// The part of a recurrent mixer that stands at its state.
#[derive(Debug, Clone)]
pub enum Recurrence {
    GatedDelta(GatedDelta),
    SelectiveScan(SelectiveScan),
    ShortConvolution(ShortConvolution),
    StateSpace(StateSpace),
}

impl Recurrence {
    /// Runs the new tokens of one sequence and moves its state on.
    pub fn forward(&self, rows: &[Array], state: &mut RecurrentState) -> Result<Array, LmError> {
        if state.arrays.is_empty() {
            let dtype = rows.first().map_or(Dtype::Float32, Array::dtype);
            state.arrays = self.initial_state(dtype)?;
        }
        let (y, moved) = self.step(rows, &state.arrays)?;
        state.arrays = moved;
        Ok(y)
    }

    /// The state before the first token, for activations of this type.
    fn initial_state(&self, dtype: Dtype) -> Result<Vec<Array>, LmError> {
        match self {
            Self::GatedDelta(inner) => inner.initial_state(dtype),
            Self::SelectiveScan(inner) => inner.initial_state(dtype),
            Self::ShortConvolution(inner) => inner.initial_state(dtype),
            Self::StateSpace(inner) => inner.initial_state(dtype),
        }
    }

    /// What comes out, and the state after: a pure function, so that it can be compiled.
    pub fn step(&self, rows: &[Array], state: &[Array]) -> Result<(Array, Vec<Array>), LmError> {
        match self {
            Self::GatedDelta(inner) => inner.step(rows, state),
            Self::SelectiveScan(inner) => inner.step(rows, state),
            Self::ShortConvolution(inner) => inner.step(rows, state),
            Self::StateSpace(inner) => inner.step(rows, state),
        }
    }
}

impl Parameters for Recurrence {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        match self {
            Self::GatedDelta(inner) => inner.each(visit),
            Self::SelectiveScan(inner) => inner.each(visit),
            Self::ShortConvolution(inner) => inner.each(visit),
            Self::StateSpace(inner) => inner.each(visit),
        }
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        match self {
            Self::GatedDelta(inner) => inner.each_mut(visit),
            Self::SelectiveScan(inner) => inner.each_mut(visit),
            Self::ShortConvolution(inner) => inner.each_mut(visit),
            Self::StateSpace(inner) => inner.each_mut(visit),
        }
    }

    fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        match self {
            Self::GatedDelta(inner) => inner.each_matrix(visit),
            Self::SelectiveScan(inner) => inner.each_matrix(visit),
            Self::ShortConvolution(inner) => inner.each_matrix(visit),
            Self::StateSpace(inner) => inner.each_matrix(visit),
        }
    }
}

/// The one array of a list that is known to hold one.
pub(super) fn only(arrays: &[Array]) -> Result<&Array, LmError> {
    match arrays {
        [array] => Ok(array),
        _ => Err(LmError::Mlx(format!("a mixer got {} arrays, wanted 1", arrays.len()))),
    }
}

/// The parts of an array that was split in three.
fn three(parts: Vec<Array>) -> Result<[Array; 3], LmError> {
    <[Array; 3]>::try_from(parts).map_err(|parts| LmError::Mlx(format!("a split gave {} parts, wanted 3", parts.len())))
}

//! MLPs go by their inner width; experts the same way inside, or, where that is too narrow, some whole experts a rank.

use super::{
    shares,
    splitter::{Splitter, scaled},
};
use crate::spec::{Activation, ExpertInputs, MlpInputs, MlpSpec, MoeSpec};
use std::ops::Range;

/// Inner widths are cut at multiples of this where that leaves enough of it for each rank: kernels like it.
const TILE: u32 = 64;
const TILES_PER_RANK: u32 = 8;

impl Splitter<'_> {
    pub(super) fn split_mlp(&mut self, mlp: &mut MlpSpec) {
        // Its threshold is a statistic of the whole row.
        if matches!(mlp.activation, Activation::SparseGeluTanh { .. }) {
            return;
        }
        let inner = mlp.inner_dims();
        let Some(range) = self.inner_range(&mlp.down.path, inner) else { return };
        match &mut mlp.inputs {
            MlpInputs::Gated { gate, up } => {
                self.rows(gate, vec![range.clone()]);
                self.rows(up, vec![range.clone()]);
            }
            MlpInputs::GatedFused(linear) => self.rows(linear, vec![range.clone(), scaled(&range, 1, inner)]),
            MlpInputs::Plain(linear) => self.rows(linear, vec![range.clone()]),
        }
        self.columns(&mut mlp.down, vec![range]);
    }

    pub(super) fn split_experts(&mut self, moe: &mut MoeSpec) {
        if let Some(shared) = &mut moe.shared {
            self.split_mlp(&mut shared.mlp);
        }
        let experts = &mut moe.experts;
        let inputs = match &mut experts.inputs {
            ExpertInputs::Gated { gate, up } => vec![gate, up],
            ExpertInputs::Plain(up) => vec![up],
        };
        let whole_row = matches!(experts.activation, Activation::SparseGeluTanh { .. });
        let inner = self.inner_range(&experts.down.path, experts.down.input_dims).filter(|_| !whole_row);
        if let Some(range) = inner {
            inputs.into_iter().for_each(|input| self.expert_rows(input, vec![range.clone()]));
            self.expert_columns(&mut experts.down, vec![range]);
        } else if let Some(parts) = shares::divide(experts.down.n_experts, self.shares()) {
            let range = self.own(&parts);
            inputs.into_iter().for_each(|input| self.some_experts(input, range.clone()));
            self.some_last_experts(&mut experts.down, range);
        }
    }

    fn inner_range(&self, down: &str, inner: u32) -> Option<Range<u32>> {
        let unit = self.input_unit(down);
        let tiled = shares::lcm(unit, TILE);
        let wide = inner.is_multiple_of(tiled) && inner / tiled >= TILES_PER_RANK * self.shares().len() as u32;
        let parts = shares::divide_by(inner, if wide { tiled } else { unit }, self.shares())?;
        Some(self.own(&parts))
    }
}

//! Mixers with a state go by heads or channels: each has its own part of the state.

use super::{
    attention::is_root_mean_square,
    shares::{self, Heads},
    splitter::{Splitter, length, scaled},
};
use crate::spec::{
    GatedDeltaProjections, GatedDeltaSpec, GatedNorm, SelectiveScanSpec, ShortConvolutionSpec, StateSpaceInputs, StateSpaceSpec,
};
use std::ops::Range;

impl Splitter<'_> {
    /// Key heads, each with the value heads that share it.
    pub(super) fn split_gated_delta(&mut self, spec: &mut GatedDeltaSpec) {
        let GatedDeltaSpec { n_key_heads, n_value_heads, key_dim, value_dim, .. } = *spec;
        let per_key = n_value_heads / n_key_heads.max(1);
        let unit = self.units_of(&spec.output.path, per_key * value_dim);
        let Some(parts) = shares::divide_by(n_key_heads, unit, self.shares()) else { return };
        let heads = self.own(&parts);
        let keys = n_key_heads * key_dim;
        let qkv_rows = vec![scaled(&heads, key_dim, 0), scaled(&heads, key_dim, keys), scaled(&heads, per_key * value_dim, 2 * keys)];
        match &mut spec.projections {
            GatedDeltaProjections::ByKeyHead { qkvz, ba } => {
                self.rows(qkvz, vec![scaled(&heads, 2 * key_dim + 2 * per_key * value_dim, 0)]);
                self.rows(ba, vec![scaled(&heads, 2 * per_key, 0)]);
            }
            GatedDeltaProjections::Separate { qkv, z, b, a } => {
                self.rows(qkv, qkv_rows.clone());
                self.rows(z, vec![scaled(&heads, per_key * value_dim, 0)]);
                self.rows(b, vec![scaled(&heads, per_key, 0)]);
                self.rows(a, vec![scaled(&heads, per_key, 0)]);
            }
        }
        self.channels(&mut spec.convolution, qkv_rows);
        self.tensor_rows(&mut spec.dt_bias, vec![scaled(&heads, per_key, 0)]);
        self.tensor_rows(&mut spec.a_log, vec![scaled(&heads, per_key, 0)]);
        self.columns(&mut spec.output, vec![scaled(&heads, per_key * value_dim, 0)]);
        spec.n_key_heads = heads.end - heads.start;
        spec.n_value_heads = spec.n_key_heads * per_key;
    }

    /// Heads; what a group of them shares (B and C) goes with them.
    pub(super) fn split_state_space(&mut self, spec: &mut StateSpaceSpec) {
        let StateSpaceSpec { n_heads, head_dim, state_dim, n_groups, .. } = *spec;
        let Some(unit) = self.state_space_unit(spec) else { return };
        let Some(divided) = shares::divide_heads(n_heads, n_groups, unit, self.shares()) else { return };
        let Heads { queries: heads, shared: groups } = self.own(&divided);
        let inner = n_heads * head_dim;
        let own = scaled(&heads, head_dim, 0);
        let group_rows = |offset: u32| groups.iter().map(|group| scaled(&(*group..group + 1), state_dim, offset)).collect::<Vec<_>>();
        let convolved = |offset: u32| {
            let x = vec![scaled(&heads, head_dim, offset)];
            [x, group_rows(offset + inner), group_rows(offset + inner + n_groups * state_dim)].concat()
        };
        match &mut spec.inputs {
            StateSpaceInputs::Joint(linear) => {
                let time_steps = 2 * inner + 2 * n_groups * state_dim;
                self.rows(linear, [vec![own.clone()], convolved(inner), vec![scaled(&heads, 1, time_steps)]].concat());
                self.channels(&mut spec.convolution, convolved(0));
            }
            StateSpaceInputs::AfterConvolution { gate_and_x, rest } => {
                self.rows(gate_and_x, vec![scaled(&heads, 2 * head_dim, 0)]);
                self.columns(&mut rest.bcdt, vec![own.clone()]);
                self.rows(&mut rest.dt, vec![heads.clone()]);
                self.channels(&mut spec.convolution, vec![own.clone()]);
            }
        }
        for tensor in [&mut spec.dt_bias, &mut spec.a_log, &mut spec.d] {
            self.tensor_rows(tensor, vec![heads.clone()]);
        }
        self.split_gated_norm(&mut spec.gated_norm, &own, inner);
        self.columns(&mut spec.output, vec![own]);
        spec.n_heads = heads.end - heads.start;
        spec.n_groups = groups.len() as u32;
    }

    /// Heads that have to stay together; None where they all do.
    fn state_space_unit(&self, spec: &StateSpaceSpec) -> Option<u32> {
        let mut unit = self.units_of(&spec.output.path, spec.head_dim);
        if let StateSpaceInputs::AfterConvolution { rest, .. } = &spec.inputs {
            if spec.n_groups != 1 {
                return None;
            }
            unit = shares::lcm(unit, self.units_of(&rest.bcdt.path, spec.head_dim));
        }
        match &spec.gated_norm {
            // A norm over a part of the width stays on one rank; one over all of it goes over the ranks.
            GatedNorm::GateThenNorm { groups, .. } if *groups > 1 => {
                let whole = spec.n_heads.is_multiple_of(*groups).then(|| spec.n_heads / groups)?;
                Some(shares::lcm(unit, whole))
            }
            GatedNorm::GateThenNorm { norm, .. } | GatedNorm::NormThenGate { norm } if !is_root_mean_square(norm) => None,
            _ => Some(unit),
        }
    }

    fn split_gated_norm(&mut self, norm: &mut GatedNorm, own: &Range<u32>, inner: u32) {
        let all = 0..own.end - own.start;
        match norm {
            GatedNorm::None => {}
            GatedNorm::GateThenNorm { norm, groups } if *groups > 1 => {
                *groups = all.end / (inner / *groups);
                norm.dims = all.end;
                let path = norm.path.clone();
                self.cut(&path, super::Cut::Output(vec![own.clone()]));
            }
            GatedNorm::GateThenNorm { norm, .. } | GatedNorm::NormThenGate { norm } => {
                self.wide_norm(norm, vec![own.clone()], vec![all]);
            }
        }
    }

    /// Channels; what all of them share (B, C and the time step's low rank) is added up from all ranks.
    pub(super) fn split_selective_scan(&mut self, spec: &mut SelectiveScanSpec) {
        let inner = spec.inner_dim;
        let unit = shares::lcm(self.input_unit(&spec.output.path), self.input_unit(&spec.dt_b_c.path));
        let Some(parts) = shares::divide_by(inner, unit, self.shares()) else { return };
        let own = self.own(&parts);
        self.rows(&mut spec.input, vec![own.clone(), scaled(&own, 1, inner)]);
        self.channels(&mut spec.convolution, vec![own.clone()]);
        self.columns(&mut spec.dt_b_c, vec![own.clone()]);
        self.rows(&mut spec.dt, vec![own.clone()]);
        self.tensor_rows(&mut spec.a_log, vec![own.clone()]);
        self.tensor_rows(&mut spec.d, vec![own.clone()]);
        spec.inner_dim = length(std::slice::from_ref(&own));
        self.columns(&mut spec.output, vec![own]);
    }

    pub(super) fn split_short_convolution(&mut self, spec: &mut ShortConvolutionSpec) {
        let channels = spec.convolution.channels;
        let Some(parts) = shares::divide_by(channels, self.input_unit(&spec.output.path), self.shares()) else { return };
        let own = self.own(&parts);
        self.rows(&mut spec.input, (0..3).map(|part| scaled(&own, 1, part * channels)).collect());
        self.channels(&mut spec.convolution, vec![own.clone()]);
        self.columns(&mut spec.output, vec![own]);
    }
}

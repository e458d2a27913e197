//! Root-mean-square norm (Zhang and Sennrich 2019).

use crate::{error::LmError, linear::Parameters, weights::Weights};
use mlx_cluster_common::spec::NormSpec;
use mlx_rs::{Array, fast};

#[derive(Debug, Clone)]
pub struct Norm {
    weight: Array,
    pub(super) eps: f32,
}

impl Norm {
    pub fn load(weights: &mut Weights, spec: &NormSpec) -> Result<Self, LmError> {
        Ok(Self { weight: weights.take(&format!("{}.weight", spec.path))?, eps: spec.eps })
    }

    pub fn load_optional(weights: &mut Weights, spec: &Option<NormSpec>) -> Result<Option<Self>, LmError> {
        spec.as_ref().map(|spec| Norm::load(weights, spec)).transpose()
    }

    /// Over the last axis.
    pub fn forward(&self, x: &Array) -> Result<Array, LmError> {
        Ok(fast::rms_norm(x, Some(&self.weight), self.eps)?)
    }
}

impl Parameters for Norm {
    fn each<'a>(&'a self, visit: &mut dyn FnMut(&'a Array)) {
        visit(&self.weight);
    }

    fn each_mut(&mut self, visit: &mut dyn FnMut(&mut Array)) {
        visit(&mut self.weight);
    }
}

//! Norms over the last axis.

use crate::{error::LmError, group::Group, parameters::parameters, weights::Weights};
use mlx_cluster_common::{
    spec::{NormKind, NormSpec},
    tensor::WideNorm,
};
use mlx_rs::{Array, Dtype, fast, ops};

#[derive(Debug, Clone)]
pub(super) struct Norm {
    kind: NormKind,
    weight: Option<Array>,
    bias: Option<Array>,
    eps: f32,
    wide: Option<Wide>,
}
parameters!(Norm: weight, bias);

/// Entries of other ranks that belong to the mean.
#[derive(Debug, Clone)]
struct Wide {
    group: Group,
    /// 1 for entries that this rank counts, 0 for copies of what another counts: `[own]`.
    counted: Array,
    dims: i32,
}

impl Norm {
    pub(super) fn load(weights: &mut Weights, spec: &NormSpec) -> Result<Self, LmError> {
        let weight = match spec.kind {
            NormKind::RmsUnweighted | NormKind::LayerUnweighted => None,
            NormKind::Rms { offset } if offset != 0.0 => {
                let weight = weights.take(&format!("{}.weight", spec.path))?;
                Some(ops::add(Array::from_f32(offset).as_dtype(weight.dtype())?, &weight)?)
            }
            NormKind::Rms { .. } | NormKind::Layer { .. } => Some(weights.take(&format!("{}.weight", spec.path))?),
        };
        let bias = match spec.kind {
            NormKind::Layer { bias: true } => Some(weights.take(&format!("{}.bias", spec.path))?),
            _ => None,
        };
        let wide = weights.wide_norm(&spec.path).filter(|_| !spec.path.is_empty()).map(|(wide, group)| Wide::new(&wide, group));
        match (&wide, spec.kind) {
            (None, _) | (Some(_), NormKind::Rms { .. }) => Ok(Self { kind: spec.kind, weight, bias, eps: spec.eps, wide }),
            (Some(_), _) => Err(LmError::Group(format!("the norm {} cannot go over several ranks", spec.path))),
        }
    }

    pub(super) fn load_optional(weights: &mut Weights, spec: &Option<NormSpec>) -> Result<Option<Self>, LmError> {
        spec.as_ref().map(|spec| Norm::load(weights, spec)).transpose()
    }

    pub(super) fn forward(&self, x: &Array) -> Result<Array, LmError> {
        if let Some(wide) = &self.wide {
            return wide.root_mean_square(x, self.weight.as_ref(), self.eps);
        }
        Ok(match self.kind {
            NormKind::Rms { .. } | NormKind::RmsUnweighted => fast::rms_norm(x, self.weight.as_ref(), self.eps)?,
            NormKind::Layer { .. } | NormKind::LayerUnweighted => fast::layer_norm(x, self.weight.as_ref(), self.bias.as_ref(), self.eps)?,
        })
    }
}

impl Wide {
    fn new(spec: &WideNorm, group: Group) -> Self {
        let is_counted = |entry: u32| spec.counted.iter().any(|range| range.contains(&entry));
        let counted = Array::from_iter((0..spec.own).map(|entry| f32::from(u8::from(is_counted(entry)))), &[spec.own as i32]);
        Self { group, counted, dims: spec.dims as i32 }
    }

    /// The root-mean-square norm in f32, as MLX's own, with the squares of all ranks.
    fn root_mean_square(&self, x: &Array, weight: Option<&Array>, eps: f32) -> Result<Array, LmError> {
        let exact = x.as_dtype(Dtype::Float32)?;
        let squares = ops::multiply(exact.square()?, &self.counted)?.sum_axis(-1, true)?;
        let mean = ops::divide(self.group.all_sum(&squares)?, Array::from_f32(self.dims as f32))?;
        let normed = ops::multiply(exact, ops::rsqrt(ops::add(mean, Array::from_f32(eps))?)?)?.as_dtype(x.dtype())?;
        weight.map_or(Ok(normed.clone()), |weight| Ok(ops::multiply(&normed, weight)?))
    }
}

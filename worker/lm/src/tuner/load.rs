//! From a model's files and a training role to a stage that can be trained.

use super::{
    pieces::Pieces,
    random,
    stage::{Segment, TrainedStage, Training},
    state::{Others, TrainState},
};
use crate::{adapter::norm_of_rows, entries::spread, error::LmError, group::Group, linear::Matrix, weights::Weights};
use mlx_cluster_common::{
    spec::{ModelSpec, Part},
    tensor::{Cut, RankModel, holdings},
    training::{FineTune, Module, Trained, TrainingRole},
    weights::{WeightIndex, WeightMap},
};
use mlx_rs::{Array, ops, transforms};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
};

/// Where a stage comes from.
pub struct Source<'a> {
    pub folder: &'a Path,
    pub index: &'a WeightIndex,
    /// The whole model, of which `rank` is a part where matrices are split.
    pub spec: &'a ModelSpec,
    pub weights: &'a WeightMap,
    pub rank: RankModel,
    pub layers: Range<u32>,
    pub role: TrainingRole,
    /// See [`Training::group`].
    pub group: Option<Group>,
    /// Matrices are split over the group.
    pub is_split: bool,
}

/// DoRA's magnitudes that start as the lengths of the matrix's rows, by name: the modules.
pub(super) type Magnitudes = BTreeMap<String, Module>;

impl Source<'_> {
    /// Reads the stage's parameters. `progress` is told the bytes that are in memory.
    pub fn load(self, mut progress: impl FnMut(u64)) -> Result<TrainedStage, LmError> {
        let Source { spec, weights, role, layers, .. } = &self;
        let cannot = |error: mlx_cluster_common::training::TrainedError| LmError::NotTrained(error.to_string());
        let trained = spec.trained(weights, &role.fine_tune, role.num_layers).map_err(cannot)?;
        let own_parts: BTreeSet<Part> = self.rank.spec.parts_of(layers.clone()).into_iter().collect();
        let is_before = |part: &Part| match part {
            Part::Embedding | Part::LayerInputs => layers.start > 0,
            Part::Layer(layer) => *layer < layers.start,
            Part::FinalNorm | Part::Head => false,
        };
        let gives_gradients = trained.iter().any(|(part, own)| is_before(part) && !own.is_empty());
        let all: Vec<Part> = own_parts.iter().copied().collect();
        let loaded = Weights::load(self.folder, self.index, &self.rank.weights, &all, &mut progress)?;
        let loaded = match &self.group {
            Some(group) if self.is_split => loaded.of_rank(self.rank.split.clone(), group.clone()),
            _ => loaded,
        };
        let (parameters, magnitudes) = self.parameters(&trained, &own_parts, &loaded)?;
        let segments = segments(layers.clone(), role.grad_checkpoint).into_iter().map(|range| {
            let parts: BTreeSet<Part> = self.rank.spec.parts_of(range.clone()).into_iter().collect();
            let names: Vec<String> =
                trained.iter().filter(|(part, _)| parts.contains(part)).flat_map(|(_, own)| own.iter().map(|p| p.name.clone())).collect();
            let is_trained: BTreeSet<&str> = names.iter().map(String::as_str).collect();
            let of_parts = parts.iter().filter_map(|part| self.rank.weights.parts.get(part)).flatten();
            let frozen = of_parts.map(|parameter| parameter.name.as_str()).filter(|name| !is_trained.contains(name));
            Segment { layers: range, frozen: loaded.only(frozen), trained: names }
        });
        let segments = segments.collect();
        let others = match &self.group {
            None => Others::None,
            Some(group) if self.is_split && role.fine_tune == FineTune::Full => {
                Others::Parts(Pieces::new(group.clone(), holdings(spec, weights, &group.place().shares)))
            }
            Some(group) => Others::Same(group.clone()),
        };
        let state = TrainState::new(parameters, role.optimizer.clone(), role.schedule.clone(), others)?;
        let training = Training { role: self.role, group: self.group, gives_gradients };
        Ok(TrainedStage::new(self.rank.spec, segments, state, magnitudes, training))
    }

    /// What is trained of the stage's parts, as it starts.
    fn parameters(
        &self,
        trained: &BTreeMap<Part, Vec<Trained>>,
        parts: &BTreeSet<Part>,
        loaded: &Weights,
    ) -> Result<(BTreeMap<String, Array>, Magnitudes), LmError> {
        let own = trained.iter().filter(|(part, _)| parts.contains(part)).flat_map(|(_, own)| own);
        let modules: BTreeMap<String, Module> =
            parts.iter().flat_map(|part| self.spec.modules(*part)).map(|module| (module.path.clone(), module)).collect();
        let (mut parameters, mut magnitudes) = (BTreeMap::new(), BTreeMap::new());
        for Trained { name, shape, .. } in own {
            let shape: Vec<i32> = shape.iter().map(|dim| *dim as i32).collect();
            let factor = name.rsplit_once('.').and_then(|(path, factor)| Some((modules.get(path)?, factor)));
            let array = match (&self.role.fine_tune, factor) {
                (FineTune::Full, _) => loaded.get(name).cloned().ok_or_else(|| LmError::NotLoaded { name: name.clone() })?,
                (_, Some((module, "lora_a"))) => {
                    let bound = (f64::from(module.shape.fan_in())).sqrt().recip() as f32;
                    random::uniform(self.role.seed, name, &shape, -bound, bound)?
                }
                (_, Some((_, "lora_b"))) => ops::zeros::<f32>(&shape)?,
                (_, Some((module, _))) => {
                    magnitudes.insert(name.clone(), module.clone());
                    ops::zeros::<f32>(&shape)?
                }
                (_, None) => return Err(LmError::NotLoaded { name: name.clone() }),
            };
            parameters.insert(name.clone(), array);
        }
        transforms::eval(parameters.values())?;
        Ok((parameters, magnitudes))
    }
}

/// The lengths of a matrix's rows, whole on every rank.
pub(super) fn magnitude(frozen: &Weights, spec: &ModelSpec, module: &Module, group: Option<&Group>) -> Result<Array, LmError> {
    let matrix = Matrix::of(frozen, &module.path, &spec.quantization)?.dense()?.as_dtype(mlx_rs::Dtype::Float32)?;
    let (Some(group), Some(cut)) = (group, frozen.cut(&module.path)) else { return norm_of_rows(&matrix) };
    match cut {
        Cut::Input(_) => Ok(ops::sqrt(group.all_sum(&matrix.square()?.sum_axis(1, false)?)?)?),
        // Rows that several ranks have are counted as often.
        Cut::Output(ranges) => {
            let (own, length) = (norm_of_rows(&matrix)?, module.shape.magnitudes() as i32);
            let sum = group.all_sum(&spread(&own, 0, length, &ranges)?)?;
            let counts = spread(&ops::ones_like(&own)?, 0, length, &ranges)?;
            Ok(ops::divide(sum, group.all_sum(&counts)?)?)
        }
        Cut::Member(_) => Err(LmError::Adapter { path: module.path.clone(), cause: "DoRA does not work on stacks".into() }),
    }
}

/// Without checkpointing all layers are one; with it each is one of its own.
fn segments(layers: Range<u32>, checkpoint: bool) -> Vec<Range<u32>> {
    match checkpoint {
        true => layers.map(|layer| layer..layer + 1).collect(),
        false => vec![layers],
    }
}

//! Which modules of a model an adapter sits on, and which parameters a run trains.

use super::{FineTune, LoraParameters};
use crate::{
    spec::{ModelSpec, Part, Weight},
    weights::WeightMap,
};
use std::collections::{BTreeMap, BTreeSet};

/// A matrix that can have low-rank factors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    pub path: String,
    pub shape: ModuleShape,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleShape {
    Linear { input: u32, output: u32 },
    Experts { n: u32, input: u32, output: u32 },
    Table { rows: u32, dims: u32 },
}

/// A parameter that a run trains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainedParameter {
    pub name: String,
    pub shape: Vec<u32>,
}

/// Why nothing can be trained so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrainedError {
    #[error("`num_layers` is {wanted}, the model has {layers} layers: use at most {layers}, or -1 for all")]
    TooManyLayers { wanted: u32, layers: u32 },
    #[error("no module of the model is called `{key}` (a key of `lora_parameters`){}", hint.as_ref().map(|hint| format!("; did you mean `{hint}`?")).unwrap_or_default())]
    UnknownKey { key: String, hint: Option<String> },
    #[error("{path} is a stack of experts, which DoRA does not work on: leave it out of the keys, or use lora")]
    DoraOnExperts { path: String },
}

impl ModuleShape {
    /// Shapes of the factors `a` and `b`, as mlx-lm has them.
    pub fn factors(self, rank: u32) -> (Vec<u32>, Vec<u32>) {
        match self {
            ModuleShape::Linear { input, output } => (vec![input, rank], vec![rank, output]),
            ModuleShape::Experts { n, input, output } => (vec![n, rank, input], vec![n, output, rank]),
            ModuleShape::Table { rows, dims } => (vec![rows, rank], vec![rank, dims]),
        }
    }

    /// Entries of DoRA's magnitude.
    pub fn magnitudes(self) -> u32 {
        match self {
            ModuleShape::Linear { output, .. } | ModuleShape::Experts { output, .. } => output,
            ModuleShape::Table { rows, .. } => rows,
        }
    }

    /// New factors `a` are uniform in plus and minus one by the root of this.
    pub fn fan_in(self) -> u32 {
        match self {
            ModuleShape::Linear { input, .. } | ModuleShape::Experts { input, .. } => input,
            ModuleShape::Table { rows, .. } => rows,
        }
    }
}

impl ModelSpec {
    /// The modules of a part that can have factors: those that are linears, expert stacks or embeddings in mlx-lm too.
    pub fn modules(&self, part: Part) -> Vec<Module> {
        let is_tensor = |path: &str| match part {
            Part::Layer(layer) => self.layers.get(layer as usize).is_some_and(|layer| layer.feed_forward.router_is_tensor(path)),
            _ => false,
        };
        let module = |weight: Weight<'_>| {
            let shape = match weight {
                Weight::Linear(linear) => ModuleShape::Linear { input: linear.input_dims, output: linear.output_dims },
                Weight::Experts(experts) => {
                    ModuleShape::Experts { n: experts.n_experts, input: experts.input_dims, output: experts.output_dims }
                }
                Weight::Embedding(embedding) => ModuleShape::Table { rows: embedding.vocab_size, dims: embedding.dims },
                Weight::HeadLinear(_) | Weight::Norm(_) | Weight::Convolution(_) | Weight::Tensor(_) => return None,
            };
            Some(Module { path: weight.path().to_owned(), shape }).filter(|module| !is_tensor(&module.path))
        };
        self.weights(part).into_iter().filter_map(module).collect()
    }

    /// The modules that have factors, by part. As in mlx-lm, keys are paths inside a layer, for the last `num_layers`, or whole paths.
    pub fn adapted(&self, parameters: &LoraParameters, num_layers: Option<u32>) -> Result<BTreeMap<Part, Vec<Module>>, TrainedError> {
        let first = self.first_trained(num_layers)?;
        let mut adapted: BTreeMap<Part, Vec<Module>> = BTreeMap::new();
        let mut met = BTreeSet::new();
        for part in self.parts() {
            for module in self.modules(part) {
                let inside = inside_layer(&module.path, part);
                let is_late = matches!(part, Part::Layer(layer) if layer >= first);
                let wanted = match &parameters.keys {
                    None => is_late,
                    Some(keys) => {
                        let key = [Some(module.path.as_str()), inside].into_iter().flatten().find(|key| keys.contains(*key));
                        met.extend(key.map(str::to_owned));
                        keys.contains(&module.path) || (is_late && inside.is_some_and(|inside| keys.contains(inside)))
                    }
                };
                if wanted {
                    adapted.entry(part).or_default().push(module);
                }
            }
        }
        match parameters.keys.iter().flatten().find(|key| !met.contains(*key)) {
            Some(key) => Err(TrainedError::UnknownKey { key: key.clone(), hint: self.nearest_module(key) }),
            None => Ok(adapted),
        }
    }

    /// Every parameter that a run trains, by part.
    pub fn trained(
        &self,
        weights: &WeightMap,
        fine_tune: &FineTune,
        num_layers: Option<u32>,
    ) -> Result<BTreeMap<Part, Vec<TrainedParameter>>, TrainedError> {
        let Some(parameters) = fine_tune.lora() else {
            let first = self.first_trained(num_layers)?;
            let whole = (first..self.n_layers()).map(Part::Layer).map(|part| {
                // Quantised modules stay as they are, with their biases.
                let all = weights.parts.get(&part).map(Vec::as_slice).unwrap_or_default();
                let quantised: BTreeSet<&str> = all.iter().filter_map(|parameter| parameter.name.strip_suffix(".scales")).collect();
                let is_quantised = |name: &str| name.rsplit_once('.').is_some_and(|(path, _)| quantised.contains(path));
                let parameters = all.iter().filter(|parameter| parameter.dtype.is_float() && !is_quantised(&parameter.name));
                let parameter = |parameter: &crate::weights::Parameter| TrainedParameter {
                    name: parameter.name.clone(),
                    shape: parameter.shape.iter().map(|dim| *dim as u32).collect(),
                };
                (part, parameters.map(parameter).collect())
            });
            return Ok(whole.collect());
        };
        let is_dora = matches!(fine_tune, FineTune::Dora(_));
        let mut trained: BTreeMap<Part, Vec<TrainedParameter>> = BTreeMap::new();
        for (part, modules) in self.adapted(parameters, num_layers)? {
            for Module { path, shape } in modules {
                if is_dora && matches!(shape, ModuleShape::Experts { .. }) {
                    return Err(TrainedError::DoraOnExperts { path });
                }
                let (a, b) = shape.factors(parameters.rank);
                let own = trained.entry(part).or_default();
                own.push(TrainedParameter { name: format!("{path}.lora_a"), shape: a });
                own.push(TrainedParameter { name: format!("{path}.lora_b"), shape: b });
                if is_dora {
                    own.push(TrainedParameter { name: format!("{path}.m"), shape: vec![shape.magnitudes()] });
                }
            }
        }
        Ok(trained)
    }

    fn first_trained(&self, num_layers: Option<u32>) -> Result<u32, TrainedError> {
        let layers = self.n_layers();
        let wanted = num_layers.unwrap_or(layers);
        layers.checked_sub(wanted).ok_or(TrainedError::TooManyLayers { wanted, layers })
    }

    fn nearest_module(&self, key: &str) -> Option<String> {
        let names = self.parts().into_iter().flat_map(|part| {
            let inside = move |module: Module| inside_layer(&module.path, part).map_or(module.path.clone(), str::to_owned);
            self.modules(part).into_iter().map(inside)
        });
        let names: BTreeSet<String> = names.collect();
        let last = key.rsplit('.').next().unwrap_or(key);
        names.iter().find(|name| name.rsplit('.').next() == Some(last)).cloned()
    }
}

/// The part of a module's path after its layer's.
fn inside_layer(path: &str, part: Part) -> Option<&str> {
    let Part::Layer(layer) = part else { return None };
    let number = format!(".{layer}.");
    path.find(&number).map(|at| &path[at + number.len()..])
}

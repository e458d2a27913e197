//! Which modules of a model an adapter sits on.

use super::{FineTune, LoraParameters};
use crate::{
    nearest::near,
    spec::{ModelSpec, Part, Weight},
};
use std::collections::BTreeSet;

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

    /// The modules of a part that have factors. As in mlx-lm, keys are paths inside one of the last `num_layers` layers, or whole paths; without
    /// keys it is all modules of these layers.
    pub fn adapted(&self, part: Part, parameters: &LoraParameters, num_layers: Option<u32>) -> Vec<Module> {
        let is_late = self.is_late(part, num_layers);
        let is_chosen = |module: &Module| match &parameters.keys {
            None => is_late,
            Some(keys) => {
                let inside = inside_layer(&module.path, part).filter(|_| is_late);
                keys.contains(&module.path) || inside.is_some_and(|inside| keys.contains(inside))
            }
        };
        self.modules(part).into_iter().filter(is_chosen).collect()
    }

    /// Whether a part is one of the model's last layers.
    pub(super) fn is_late(&self, part: Part, num_layers: Option<u32>) -> bool {
        match part {
            Part::Layer(layer) => self.n_layers().saturating_sub(layer) <= num_layers.unwrap_or(u32::MAX),
            _ => false,
        }
    }

    /// Whether what is asked for is there, and can be trained so.
    pub(super) fn check_trained(&self, fine_tune: &FineTune, num_layers: Option<u32>) -> Result<(), TrainedError> {
        let layers = self.n_layers();
        if let Some(wanted) = num_layers.filter(|wanted| *wanted > layers) {
            return Err(TrainedError::TooManyLayers { wanted, layers });
        }
        let Some(parameters) = fine_tune.lora() else { return Ok(()) };
        let all = || self.parts().into_iter().flat_map(|part| self.modules(part).into_iter().map(move |module| (part, module)));
        for key in parameters.keys.iter().flatten() {
            if !all().any(|(part, module)| module.path == *key || inside_layer(&module.path, part) == Some(key)) {
                return Err(TrainedError::UnknownKey { key: key.clone(), hint: self.nearest_module(key) });
            }
        }
        let adapted = self.parts().into_iter().flat_map(|part| self.adapted(part, parameters, num_layers));
        let stack = adapted.into_iter().find(|module| matches!(module.shape, ModuleShape::Experts { .. }));
        match stack.filter(|_| matches!(fine_tune, FineTune::Dora(_))) {
            Some(Module { path, .. }) => Err(TrainedError::DoraOnExperts { path }),
            None => Ok(()),
        }
    }

    fn nearest_module(&self, key: &str) -> Option<String> {
        let names = self.parts().into_iter().flat_map(|part| {
            let inside = move |module: Module| inside_layer(&module.path, part).map_or(module.path.clone(), str::to_owned);
            self.modules(part).into_iter().map(inside)
        });
        let names: BTreeSet<String> = names.collect();
        let last = key.rsplit('.').next().unwrap_or(key);
        let same_end = names.iter().find(|name| name.rsplit('.').next() == Some(last)).map(String::as_str);
        same_end.or_else(|| near(key, names.iter().map(String::as_str))).map(str::to_owned)
    }
}

/// The part of a module's path after its layer's.
fn inside_layer(path: &str, part: Part) -> Option<&str> {
    let Part::Layer(layer) = part else { return None };
    let number = format!(".{layer}.");
    path.find(&number).map(|at| &path[at + number.len()..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::read_spec;
    use serde_json::json;

    #[test]
    fn a_key_that_is_no_module_is_named_with_the_nearest() {
        let config = json!({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 32, "tie_word_embeddings": true});
        let spec = read_spec(&config).expect("a valid config");
        let hint = |key: &str| {
            let keys = Some(BTreeSet::from([key.to_owned()]));
            let lora = FineTune::Lora(LoraParameters { rank: 4, scale: 20.0, dropout: 0.0, keys });
            match spec.check_trained(&lora, None) {
                Err(TrainedError::UnknownKey { hint, .. }) => hint,
                other => panic!("{key}: {other:?}"),
            }
        };
        assert_eq!(hint("attention.q_proj").as_deref(), Some("self_attn.q_proj"));
        assert_eq!(hint("self_attn.qproj").as_deref(), Some("self_attn.q_proj"));
        assert_eq!(hint("mlp.dwon_proj").as_deref(), Some("mlp.down_proj"));
        assert_eq!(hint("xyzzyqq"), None);
    }
}

//! Which parameters are trained, and how many numbers an optimizer keeps beside them.

use super::{FineTune, Module, TrainedError, TrainingRole};
use crate::{
    dtype::DType,
    spec::{ModelSpec, Part},
    weights::{Parameter, WeightMap},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// One array that the optimizer changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trained {
    /// `<path>.lora_a`, `<path>.lora_b`, `<path>.m`, or the name of a parameter of the model.
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: DType,
}

impl Trained {
    pub fn numbers(&self) -> u64 {
        self.shape.iter().copied().fold(1, u64::saturating_mul)
    }

    pub fn bytes(&self) -> u64 {
        self.numbers().saturating_mul(self.dtype.size())
    }
}

impl TrainingRole {
    /// What of a part is trained: `spec` and `map` may be those of a tensor-parallel rank.
    pub fn trained(&self, spec: &ModelSpec, map: &WeightMap, part: Part) -> Vec<Trained> {
        trained_of(spec, map, part, &self.fine_tune, self.num_layers)
    }

    /// Whether the first stage and the last one would train the same numbers, each with a part of their gradient.
    pub fn trains_tied_embedding(&self, spec: &ModelSpec, map: &WeightMap) -> bool {
        spec.head.may_be_tied() && !self.trained(spec, map, Part::Embedding).is_empty()
    }

    /// The first layer that has to be gone through on the way back; the number of layers where none has.
    pub fn first_trained_layer(&self, spec: &ModelSpec, map: &WeightMap) -> u32 {
        let is_trained = |part: Part| !self.trained(spec, map, part).is_empty();
        if is_trained(Part::Embedding) || is_trained(Part::LayerInputs) {
            return 0;
        }
        (0..spec.n_layers()).find(|layer| is_trained(Part::Layer(*layer))).unwrap_or(spec.n_layers())
    }
}

fn trained_of(spec: &ModelSpec, map: &WeightMap, part: Part, fine_tune: &FineTune, num_layers: Option<u32>) -> Vec<Trained> {
    match fine_tune {
        FineTune::Full if spec.is_late(part, num_layers) => whole(map, part),
        FineTune::Full => Vec::new(),
        FineTune::Lora(lora) => factors(spec.adapted(part, lora, num_layers), lora.rank, false),
        FineTune::Dora(lora) => factors(spec.adapted(part, lora, num_layers), lora.rank, true),
    }
}

impl ModelSpec {
    /// Everything that a run trains, by part; an error where what is asked for is not there.
    pub fn trained(
        &self,
        map: &WeightMap,
        fine_tune: &FineTune,
        num_layers: Option<u32>,
    ) -> Result<BTreeMap<Part, Vec<Trained>>, TrainedError> {
        self.check_trained(fine_tune, num_layers)?;
        let trained = |part: Part| (part, trained_of(self, map, part, fine_tune, num_layers));
        Ok(self.parts().into_iter().map(trained).filter(|(_, own)| !own.is_empty()).collect())
    }
}

/// How many numbers are trained on a stage with these layers.
pub fn trainable(spec: &ModelSpec, map: &WeightMap, role: &TrainingRole, layers: Range<u32>) -> u64 {
    let trained = spec.parts_of(layers).into_iter().flat_map(|part| role.trained(spec, map, part));
    trained.map(|array| array.numbers()).fold(0, u64::saturating_add)
}

/// Every parameter but those of quantised modules, which stay as they are (as mlx.nn's quantised layers do when a model is unfrozen).
fn whole(map: &WeightMap, part: Part) -> Vec<Trained> {
    let parameters: &[Parameter] = map.parts.get(&part).map(Vec::as_slice).unwrap_or_default();
    let quantised: BTreeSet<&str> = parameters.iter().filter_map(|parameter| parameter.name.strip_suffix(".scales")).collect();
    let is_frozen = |parameter: &Parameter| {
        let module = parameter.name.rsplit_once('.').map_or("", |(module, _)| module);
        quantised.contains(module) || !parameter.dtype.is_float()
    };
    let trained = parameters.iter().filter(|parameter| !is_frozen(parameter));
    trained.map(|parameter| Trained { name: parameter.name.clone(), shape: parameter.shape.clone(), dtype: parameter.dtype }).collect()
}

/// Factors in f32 beside the chosen modules, in the shapes of mlx-lm's adapters.
fn factors(modules: Vec<Module>, rank: u32, magnitudes: bool) -> Vec<Trained> {
    let mut trained = Vec::new();
    for Module { path, shape } in modules {
        let (a, b) = shape.factors(rank);
        let magnitudes = magnitudes.then(|| ("m", vec![shape.magnitudes()]));
        for (suffix, shape) in [("lora_a", a), ("lora_b", b)].into_iter().chain(magnitudes) {
            let shape = shape.into_iter().map(u64::from).collect();
            trained.push(Trained { name: format!("{path}.{suffix}"), shape, dtype: DType::F32 });
        }
    }
    trained
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        architectures::read_spec,
        spec::Weight,
        training::{LoraParameters, Optimizer, Parallel, Schedule, optimizer::Adafactor},
        units::Bytes,
        weights::{TensorEntry, WeightIndex},
    };
    use serde_json::json;

    fn model() -> (ModelSpec, WeightMap) {
        let config = json!({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 32, "tie_word_embeddings": true});
        let spec = read_spec(&config).expect("a valid config");
        let mut index = WeightIndex::default();
        for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
            let shape: Vec<u64> = match weight {
                Weight::Norm(norm) => vec![norm.dims.into()],
                Weight::Embedding(table) => vec![table.vocab_size.into(), table.dims.into()],
                Weight::Linear(linear) => vec![linear.output_dims.into(), linear.input_dims.into()],
                _ => unreachable!("a llama has no others"),
            };
            let bytes = shape.iter().product::<u64>() * 2;
            let entry = TensorEntry { file: "model.safetensors".into(), dtype: DType::BF16, shape, offset: 0, bytes };
            index.tensors.insert(format!("{}.weight", weight.path()), entry);
        }
        let map = WeightMap::assign(&spec, &index).expect("complete");
        (spec, map)
    }

    fn role(fine_tune: FineTune, num_layers: Option<u32>) -> TrainingRole {
        TrainingRole {
            fine_tune,
            num_layers,
            optimizer: Optimizer::Sgd { momentum: 0.0, weight_decay: 0.0, dampening: 0.0, nesterov: false },
            schedule: Schedule::constant(1e-5),
            seed: 0,
            grad_checkpoint: false,
            clear_cache_threshold: Bytes(0),
            parallel: Parallel::Data,
        }
    }

    fn lora(keys: Option<&[&str]>) -> LoraParameters {
        let keys = keys.map(|keys| keys.iter().map(|key| (*key).to_owned()).collect());
        LoraParameters { rank: 4, scale: 20.0, dropout: 0.0, keys }
    }

    #[test]
    fn factors_are_counted_where_keys_and_last_layers_meet() {
        let (spec, map) = model();
        let count = |fine_tune, num_layers, layers| trainable(&spec, &map, &role(fine_tune, num_layers), layers);
        // Queries 8 to 8, keys and values 8 to 4, output 8 to 8; gate and up 8 to 16, down 16 to 8.
        let layer = 4 * (16 + 12 + 12 + 16 + 3 * 24);
        assert_eq!(count(FineTune::Lora(lora(None)), None, 0..3), 3 * layer);
        assert_eq!(count(FineTune::Lora(lora(None)), Some(2), 0..3), 2 * layer);
        assert_eq!(count(FineTune::Lora(lora(None)), Some(2), 0..2), layer);
        assert_eq!(count(FineTune::Dora(lora(None)), Some(1), 0..3), layer + 8 + 4 + 4 + 8 + 16 + 16 + 8);
        assert_eq!(count(FineTune::Lora(lora(Some(&["self_attn.q_proj"]))), Some(2), 0..3), 2 * 4 * 16);
        assert_eq!(count(FineTune::Lora(lora(Some(&["model.layers.0.self_attn.q_proj"]))), Some(1), 0..3), 4 * 16);
        assert_eq!(count(FineTune::Lora(lora(Some(&["no.such"]))), None, 0..3), 0);
    }

    #[test]
    fn an_embedding_is_trained_by_its_path_and_sends_the_way_back_to_the_first_layer() {
        let (spec, map) = model();
        let keyed = role(FineTune::Lora(lora(Some(&["model.embed_tokens", "mlp.down_proj"]))), Some(1));
        assert_eq!(trainable(&spec, &map, &keyed, 0..3), 4 * (32 + 8) + 4 * 24);
        assert_eq!(keyed.first_trained_layer(&spec, &map), 0);
        assert_eq!(role(FineTune::Lora(lora(None)), Some(1)).first_trained_layer(&spec, &map), 2);
        assert_eq!(role(FineTune::Lora(lora(Some(&["no.such"]))), None).first_trained_layer(&spec, &map), 3);
    }

    #[test]
    fn quantised_modules_stay_when_all_is_trained() {
        let (spec, mut map) = model();
        let all = role(FineTune::Full, Some(1));
        let layer = 8 + 64 + 32 + 32 + 64 + 8 + 3 * 128;
        assert_eq!(trainable(&spec, &map, &all, 0..3), layer);
        assert!(all.trained(&spec, &map, Part::Layer(2)).iter().all(|array| array.dtype == DType::BF16));
        let parameters = map.parts.get_mut(&Part::Layer(2)).expect("the last layer");
        let query = parameters.iter().find(|parameter| parameter.name.ends_with("q_proj.weight")).expect("queries").clone();
        parameters.push(Parameter { name: query.name.replace(".weight", ".scales"), ..query });
        assert_eq!(trainable(&spec, &map, &all, 0..3), layer - 64);
    }

    #[test]
    fn optimizers_keep_what_their_rules_say() {
        let adafactor = |beta_1| {
            Optimizer::Adafactor(Adafactor {
                eps: [1e-30, 1e-3],
                clip_threshold: 1.0,
                decay_rate: -0.8,
                beta_1,
                weight_decay: 0.0,
                scale_parameter: true,
                relative_step: true,
                warmup_init: false,
            })
        };
        let sgd = |momentum| Optimizer::Sgd { momentum, weight_decay: 0.0, dampening: 0.0, nesterov: false };
        let adam = Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false };
        assert_eq!(adam.state_numbers(&[3, 5]), 30);
        assert_eq!([sgd(0.0), sgd(0.9)].map(|sgd| sgd.state_numbers(&[3, 5])), [0, 15]);
        assert_eq!(adafactor(None).state_numbers(&[2, 3, 5]), 2 * 8);
        assert_eq!(adafactor(Some(0.9)).state_numbers(&[3, 5]), 8 + 15);
        assert_eq!(adafactor(None).state_numbers(&[7]), 7);
        assert_eq!(adam.state_numbers(&[u64::MAX, 9]), u64::MAX);
    }
}

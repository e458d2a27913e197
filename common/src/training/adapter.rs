//! An adapter as data: what `adapter_config.json` and the header of `adapters.safetensors` say, checked by themselves and against a base.

use super::{
    fine_tune::{FineTune, LoraParameters},
    matrices::{MatrixKind, ModelMatrix, matrices},
};
use crate::{
    dtype::DType,
    spec::ModelSpec,
    weights::{Parameter, TensorEntry, WeightIndex, WeightMap},
};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// More is no low rank for any model in use, and a sign of a broken file.
const RANK_MAX: u64 = 4096;

/// The keys of `adapter_config.json` that say what an adapter is; the others record how it was trained.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    pub fine_tune: FineTune,
    /// Of the model's last layers; None: all.
    pub num_layers: Option<u32>,
    /// The base, as it was called when the adapter was trained.
    pub model: Option<String>,
}

/// An adapter that agrees with itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    pub config: AdapterConfig,
    pub tensors: WeightIndex,
    changes: BTreeMap<String, Change>,
}

/// What an adapter does to a module, or to a parameter, by names of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// `W + scale · (the product of a and b)`; with a magnitude, rows are brought to that length then (arXiv 2402.09353).
    LowRank { a: String, b: String, magnitude: Option<String>, scale: f32 },
    /// A parameter is replaced by the tensor of its own name.
    Whole,
}

/// Why an adapter cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    #[error("adapter_config.json: `{key}` must be {wanted}, not {found}")]
    Config { key: String, wanted: String, found: String },
    #[error("adapter_config.json has no `{key}`{hint}")]
    ConfigMissing { key: String, hint: &'static str },
    #[error("adapters.safetensors holds no tensors: train the adapter again")]
    Empty,
    #[error("`{name}` is no tensor of a {kind} adapter, whose names end in {endings}: check `fine_tune_type` in adapter_config.json")]
    Name { name: String, kind: &'static str, endings: &'static str },
    #[error("`{path}` has `{has}` in adapters.safetensors, but no `{lacks}`: the file is incomplete, write the adapter again")]
    Half { path: String, has: &'static str, lacks: &'static str },
    #[error("`{name}` has type {found} in adapters.safetensors, wanted F32, F16 or BF16")]
    Type { name: String, found: DType },
    #[error(
        "the adapter was made for {made_for} and does not fit {base}: {count} of its {total} tensors have no place there, first {first}; give the model that the adapter was made for"
    )]
    Misfit { made_for: String, base: String, count: usize, total: usize, first: String },
}

impl AdapterConfig {
    /// Reads the keys as mlx-lm does: `fine_tune_type` (lora unless given), `num_layers` (0 and below: all), `lora_parameters`, `model`.
    pub fn from_json(config: &Value) -> Result<Self, AdapterError> {
        let map = config.as_object().ok_or_else(|| wrong("adapter_config.json", "an object", config))?;
        let fine_tune = match map.get("fine_tune_type").filter(|kind| !kind.is_null()) {
            None => FineTune::Lora(lora_parameters(map)?),
            Some(Value::String(kind)) if kind == "lora" => FineTune::Lora(lora_parameters(map)?),
            Some(Value::String(kind)) if kind == "dora" => FineTune::Dora(lora_parameters(map)?),
            Some(Value::String(kind)) if kind == "full" => FineTune::Full,
            Some(other) => return Err(wrong("fine_tune_type", "lora, dora or full", other)),
        };
        let num_layers = match map.get("num_layers").filter(|number| !number.is_null()) {
            None => None,
            Some(number) => {
                let whole = number.as_i64().and_then(|number| u32::try_from(number.max(0)).ok());
                whole.ok_or_else(|| wrong("num_layers", "a whole number", number)).map(|number| (number > 0).then_some(number))?
            }
        };
        let model = map.get("model").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { fine_tune, num_layers, model })
    }
}

fn lora_parameters(config: &Map<String, Value>) -> Result<LoraParameters, AdapterError> {
    let key = |name: &str| format!("lora_parameters.{name}");
    let section = match config.get("lora_parameters") {
        None => return Err(AdapterError::ConfigMissing { key: "lora_parameters".into(), hint: ": was it written by mlx-lm?" }),
        Some(section) => section.as_object().ok_or_else(|| wrong("lora_parameters", "an object", section))?,
    };
    let given = |name: &str| section.get(name).filter(|value| !value.is_null());
    let missing = |name: &str, hint| AdapterError::ConfigMissing { key: key(name), hint };
    let rank = given("rank").ok_or_else(|| missing("rank", ""))?;
    let wanted = format!("a whole number from 1 to {RANK_MAX}");
    let rank = rank.as_u64().filter(|rank| (1..=RANK_MAX).contains(rank)).ok_or_else(|| wrong(&key("rank"), &wanted, rank))?;
    let no_scale = || match section.contains_key("alpha") {
        true => missing("scale", "; it has `alpha`, which other tools divide by the rank: write `scale` = alpha / rank instead"),
        false => missing("scale", ""),
    };
    let scale = finite(&key("scale"), given("scale").ok_or_else(no_scale)?)?;
    let dropout = given("dropout").map_or(Ok(0.0), |value| finite(&key("dropout"), value))?;
    if !(0.0..1.0).contains(&dropout) {
        return Err(AdapterError::Config { key: key("dropout"), wanted: "from 0 to below 1".into(), found: dropout.to_string() });
    }
    let keys = match given("keys") {
        None => None,
        Some(Value::Array(paths)) => {
            let path = |path: &Value| path.as_str().map(str::to_owned).ok_or_else(|| wrong(&key("keys"), "a list of paths", path));
            Some(paths.iter().map(path).collect::<Result<BTreeSet<_>, _>>()?)
        }
        Some(other) => return Err(wrong(&key("keys"), "a list of paths", other)),
    };
    Ok(LoraParameters { rank: rank as u32, scale, dropout, keys })
}

fn finite(key: &str, value: &Value) -> Result<f32, AdapterError> {
    let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
    number.ok_or_else(|| wrong(key, "a finite number", value))
}

fn wrong(key: &str, wanted: &str, found: &Value) -> AdapterError {
    AdapterError::Config { key: key.into(), wanted: wanted.into(), found: found.to_string().chars().take(80).collect() }
}

impl Adapter {
    /// Brings the tensors of an adapter together by the modules that they change.
    pub fn new(config: AdapterConfig, tensors: WeightIndex) -> Result<Self, AdapterError> {
        if tensors.tensors.is_empty() {
            return Err(AdapterError::Empty);
        }
        if let Some((name, entry)) = tensors.tensors.iter().find(|(_, entry)| !entry.dtype.is_float()) {
            return Err(AdapterError::Type { name: name.clone(), found: entry.dtype });
        }
        let changes = match &config.fine_tune {
            FineTune::Full => tensors.tensors.keys().map(|name| (name.clone(), Change::Whole)).collect(),
            FineTune::Lora(lora) => low_rank(&tensors, lora.scale, "lora", &["lora_a", "lora_b"])?,
            FineTune::Dora(lora) => low_rank(&tensors, lora.scale, "dora", &["lora_a", "lora_b", "m"])?,
        };
        Ok(Self { config, tensors, changes })
    }

    /// What is changed, by the path of a module, or the name of a parameter for [`Change::Whole`].
    pub fn changes(&self) -> &BTreeMap<String, Change> {
        &self.changes
    }

    /// The same without changes of tensors that the checkpoint has and no parameter is made of: mlx-lm trains such modules too, to no effect
    /// (Gemma 3n has projections in layers that use the keys and values of others).
    pub fn without_unused(mut self, map: &WeightMap, index: &WeightIndex) -> Self {
        let used: BTreeSet<&str> = map.parts.values().flatten().flat_map(Parameter::sources).collect();
        let is_unused = |name: &str| index.tensors.contains_key(name) && !used.contains(name);
        let unused = |path: &str, change: &Change| match change {
            Change::Whole => is_unused(path),
            Change::LowRank { .. } => is_unused(&format!("{path}.weight")),
        };
        let kept = |path: &str, changes: &BTreeMap<String, Change>| changes.get(path).is_none_or(|change| !unused(path, change));
        let of_tensor = |name: &str| name.rsplit_once('.').map_or("", |(path, _)| path).to_owned();
        let changes = self.changes.clone();
        self.tensors.tensors.retain(|name, _| kept(name, &changes) && kept(&of_tensor(name), &changes));
        self.changes.retain(|path, change| !unused(path, change));
        self
    }

    /// Every tensor must belong to a module, or be a parameter, of the base, with a shape that fits. Shapes are those of mlx-lm: of a linear
    /// a `[in, r]` and b `[r, out]`, of experts a `[E, r, in]` and b `[E, out, r]`, of an embedding a `[V, r]` and b `[r, d]`, magnitudes
    /// `[out]` or `[V]`. `base` is what the model is called in an error.
    pub fn check_against(&self, spec: &ModelSpec, map: &WeightMap, base: &str) -> Result<(), AdapterError> {
        let modules = matrices(spec, map);
        let parameters: BTreeMap<&str, &Parameter> =
            map.parts.values().flatten().map(|parameter| (parameter.name.as_str(), parameter)).collect();
        let misfits: Vec<String> =
            self.tensors.tensors.iter().filter_map(|(name, entry)| self.misfit(name, entry, &modules, &parameters)).collect();
        let Some(first) = misfits.first().cloned() else { return Ok(()) };
        let made_for = self.config.model.as_ref().map_or("another model".into(), |model| format!("`{model}`"));
        Err(AdapterError::Misfit { made_for, base: format!("`{base}`"), count: misfits.len(), total: self.tensors.tensors.len(), first })
    }

    /// Why a tensor has no place in the base.
    fn misfit(
        &self,
        name: &str,
        entry: &TensorEntry,
        modules: &BTreeMap<&str, ModelMatrix>,
        parameters: &BTreeMap<&str, &Parameter>,
    ) -> Option<String> {
        let shape_of =
            |wanted: &[u64]| (entry.shape != wanted).then(|| format!("`{name}` of shape {:?}, wanted is {wanted:?}", entry.shape));
        let Some(LoraParameters { rank, .. }) = self.config.fine_tune.lora() else {
            return match parameters.get(name) {
                None => Some(format!("`{name}`, which is no parameter of it")),
                Some(parameter) if !parameter.dtype.is_float() => Some(format!("`{name}`, which is quantised there")),
                Some(parameter) => shape_of(&parameter.shape),
            };
        };
        let (path, ending) = name.rsplit_once('.').unwrap_or_default();
        let Some(module) = modules.get(path) else {
            return Some(format!("`{name}`: `{path}` is no linear, stack of experts or embedding of it"));
        };
        let (rank, dora) = (u64::from(*rank), matches!(self.config.fine_tune, FineTune::Dora(_)));
        match (module.kind, &module.shape[..]) {
            (MatrixKind::HeadLinear, _) => Some(format!("`{name}`: `{path}` has a matrix for each head, which no adapter changes")),
            (MatrixKind::Experts, _) if dora => Some(format!("`{name}`: `{path}` is a stack of experts, for which there is no DoRA")),
            (MatrixKind::Experts, [experts, output, input]) => match ending {
                "lora_a" => shape_of(&[*experts, rank, *input]),
                _ => shape_of(&[*experts, *output, rank]),
            },
            // Of an embedding a has the rows of the table, of a linear the inputs.
            (kind, [rows, columns]) => {
                let (of_a, of_b) = if kind == MatrixKind::Embedding { (*rows, *columns) } else { (*columns, *rows) };
                match ending {
                    "lora_a" => shape_of(&[of_a, rank]),
                    "lora_b" => shape_of(&[rank, of_b]),
                    _ => shape_of(&[*rows]),
                }
            }
            (_, shape) => Some(format!("`{name}`: `{path}` has shape {shape:?}, which no adapter changes")),
        }
    }
}

/// Brings halves together. `endings` are those of a complete module.
fn low_rank(
    tensors: &WeightIndex,
    scale: f32,
    kind: &'static str,
    endings: &[&'static str],
) -> Result<BTreeMap<String, Change>, AdapterError> {
    let mut found: BTreeMap<&str, BTreeSet<&'static str>> = BTreeMap::new();
    for name in tensors.tensors.keys() {
        let known = name.rsplit_once('.').and_then(|(path, last)| Some((path, endings.iter().find(|ending| **ending == last)?)));
        let listed = if endings.len() == 2 { "`.lora_a` or `.lora_b`" } else { "`.lora_a`, `.lora_b` or `.m`" };
        let (path, ending) = known.ok_or_else(|| AdapterError::Name { name: name.clone(), kind, endings: listed })?;
        found.entry(path).or_default().insert(ending);
    }
    let change = |(path, has): (&str, BTreeSet<&'static str>)| {
        if let (Some(lacks), Some(has)) = (endings.iter().find(|ending| !has.contains(**ending)), has.first()) {
            return Err(AdapterError::Half { path: path.to_owned(), has, lacks });
        }
        let name = |ending: &str| format!("{path}.{ending}");
        let magnitude = endings.contains(&"m").then(|| name("m"));
        Ok((path.to_owned(), Change::LowRank { a: name("lora_a"), b: name("lora_b"), magnitude, scale }))
    };
    found.into_iter().map(change).collect()
}

#[cfg(test)]
#[path = "adapter_tests.rs"]
mod tests;

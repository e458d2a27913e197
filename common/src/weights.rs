//! Which published tensors make up which part of a model: every tensor used exactly once, every shape checked.
//!
//! The planner counts bytes with this, and an engine loads by it, so both agree on what a shard is.

use crate::{
    dtype::DType,
    spec::{ExpertsSpec, HeadSpec, LinearSpec, ModelSpec, Part, QuantizationScheme, Weight},
};
use std::collections::{BTreeMap, BTreeSet};

/// The tensors of a model as its safetensors headers list them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WeightIndex {
    pub tensors: BTreeMap<String, TensorEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// The file's name inside the model's folder.
    pub file: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

/// A parameter as a block asks for it by name, and what of the checkpoint it is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// `<path>.weight`, `.scales`, `.biases` or `.bias`.
    pub name: String,
    /// One tensor, or several to be stacked along a new first axis.
    pub sources: Vec<String>,
    pub stacked: bool,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub bytes: u64,
}

/// The parameters of every part of a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WeightMap {
    pub parts: BTreeMap<Part, Vec<Parameter>>,
    /// The type of embeddings and norms, so of activations.
    pub activation_dtype: Option<DType>,
}

/// Why a checkpoint does not fit its config.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WeightError {
    #[error("tensor `{name}` is missing from the checkpoint{hint}: download the model again, or check that config.json belongs to it")]
    Missing { name: String, hint: String },
    #[error("tensor `{name}` in {file} has shape {found:?}, the config asks for {wanted:?}")]
    Shape { name: String, file: String, found: Vec<u64>, wanted: Vec<u64> },
    #[error("tensor `{name}` in {file} has type {found}, wanted {wanted}")]
    Type { name: String, file: String, found: DType, wanted: &'static str },
    #[error("`{path}` is quantised in the checkpoint (it has `{path}.scales`), but config.json gives no quantisation for it")]
    NoScheme { path: String },
    #[error(
        "{count} tensors of the checkpoint have no place in this model, the first is `{first}`: config.json and weights do not belong together"
    )]
    LeftOver { count: usize, first: String },
}

impl WeightMap {
    /// Assigns every tensor of the index to a parameter of the spec.
    pub fn assign(spec: &ModelSpec, index: &WeightIndex) -> Result<WeightMap, WeightError> {
        let mut assignment = Assignment { spec, index, used: BTreeSet::new() };
        let map = assignment.parts(&spec.parts())?;
        assignment.check_left_over()?;
        Ok(map)
    }

    /// Only these parts, from an index that need not hold the others: for a node that has just its own files.
    pub fn assign_parts(spec: &ModelSpec, index: &WeightIndex, parts: &[Part]) -> Result<WeightMap, WeightError> {
        Assignment { spec, index, used: BTreeSet::new() }.parts(parts)
    }

    pub fn part_bytes(&self, part: Part) -> u64 {
        self.parts.get(&part).map_or(0, |parameters| parameters.iter().map(|parameter| parameter.bytes).sum())
    }

    /// Bytes of these parts together.
    pub fn bytes(&self, parts: &[Part]) -> u64 {
        parts.iter().map(|part| self.part_bytes(*part)).sum()
    }

    /// The files that hold these parts.
    pub fn files(&self, parts: &[Part], index: &WeightIndex) -> BTreeSet<String> {
        let sources = parts.iter().filter_map(|part| self.parts.get(part)).flatten().flat_map(|parameter| &parameter.sources);
        sources.filter_map(|name| index.tensors.get(name)).map(|entry| entry.file.clone()).collect()
    }
}

impl WeightIndex {
    /// A number that two nodes agree on exactly when they see the same tensors: FNV-1a over names, types and shapes.
    pub fn fingerprint(&self, config: &[u8]) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        let mut add = |bytes: &[u8]| {
            for byte in bytes.iter().chain([&0xff]) {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        add(config);
        for (name, entry) in &self.tensors {
            add(name.as_bytes());
            add(entry.dtype.name().as_bytes());
            entry.shape.iter().for_each(|dim| add(&dim.to_le_bytes()));
        }
        hash
    }
}

struct Assignment<'a> {
    spec: &'a ModelSpec,
    index: &'a WeightIndex,
    used: BTreeSet<String>,
}

/// A tensor of a matrix: suffix of its name, shape, type.
type Piece = (&'static str, Vec<u64>, Wanted);

/// What a tensor must look like.
#[derive(Clone, Copy)]
enum Wanted {
    Float,
    Packed,
}

impl Assignment<'_> {
    fn parts(&mut self, parts: &[Part]) -> Result<WeightMap, WeightError> {
        let mut map = WeightMap::default();
        for part in parts {
            let mut parameters = Vec::new();
            for weight in self.spec.weights(*part) {
                self.weight(&weight, &mut parameters)?;
            }
            map.parts.insert(*part, parameters);
        }
        let norm = self.spec.final_norm.path.clone() + ".weight";
        map.activation_dtype = self.index.tensors.get(&norm).map(|entry| entry.dtype);
        Ok(map)
    }

    fn weight(&mut self, weight: &Weight, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        match weight {
            Weight::Norm(norm) => out.push(self.take(format!("{}.weight", norm.path), &[u64::from(norm.dims)], Wanted::Float)?),
            Weight::Embedding(embedding) => self.matrix(&embedding.path, &[embedding.vocab_size, embedding.dims], out)?,
            Weight::Linear(linear) => self.linear(linear, out)?,
            Weight::Experts(experts) => self.experts(experts, out)?,
        }
        Ok(())
    }

    fn linear(&mut self, linear: &LinearSpec, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        self.matrix(&linear.path, &[linear.output_dims, linear.input_dims], out)?;
        if linear.bias {
            out.push(self.take(format!("{}.bias", linear.path), &[u64::from(linear.output_dims)], Wanted::Float)?);
        }
        Ok(())
    }

    /// `<path>.weight`, quantised when the checkpoint has scales for it.
    fn matrix(&mut self, path: &str, shape: &[u32], out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        for (suffix, shape, wanted) in self.tensors_of(path, path, shape)? {
            out.push(self.take(format!("{path}.{suffix}"), &shape, wanted)?);
        }
        Ok(())
    }

    /// Stacked as published, or one by one and stacked on loading.
    fn experts(&mut self, experts: &ExpertsSpec, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        let one = |e: u32| experts.published.replacen("{}", &e.to_string(), 1);
        if !self.index.tensors.contains_key(&format!("{}.weight", one(0))) {
            return self.matrix(&experts.path, &[experts.n_experts, experts.output_dims, experts.input_dims], out);
        }
        for (suffix, shape, wanted) in self.tensors_of(&one(0), &experts.path, &[experts.output_dims, experts.input_dims])? {
            let sources: Vec<_> = (0..experts.n_experts).map(|e| format!("{}.{suffix}", one(e))).collect();
            let parameters = sources.iter().map(|name| self.take(name.clone(), &shape, wanted)).collect::<Result<Vec<_>, _>>()?;
            out.push(Parameter {
                name: format!("{}.{suffix}", experts.path),
                sources,
                stacked: true,
                dtype: parameters[0].dtype,
                shape: std::iter::once(u64::from(experts.n_experts)).chain(shape).collect(),
                bytes: parameters.iter().map(|parameter| parameter.bytes).sum(),
            });
        }
        Ok(())
    }

    /// The tensors that a matrix `[.., output, input]` consists of, by suffix. `scheme_path` is where config.json names exceptions.
    fn tensors_of(&self, path: &str, scheme_path: &str, shape: &[u32]) -> Result<Vec<Piece>, WeightError> {
        let shape: Vec<u64> = shape.iter().map(|dim| u64::from(*dim)).collect();
        if !self.index.tensors.contains_key(&format!("{path}.scales")) {
            return Ok(vec![("weight", shape, Wanted::Float)]);
        }
        let scheme = self.spec.quantization.scheme(path).or(self.spec.quantization.scheme(scheme_path));
        let QuantizationScheme { group_size, bits, .. } = scheme.ok_or_else(|| WeightError::NoScheme { path: path.to_owned() })?;
        let (rows, input) = shape.split_at(shape.len() - 1);
        let with = |columns: u64| rows.iter().copied().chain([columns]).collect::<Vec<_>>();
        let (packed, groups) = (input[0] * u64::from(bits) / 32, input[0] / u64::from(group_size));
        Ok(vec![("weight", with(packed), Wanted::Packed), ("scales", with(groups), Wanted::Float), ("biases", with(groups), Wanted::Float)])
    }

    fn take(&mut self, name: String, shape: &[u64], wanted: Wanted) -> Result<Parameter, WeightError> {
        let Some(entry) = self.index.tensors.get(&name) else {
            let hint = match name.as_str() {
                "lm_head.weight" => " (config.json says that the head is not tied to the embedding)",
                _ => "",
            };
            return Err(WeightError::Missing { name, hint: hint.into() });
        };
        let wanted_type = match wanted {
            Wanted::Float if !entry.dtype.is_float() => Some("F32, F16 or BF16"),
            Wanted::Packed if entry.dtype != DType::U32 => Some("U32"),
            _ => None,
        };
        if let Some(wanted) = wanted_type {
            return Err(WeightError::Type { name, file: entry.file.clone(), found: entry.dtype, wanted });
        }
        if entry.shape != shape {
            return Err(WeightError::Shape { name, file: entry.file.clone(), found: entry.shape.clone(), wanted: shape.to_vec() });
        }
        self.used.insert(name.clone());
        Ok(Parameter {
            sources: vec![name.clone()],
            name,
            stacked: false,
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            bytes: entry.bytes,
        })
    }

    fn check_left_over(&self) -> Result<(), WeightError> {
        let tied = self.spec.head == HeadSpec::Tied;
        let ignored =
            |name: &str| self.spec.ignored_suffixes.iter().any(|suffix| name.ends_with(suffix)) || (tied && name.starts_with("lm_head."));
        let left: Vec<_> = self.index.tensors.keys().filter(|name| !self.used.contains(*name) && !ignored(name)).collect();
        match left.first() {
            None => Ok(()),
            Some(first) => Err(WeightError::LeftOver { count: left.len(), first: first.to_string() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::read_spec;
    use serde_json::json;

    fn moe() -> ModelSpec {
        read_spec(&json!({"model_type": "mixtral", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 3, "rms_norm_eps": 1e-5, "vocab_size": 128, "quantization": {"group_size": 32, "bits": 4}}))
        .expect("a valid config")
    }

    /// The index of a checkpoint as it is published: experts one by one, quantised where asked.
    fn published(spec: &ModelSpec, quantised: bool) -> WeightIndex {
        let mut index = WeightIndex::default();
        let mut add = |name: String, dtype: DType, shape: Vec<u64>| {
            let bytes = shape.iter().product::<u64>() * dtype.size();
            index.tensors.insert(name, TensorEntry { file: "model.safetensors".into(), dtype, shape, bytes });
        };
        let mut matrix = |path: &str, rows: u32, columns: u32, quantised: bool| {
            let (rows, columns) = (u64::from(rows), u64::from(columns));
            if !quantised {
                return add(format!("{path}.weight"), DType::F32, vec![rows, columns]);
            }
            add(format!("{path}.weight"), DType::U32, vec![rows, columns / 8]);
            add(format!("{path}.scales"), DType::F32, vec![rows, columns / 32]);
            add(format!("{path}.biases"), DType::F32, vec![rows, columns / 32]);
        };
        let mut norms = Vec::new();
        for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
            match weight {
                Weight::Norm(norm) => norms.push((format!("{}.weight", norm.path), u64::from(norm.dims))),
                Weight::Embedding(embedding) => matrix(&embedding.path, embedding.vocab_size, embedding.dims, quantised),
                Weight::Linear(linear) => {
                    matrix(&linear.path, linear.output_dims, linear.input_dims, quantised && !linear.path.ends_with("gate"))
                }
                Weight::Experts(experts) => (0..experts.n_experts).for_each(|e| {
                    matrix(&experts.published.replace("{}", &e.to_string()), experts.output_dims, experts.input_dims, quantised)
                }),
            }
        }
        norms.into_iter().for_each(|(name, dims)| add(name, DType::F32, vec![dims]));
        index
    }

    #[test]
    fn every_tensor_is_used_once_and_experts_are_stacked() {
        let spec = moe();
        for quantised in [false, true] {
            let index = published(&spec, quantised);
            let map = WeightMap::assign(&spec, &index).expect("complete");
            let sources: Vec<_> = map.parts.values().flatten().flat_map(|parameter| &parameter.sources).collect();
            assert_eq!(sources.len(), index.tensors.len());
            let total: u64 = index.tensors.values().map(|entry| entry.bytes).sum();
            assert_eq!(map.bytes(&spec.parts()), total);
            let gate = map.parts[&Part::Layer(1)]
                .iter()
                .find(|p| p.name == "model.layers.1.block_sparse_moe.switch_mlp.gate_proj.weight")
                .expect("stacked");
            assert_eq!((gate.stacked, gate.sources.len(), gate.shape[0]), (true, 3, 3));
            assert_eq!(map.bytes(&spec.parts_of(0..1)) + map.bytes(&spec.parts_of(1..2)), total);
        }
    }

    #[test]
    fn a_missing_a_misshapen_and_a_left_over_tensor_are_named() {
        let spec = moe();
        let mut index = published(&spec, false);
        let norm = index.tensors.remove("model.norm.weight").expect("there");
        let message = |index: &WeightIndex| WeightMap::assign(&spec, index).expect_err("wrong").to_string();
        assert!(message(&index).contains("`model.norm.weight` is missing"));
        index.tensors.insert("model.norm.weight".into(), TensorEntry { shape: vec![65], ..norm.clone() });
        assert!(message(&index).contains("[65]"));
        index.tensors.insert("model.norm.weight".into(), TensorEntry { dtype: DType::I32, ..norm.clone() });
        assert!(message(&index).contains("I32"));
        index.tensors.insert("model.norm.weight".into(), norm.clone());
        index.tensors.insert("model.layers.7.extra".into(), norm);
        assert!(message(&index).contains("`model.layers.7.extra`"));
        index.tensors.remove("model.layers.7.extra");
        index.tensors.remove("model.layers.0.block_sparse_moe.experts.2.w1.weight");
        assert!(message(&index).contains("experts.2.w1.weight"));
    }
}

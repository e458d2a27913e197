//! Finds every parameter of a spec among the tensors that the architecture's rules have brought to canonical names.

use super::{Parameter, WeightError, WeightIndex, WeightMap};
use crate::{
    dtype::DType,
    published::{SymbolicTensor, Tensors},
    spec::{ConvolutionSpec, HeadSpec, LinearSpec, ModelSpec, NormKind, NormSpec, Part, Weight},
};
use std::collections::BTreeSet;

pub(super) struct Assignment<'a> {
    spec: &'a ModelSpec,
    index: &'a WeightIndex,
    tensors: Tensors,
    /// Canonical names that a parameter has.
    used: BTreeSet<String>,
    /// Tensors of the checkpoint that a parameter is made of.
    used_sources: BTreeSet<String>,
}

/// A tensor of a matrix: suffix of its name, shape, type.
type Piece = (&'static str, Vec<u64>, Wanted);

/// What a tensor must look like.
#[derive(Clone, Copy)]
enum Wanted {
    Float,
    /// Quantised numbers in words.
    Packed,
    /// Scales of one byte.
    Bytes,
}

impl<'a> Assignment<'a> {
    pub(super) fn new(spec: &'a ModelSpec, index: &'a WeightIndex) -> Result<Self, WeightError> {
        let mut tensors = Tensors::new(index);
        spec.published.apply(spec, &mut tensors)?;
        Ok(Self { spec, index, tensors, used: BTreeSet::new(), used_sources: BTreeSet::new() })
    }

    pub(super) fn parts(&mut self, parts: &[Part]) -> Result<WeightMap, WeightError> {
        let mut map = WeightMap::default();
        for part in parts {
            let mut parameters = Vec::new();
            for weight in self.spec.weights(*part) {
                if *part != Part::Head || self.has_head(&weight) {
                    self.weight(&weight, &mut parameters)?;
                }
            }
            map.parts.insert(*part, parameters);
        }
        let norm = format!("{}.weight", self.spec.final_norm.path);
        map.activation_dtype = self.tensors.get(&norm).map(|tensor| tensor.dtype);
        Ok(map)
    }

    /// Whether the model has a head that the config leaves to the checkpoint; true where the config says that it does.
    fn has_head(&self, weight: &Weight) -> bool {
        let name = format!("{}.weight", weight.path());
        !matches!(self.spec.head, HeadSpec::LinearOrTied(_)) || self.tensors.model_has(|found| found == name)
    }

    fn weight(&mut self, weight: &Weight, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        match weight {
            Weight::Norm(norm) => self.norm(norm, out)?,
            Weight::Embedding(embedding) => self.matrix(&embedding.path, &[embedding.vocab_size, embedding.dims], out)?,
            Weight::Linear(linear) => self.linear(linear, out)?,
            Weight::Experts(experts) => {
                self.matrix(&experts.path, &[experts.n_experts, experts.output_dims, experts.input_dims], out)?;
                if experts.bias {
                    let shape = [experts.n_experts, experts.output_dims].map(u64::from);
                    out.push(self.find(format!("{}.bias", experts.path), &shape, Wanted::Float)?);
                }
            }
            Weight::HeadLinear(linear) => self.matrix(&linear.path, &[linear.n_heads, linear.output_dims, linear.input_dims], out)?,
            Weight::Convolution(convolution) => self.convolution(convolution, out)?,
            Weight::Tensor(tensor) => {
                let shape: Vec<u64> = tensor.shape.iter().map(|dim| u64::from(*dim)).collect();
                out.push(self.find(tensor.name.clone(), &shape, Wanted::Float)?);
            }
        }
        Ok(())
    }

    fn norm(&mut self, norm: &NormSpec, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        let dims = [u64::from(norm.dims)];
        if norm.kind.has_weight() {
            out.push(self.find(format!("{}.weight", norm.path), &dims, Wanted::Float)?);
        }
        if norm.kind == (NormKind::Layer { bias: true }) {
            out.push(self.find(format!("{}.bias", norm.path), &dims, Wanted::Float)?);
        }
        Ok(())
    }

    fn convolution(&mut self, convolution: &ConvolutionSpec, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        let (channels, kernel) = (u64::from(convolution.channels), u64::from(convolution.kernel));
        out.push(self.find(format!("{}.weight", convolution.path), &[channels, kernel, 1], Wanted::Float)?);
        if convolution.bias {
            out.push(self.find(format!("{}.bias", convolution.path), &[channels], Wanted::Float)?);
        }
        Ok(())
    }

    fn linear(&mut self, linear: &LinearSpec, out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        self.matrix(&linear.path, &[linear.output_dims, linear.input_dims], out)?;
        if linear.bias {
            out.push(self.find(format!("{}.bias", linear.path), &[u64::from(linear.output_dims)], Wanted::Float)?);
        }
        Ok(())
    }

    /// `<path>.weight`, quantised when there are scales for it.
    fn matrix(&mut self, path: &str, shape: &[u32], out: &mut Vec<Parameter>) -> Result<(), WeightError> {
        for (suffix, shape, wanted) in self.pieces(path, shape)? {
            out.push(self.find(format!("{path}.{suffix}"), &shape, wanted)?);
        }
        Ok(())
    }

    /// The tensors that a matrix `[.., output, input]` consists of, by suffix.
    fn pieces(&self, path: &str, shape: &[u32]) -> Result<Vec<Piece>, WeightError> {
        let shape: Vec<u64> = shape.iter().map(|dim| u64::from(*dim)).collect();
        if !self.tensors.has(&format!("{path}.scales")) {
            return Ok(vec![("weight", shape, Wanted::Float)]);
        }
        let scheme = self.spec.quantization.scheme(path).ok_or_else(|| WeightError::NoScheme { path: path.to_owned() })?;
        let (input_dims, rows) = shape.split_last().map_or((0, &[][..]), |(last, rows)| (*last, rows));
        let Some((packed, groups)) = scheme.packed_columns(input_dims).zip(scheme.groups(input_dims)) else {
            return Err(WeightError::Groups { path: path.to_owned(), group_size: scheme.group_size, input_dims });
        };
        let with = |columns: u64| rows.iter().copied().chain([columns]).collect::<Vec<_>>();
        let scales = if scheme.scales_are_bytes() { Wanted::Bytes } else { Wanted::Float };
        let mut pieces = vec![("weight", with(packed), Wanted::Packed), ("scales", with(groups), scales)];
        if scheme.has_biases() {
            pieces.push(("biases", with(groups), Wanted::Float));
        }
        Ok(pieces)
    }

    fn find(&mut self, name: String, shape: &[u64], wanted: Wanted) -> Result<Parameter, WeightError> {
        let Some(tensor) = self.tensors.get(&name) else { return Err(self.missing(name)) };
        let wanted_type = match wanted {
            Wanted::Float if !tensor.dtype.is_float() => Some("F32, F16 or BF16"),
            Wanted::Packed if tensor.dtype != DType::U32 => Some("U32"),
            Wanted::Bytes if tensor.dtype != DType::U8 => Some("U8"),
            _ => None,
        };
        if let Some(wanted) = wanted_type {
            return Err(WeightError::Type { origin: self.origin(&name, tensor), name, found: tensor.dtype, wanted });
        }
        if tensor.shape != shape {
            let (origin, found) = (self.origin(&name, tensor), tensor.shape.clone());
            return Err(WeightError::Shape { name, origin, found, wanted: shape.to_vec() });
        }
        self.used.insert(name.clone());
        self.used_sources.extend(tensor.recipe.sources().into_iter().map(str::to_owned));
        Ok(Parameter::new(name, tensor.clone()))
    }

    fn missing(&self, name: String) -> WeightError {
        let hint = match self.tensors.lacking(&name) {
            Some(lacking) => format!(" (it is made with `{lacking}`, which is not there)"),
            None if name == "lm_head.weight" => " (config.json says that the head is not tied to the embedding)".into(),
            None => String::new(),
        };
        WeightError::Missing { name, hint }
    }

    /// Where a tensor comes from, for an error.
    fn origin(&self, name: &str, tensor: &SymbolicTensor) -> String {
        let sources = tensor.recipe.sources();
        let Some(first) = sources.first() else { return String::new() };
        let file = self.index.tensors.get(*first).map(|entry| entry.file.as_str()).unwrap_or_default();
        match sources.len() {
            1 if *first == name => format!(" in {file}"),
            1 => format!(", made of `{first}` in {file},"),
            n => format!(", made of `{first}` in {file} and {} more,", n - 1),
        }
    }

    /// What the rules left under a name that nobody asks for, and what they took and made nothing of.
    pub(super) fn check_left_over(&self) -> Result<(), WeightError> {
        let unasked = self.tensors.names().filter(|name| !self.used.contains(*name)).filter_map(|name| self.tensors.get(name));
        let unasked = unasked.flat_map(|tensor| tensor.recipe.sources());
        let unused = |name: &&str| !self.used_sources.contains(*name) && !self.tensors.is_dropped(name);
        let left: BTreeSet<&str> = unasked.chain(self.index.tensors.keys().map(String::as_str).filter(unused)).collect();
        match left.first() {
            None => Ok(()),
            Some(first) => Err(WeightError::LeftOver { count: left.len(), first: first.to_string() }),
        }
    }
}

//! How an adapter becomes part of its base: which tensors of a checkpoint have to be written anew, and what each of them is made of.

use super::{
    adapter::{Adapter, Change},
    matrices::{ModelMatrix, matrices},
};
use crate::{
    dtype::DType,
    published::{Assignment, Irreversible},
    spec::ModelSpec,
    weights::{Parameter, WeightMap},
};
use std::collections::{BTreeMap, BTreeSet};

/// What is to be written.
#[derive(Debug, Clone, PartialEq)]
pub enum FusePlan<'a> {
    /// The checkpoint as it was published, with other bytes in some of its tensors.
    AsPublished(Vec<Rewrite<'a>>),
    /// Every parameter under its canonical name, which is mlx-lm's, as floats.
    Canonical(Vec<CanonicalTensor<'a>>),
}

/// What a parameter, or the parameters of one matrix, become.
#[derive(Debug, Clone, PartialEq)]
pub enum NewValue<'a> {
    /// What it is in the base.
    Kept(&'a Parameter),
    /// The tensor of its name in the adapter.
    Replaced(&'a Parameter),
    /// The matrix as numbers, with the change if there is one.
    Matrix { module: ModelMatrix<'a>, change: Option<&'a Change> },
}

/// A change of the base with the tensors that it goes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewrite<'a> {
    pub value: NewValue<'a>,
    /// Of a quantised matrix weight, scales and biases in this order, else one.
    pub parameters: Vec<Rewritten<'a>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Rewritten<'a> {
    pub parameter: &'a Parameter,
    pub assignments: Vec<Assignment<'a>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct CanonicalTensor<'a> {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub value: NewValue<'a>,
}

/// Why an adapter cannot become part of a base.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FuseError {
    #[error(
        "the adapter changes `{parameter}`, but {cause}: add --dequantize to write every parameter as floats under mlx-lm's names, or use a base that mlx-lm has saved"
    )]
    Irreversible { parameter: String, cause: Irreversible },
    #[error(
        "the adapter changes `{parameter}`, but `{tensor}`, of which it is made, also makes `{other}`: add --dequantize to write every parameter as floats under mlx-lm's names"
    )]
    Shared { parameter: String, tensor: String, other: String },
}

impl<'a> FusePlan<'a> {
    /// `adapter` has to fit ([`Adapter::check_against`]). With `dequantize`, and quantised matrices or others without a way back in the base,
    /// all parameters are written anew; else the checkpoint keeps its layout.
    pub fn new(spec: &'a ModelSpec, map: &'a WeightMap, adapter: &'a Adapter, dequantize: bool) -> Result<Self, FuseError> {
        let modules = matrices(spec, map);
        let is_quantised = spec.quantization.published.is_some() || modules.values().any(|module| module.quantised.is_some());
        if dequantize && is_quantised {
            return Ok(Self::Canonical(canonical(map, &modules, adapter)));
        }
        match as_published(map, &modules, adapter) {
            Err(_) if dequantize => Ok(Self::Canonical(canonical(map, &modules, adapter))),
            rewrites => rewrites.map(Self::AsPublished),
        }
    }
}

impl CanonicalTensor<'_> {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size()
    }
}

/// Each parameter once: layers may share some.
fn all_parameters(map: &WeightMap) -> impl Iterator<Item = &Parameter> {
    let mut seen = BTreeSet::new();
    map.parts.values().flatten().filter(move |parameter| seen.insert(parameter.name.as_str()))
}

fn canonical<'a>(map: &'a WeightMap, modules: &BTreeMap<&str, ModelMatrix<'a>>, adapter: &'a Adapter) -> Vec<CanonicalTensor<'a>> {
    let changes = adapter.changes();
    let tensor = |parameter: &'a Parameter| {
        let (path, suffix) = parameter.name.rsplit_once('.').unwrap_or_default();
        let module = modules.get(path).filter(|_| ["weight", "scales", "biases"].contains(&suffix));
        let value = match (module, suffix) {
            (Some(module), "weight") if module.quantised.is_some() || changes.contains_key(path) => {
                NewValue::Matrix { module: module.clone(), change: changes.get(path) }
            }
            // They are part of the numbers now.
            (Some(module), "scales" | "biases") if module.quantised.is_some() => return None,
            _ if changes.contains_key(&parameter.name) => NewValue::Replaced(parameter),
            _ => NewValue::Kept(parameter),
        };
        let (dtype, shape) = match &value {
            NewValue::Matrix { module, .. } => (module.dtype(), module.shape.clone()),
            NewValue::Kept(_) | NewValue::Replaced(_) => (parameter.dtype, parameter.shape.clone()),
        };
        Some(CanonicalTensor { name: parameter.name.clone(), dtype, shape, value })
    };
    all_parameters(map).filter_map(tensor).collect()
}

fn as_published<'a>(
    map: &'a WeightMap,
    modules: &BTreeMap<&str, ModelMatrix<'a>>,
    adapter: &'a Adapter,
) -> Result<Vec<Rewrite<'a>>, FuseError> {
    let parameters: BTreeMap<&str, &Parameter> = all_parameters(map).map(|parameter| (parameter.name.as_str(), parameter)).collect();
    let mut rewrites = Vec::new();
    for (name, change) in adapter.changes() {
        let (value, changed) = match (change, modules.get(name.as_str()), parameters.get(name.as_str())) {
            (Change::LowRank { .. }, Some(module), _) => {
                let more = module.quantised.iter().flat_map(|quantised| std::iter::once(quantised.scales).chain(quantised.biases));
                let all = std::iter::once(module.weight).chain(more).collect();
                (NewValue::Matrix { module: module.clone(), change: Some(change) }, all)
            }
            (Change::Whole, _, Some(parameter)) => (NewValue::Replaced(parameter), vec![*parameter]),
            // An adapter that fits has no others.
            _ => continue,
        };
        let rewritten = |parameter: &'a Parameter| {
            let undone = parameter.recipe.undo();
            let assignments = undone.map_err(|cause| FuseError::Irreversible { parameter: parameter.name.clone(), cause })?;
            Ok(Rewritten { parameter, assignments })
        };
        rewrites.push(Rewrite { value, parameters: changed.into_iter().map(rewritten).collect::<Result<_, _>>()? });
    }
    check_shared(map, &rewrites)?;
    Ok(rewrites)
}

/// No parameter may be made of entries that another one's new value goes to.
fn check_shared(map: &WeightMap, rewrites: &[Rewrite]) -> Result<(), FuseError> {
    let mut users: BTreeMap<&str, Vec<&Parameter>> = BTreeMap::new();
    for parameter in all_parameters(map) {
        for source in parameter.recipe.sources().into_iter().collect::<BTreeSet<_>>() {
            users.entry(source).or_default().push(parameter);
        }
    }
    for Rewritten { parameter, assignments } in rewrites.iter().flat_map(|rewrite| &rewrite.parameters) {
        for assignment in assignments {
            let others = users.get(assignment.source.name.as_str()).into_iter().flatten();
            // What cannot be undone is taken to need all of the tensor.
            let met = |other: &&&Parameter| other.recipe.undo().map_or(true, |reads| reads.iter().any(|read| read.meets(assignment)));
            if let Some(other) = others.filter(|other| other.name != parameter.name).find(met) {
                let (parameter, tensor, other) = (parameter.name.clone(), assignment.source.name.clone(), other.name.clone());
                return Err(FuseError::Shared { parameter, tensor, other });
            }
        }
    }
    Ok(())
}

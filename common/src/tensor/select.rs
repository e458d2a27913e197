//! From what a rank has of each weight to its parameters: which entries of which axis of each tensor.

use super::{Cut, Split};
use crate::{
    published::PublishedError,
    spec::{ModelSpec, QuantizationScheme, Weight},
    weights::{Parameter, WeightMap},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// What of a parameter a rank has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selection {
    Whole,
    Entries { axis: usize, ranges: Vec<Range<u64>> },
}

/// The parameters of a rank.
pub(super) fn weights(split: &Split, spec: &ModelSpec, whole: &WeightMap) -> Result<WeightMap, PublishedError> {
    let mut map = WeightMap { activation_dtype: whole.activation_dtype, ..WeightMap::default() };
    for (part, parameters) in &whole.parts {
        let selections = Selections::new(spec, whole, *part);
        let mut own = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            match selections.of(split, parameter) {
                Selection::Whole => own.push(parameter.clone()),
                Selection::Entries { axis, ranges } => own.push(parameter.clone().select(axis, &ranges)?),
            }
        }
        map.parts.insert(*part, own);
    }
    Ok(map)
}

/// How the parameters of one part are cut.
pub(super) struct Selections<'a> {
    weights: BTreeMap<String, Weight<'a>>,
    quantised: BTreeSet<&'a str>,
    spec: &'a ModelSpec,
}

impl<'a> Selections<'a> {
    pub(super) fn new(spec: &'a ModelSpec, whole: &'a WeightMap, part: crate::spec::Part) -> Self {
        let weights = spec.weights(part).into_iter().map(|weight| (weight.path().to_owned(), weight)).collect();
        let names = whole.parts.get(&part).into_iter().flatten().map(|parameter| parameter.name.as_str());
        Self { weights, quantised: names.filter_map(|name| name.strip_suffix(".scales")).collect(), spec }
    }

    pub(super) fn of(&self, split: &Split, parameter: &Parameter) -> Selection {
        let name = parameter.name.as_str();
        let (path, piece) = match name.rsplit_once('.') {
            Some((path, piece)) if !split.cuts.contains_key(name) => (path, piece),
            _ => (name, ""),
        };
        let Some(cut) = split.cuts.get(path) else { return Selection::Whole };
        let is_stack = matches!(self.weights.get(path), Some(Weight::Experts(_) | Weight::HeadLinear(_)));
        let output_axis = usize::from(is_stack);
        match cut {
            Cut::Member(range) => entries(0, std::slice::from_ref(range)),
            Cut::Output(ranges) => entries(output_axis, ranges),
            Cut::Input(_) if piece == "bias" => Selection::Whole,
            Cut::Input(ranges) => {
                let scheme = self.spec.quantization.scheme(path).filter(|_| self.quantised.contains(path));
                Selection::Entries { axis: output_axis + 1, ranges: ranges.iter().map(|range| columns(range, piece, scheme)).collect() }
            }
        }
    }
}

fn entries(axis: usize, ranges: &[Range<u32>]) -> Selection {
    Selection::Entries { axis, ranges: ranges.iter().map(|range| u64::from(range.start)..u64::from(range.end)).collect() }
}

/// Columns of a matrix as columns of one of its tensors: words of packed numbers, one scale and bias a group.
fn columns(range: &Range<u32>, piece: &str, scheme: Option<QuantizationScheme>) -> Range<u64> {
    let (start, end) = (u64::from(range.start), u64::from(range.end));
    let Some(scheme) = scheme else { return start..end };
    let group = u64::from(scheme.group_size);
    let per_group = if piece == "weight" { group * u64::from(scheme.bits) / 32 } else { 1 };
    start / group * per_group..end / group * per_group
}

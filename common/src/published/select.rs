//! Some entries of one axis of a tensor, taken where they are read: a selection moves towards the tensors of the checkpoint through every
//! operation that it commutes with exactly, and stays outside of the others.

use super::{
    PublishedError,
    recipe::{Affine, QuantisedPiece, Recipe},
    symbolic::{QuantisedTensors, SymbolicTensor},
};
use std::ops::Range;

/// A selection inside of the parts of a reshaped axis is moved into as many pieces at most.
const MAX_PIECES: u64 = 4096;

/// Entries `start`, `start + step`, ... of an axis, the last of them is `stop - 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub start: u64,
    pub stop: u64,
    pub step: u64,
}

impl Span {
    /// Entries below `stop`, which has to be above `start`.
    pub(super) fn new(start: u64, stop: u64, step: u64) -> Self {
        let last = start + (stop - 1 - start) / step * step;
        Self { start, stop: last + 1, step: if last == start { 1 } else { step } }
    }

    pub fn whole(dim: u64) -> Self {
        Self { start: 0, stop: dim, step: 1 }
    }

    /// The number of entries.
    pub fn count(&self) -> u64 {
        (self.stop - self.start).div_ceil(self.step)
    }

    /// What this selects of the entries that `outer` selects of an axis, as entries of that axis.
    pub(super) fn of(&self, outer: &Span) -> Span {
        Span::new(outer.start + self.start * outer.step, outer.start + (self.stop - 1) * outer.step + 1, self.step * outer.step)
    }

    /// Whether both have an entry.
    pub(super) fn meets(&self, other: &Span) -> bool {
        let (first, end) = (self.start.max(other.start), self.stop.min(other.stop));
        let has = |span: &Span, entry: u64| (entry - span.start).is_multiple_of(span.step);
        (first..end).any(|entry| has(self, entry) && has(other, entry))
    }

    /// The entries inside of a range, counted from its start.
    fn inside(&self, range: &Range<u64>) -> Option<Span> {
        let skipped = range.start.saturating_sub(self.start).div_ceil(self.step);
        let (start, stop) = (self.start + skipped * self.step, self.stop.min(range.end));
        (start < stop).then(|| Span::new(start - range.start, stop - range.start, self.step))
    }

    fn entries(self) -> impl Iterator<Item = usize> {
        (self.start..self.stop).step_by(self.step as usize).map(|entry| entry as usize)
    }
}

/// Adds a span; runs that follow one another become one.
fn push(spans: &mut Vec<Span>, span: Span) {
    match spans.last_mut() {
        Some(last) if last.step == 1 && span.step == 1 && last.stop == span.start => last.stop = span.stop,
        _ => spans.push(span),
    }
}

fn count(spans: &[Span]) -> u64 {
    spans.iter().map(Span::count).sum()
}

impl SymbolicTensor {
    /// The entries of these ranges of an axis, one range after the other; they may come in any order, and repeat.
    pub fn select(self, axis: usize, ranges: &[Range<u64>]) -> Result<Self, PublishedError> {
        let dim = self.shape.get(axis).copied().unwrap_or(0);
        let mut spans = Vec::new();
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            push(&mut spans, Span { start: range.start, stop: range.end, step: 1 });
        }
        if spans.is_empty() || spans.iter().any(|span| span.stop > dim) {
            return Err(self.cannot(format!("restricted to {ranges:?} along axis {axis}")));
        }
        self.select_spans(axis, &spans)
    }

    /// Spans inside of the axis, at least one.
    pub(super) fn select_spans(self, axis: usize, spans: &[Span]) -> Result<Self, PublishedError> {
        if spans == [Span::whole(self.shape[axis])] {
            return Ok(self);
        }
        let is_last = axis + 1 == self.shape.len();
        match self.recipe {
            Recipe::Tensor(_) => self.cut(axis, spans),
            Recipe::Slice { .. } if self.recipe.is_box() => self.cut(axis, spans),
            Recipe::Stack(of) => select_of_stack(of, axis, spans),
            Recipe::Concatenate { of, axis: along } => select_of_joined(of, along, axis, spans),
            Recipe::Slice { of, axis: along, start, stop, step } => {
                let (of, outer) = (Self::of_recipe(*of)?, Span::new(start, stop, step));
                if along == axis {
                    return of.select_spans(axis, &spans.iter().map(|span| span.of(&outer)).collect::<Vec<_>>());
                }
                of.select_spans(axis, spans)?.cut(along, &[outer])
            }
            Recipe::Reshape { of, shape } => Self::of_recipe(*of)?.select_reshaped(shape, axis, spans),
            Recipe::Transpose { of, axes } => Self::of_recipe(*of)?.select_spans(axes[axis], spans)?.transpose(&axes),
            Recipe::View { of, dtype } => {
                let of = Self::of_recipe(*of)?;
                if !is_last {
                    return of.select_spans(axis, spans)?.view(dtype);
                }
                let ratio = (dtype.size(), of.dtype.size());
                in_units(axis, spans, self.shape[axis], unit(ratio), ratio.0 == ratio.1, |spans| {
                    of.clone().select_spans(axis, &times(spans, ratio))?.view(dtype)
                })
            }
            Recipe::Add { of, addend } => Self::of_recipe(*of)?.select_spans(axis, spans)?.plus(addend),
            Recipe::Scale { of, factor } => Self::of_recipe(*of)?.select_spans(axis, spans)?.scale(factor),
            Recipe::ScaleRows { of, runs } => {
                let runs = if axis == 0 { select_runs(&runs, spans) } else { runs };
                Self::of_recipe(*of)?.select_spans(axis, spans)?.scale_rows(&runs)
            }
            Recipe::NormaliseColumns { of, eps } => {
                let of = Self::of_recipe(*of)?;
                match axis {
                    0 => of.normalise_columns(eps)?.cut(axis, spans),
                    _ => of.select_spans(axis, spans)?.normalise_columns(eps),
                }
            }
            Recipe::Fp8 { weight, scales, block } => select_fp8([*weight, *scales], block, axis, spans),
            Recipe::Dequantise { weight, scales, biases, affine } => {
                let [weight, scales, biases] = [*weight, *scales, *biases].map(Self::of_recipe);
                let quantised = QuantisedTensors { weight: weight?, scales: scales?, biases: biases? };
                select_dequantised(&quantised, affine, &self.shape, axis, spans)
            }
            Recipe::Quantise { of, affine, piece } => {
                let of = Self::of_recipe(*of)?;
                if !is_last {
                    return piece_of(of.select_spans(axis, spans)?, affine, piece);
                }
                let columns = affine_unit(affine);
                let entries = match piece {
                    QuantisedPiece::Weight => columns * u64::from(affine.bits) / 32,
                    QuantisedPiece::Scales | QuantisedPiece::Biases => columns / u64::from(affine.group_size),
                };
                in_units(axis, spans, self.shape[axis], entries, false, |spans| {
                    piece_of(of.clone().select_spans(axis, &times(spans, (columns, entries)))?, affine, piece)
                })
            }
        }
    }

    /// What a recipe makes.
    pub(crate) fn of_recipe(recipe: Recipe) -> Result<Self, PublishedError> {
        let all = |of: Vec<Recipe>| of.into_iter().map(Self::of_recipe).collect::<Result<Vec<_>, _>>();
        match recipe {
            Recipe::Tensor(source) => Ok(Self::of_source(source)),
            Recipe::Stack(of) => Self::stack(all(of)?),
            Recipe::Concatenate { of, axis } => Self::concatenate(all(of)?, axis as i32),
            Recipe::Slice { of, axis, start, stop, step } => Self::of_recipe(*of)?.cut(axis, &[Span::new(start, stop, step)]),
            Recipe::Reshape { of, shape } => Self::of_recipe(*of)?.reshape(&shape),
            Recipe::Transpose { of, axes } => Self::of_recipe(*of)?.transpose(&axes),
            Recipe::View { of, dtype } => Self::of_recipe(*of)?.view(dtype),
            Recipe::Add { of, addend } => Self::of_recipe(*of)?.plus(addend),
            Recipe::Scale { of, factor } => Self::of_recipe(*of)?.scale(factor),
            Recipe::ScaleRows { of, runs } => Self::of_recipe(*of)?.scale_rows(&runs),
            Recipe::NormaliseColumns { of, eps } => Self::of_recipe(*of)?.normalise_columns(eps),
            Recipe::Fp8 { weight, scales, block } => Self::of_recipe(*weight)?.dequantise_fp8(Self::of_recipe(*scales)?, block),
            Recipe::Dequantise { weight, scales, biases, affine } => {
                let [weight, scales, biases] = [*weight, *scales, *biases].map(Self::of_recipe);
                let scales = scales?;
                let columns = scales.dim(-1) * u64::from(affine.group_size);
                QuantisedTensors { weight: weight?, scales, biases: biases? }.dequantise(columns)
            }
            Recipe::Quantise { of, affine, piece } => piece_of(Self::of_recipe(*of)?, affine, piece),
        }
    }

    /// The spans as slices of the tensor as it is.
    fn cut(self, axis: usize, spans: &[Span]) -> Result<Self, PublishedError> {
        let piece = |span: &Span| self.clone().cut_span(axis, span);
        match spans {
            [span] => Ok(self.cut_span(axis, span)),
            _ => Self::concatenate(spans.iter().map(piece).collect(), axis as i32),
        }
    }

    fn cut_span(self, axis: usize, span: &Span) -> Self {
        if *span == Span::whole(self.shape[axis]) {
            return self;
        }
        let mut shape = self.shape.clone();
        shape[axis] = span.count();
        let Span { start, stop, step } = *span;
        self.then(shape, |of| Recipe::Slice { of, axis, start, stop, step })
    }

    /// Spans of this after it was reshaped. Entries of an axis are runs of elements; where an axis of this starts at the same element, they
    /// are runs of its entries too.
    fn select_reshaped(self, shape: Vec<u64>, axis: usize, spans: &[Span]) -> Result<Self, PublishedError> {
        let Some(Split { axis: inner, outer }) = Split::find(&self.shape, &shape, axis, spans.len() as u64) else {
            return self.reshape(&shape)?.cut(axis, spans);
        };
        let dim = shape[axis];
        let ratio = (self.shape[inner], outer * dim);
        in_units(axis, spans, dim, unit(ratio), ratio.0 == ratio.1, |spans| {
            let mut entries = Vec::new();
            for i in 0..outer {
                let moved = spans.iter().map(|span| Span { start: span.start + i * dim, stop: span.stop + i * dim, step: span.step });
                times(&moved.collect::<Vec<_>>(), ratio).into_iter().for_each(|span| push(&mut entries, span));
            }
            let mut shape = shape.clone();
            shape[axis] = count(spans);
            self.clone().select_spans(inner, &entries)?.reshape(&shape)
        })
    }
}

/// Where an axis of a reshaped tensor lies in the tensor before.
struct Split {
    /// The axis before.
    axis: usize,
    /// That axis holds the axis of the reshaped tensor so many times, one after the other.
    outer: u64,
}

impl Split {
    fn find(before: &[u64], after: &[u64], axis: usize, spans: u64) -> Option<Self> {
        (0..=axis).rev().find_map(|first| {
            let elements: u64 = after[..first].iter().product();
            let outer: u64 = after[first..axis].iter().product();
            let inner = (0..before.len()).rev().find(|inner| before[..*inner].iter().product::<u64>() == elements)?;
            let fits = outer == 1 || (before[inner].is_multiple_of(outer * after[axis]) && outer * spans <= MAX_PIECES);
            fits.then_some(Split { axis: inner, outer })
        })
    }
}

/// Selects in whole units of an axis by `select`; the last unit may be cut short when it is selected last. What is not whole units is
/// cut out of the units around it. `strided`: `select` takes steps too, when units are single entries.
fn in_units(
    axis: usize,
    spans: &[Span],
    dim: u64,
    unit: u64,
    strided: bool,
    select: impl Fn(&[Span]) -> Result<SymbolicTensor, PublishedError>,
) -> Result<SymbolicTensor, PublishedError> {
    let whole_units = |(i, span): (usize, &Span)| {
        let ends = span.stop.is_multiple_of(unit) || (span.stop == dim && i + 1 == spans.len());
        (span.step == 1 || (strided && unit == 1)) && span.start.is_multiple_of(unit) && ends
    };
    if spans.iter().enumerate().all(whole_units) {
        return select(spans);
    }
    let mut pieces = Vec::new();
    for span in spans {
        let start = span.start / unit * unit;
        let around = Span { start, stop: span.stop.next_multiple_of(unit).min(dim), step: 1 };
        let inside = Span { start: span.start - start, stop: span.stop - start, step: span.step };
        pieces.push(select(&[around])?.cut_span(axis, &inside));
    }
    joined(pieces, axis)
}

/// Entries of an axis with `ratio.0` entries where another has `ratio.1`.
fn times(spans: &[Span], ratio: (u64, u64)) -> Vec<Span> {
    let scaled = |span: &Span| match ratio.0 == ratio.1 {
        true => *span,
        false => Span { start: span.start * ratio.0 / ratio.1, stop: (span.stop * ratio.0).div_ceil(ratio.1), step: 1 },
    };
    spans.iter().map(scaled).collect()
}

/// Of an axis with `ratio.1` entries where another has `ratio.0`: the least number of entries that is whole entries of the other.
fn unit(ratio: (u64, u64)) -> u64 {
    let (mut a, mut b) = ratio;
    while b > 0 {
        (a, b) = (b, a % b);
    }
    ratio.1 / a.max(1)
}

fn joined(mut tensors: Vec<SymbolicTensor>, axis: usize) -> Result<SymbolicTensor, PublishedError> {
    match tensors.len() {
        1 => Ok(tensors.remove(0)),
        _ => SymbolicTensor::concatenate(tensors, axis as i32),
    }
}

fn select_of_stack(of: Vec<Recipe>, axis: usize, spans: &[Span]) -> Result<SymbolicTensor, PublishedError> {
    if axis == 0 {
        let members = spans.iter().flat_map(|span| span.entries()).map(|i| SymbolicTensor::of_recipe(of[i].clone()));
        return SymbolicTensor::stack(members.collect::<Result<_, _>>()?);
    }
    let members = of.into_iter().map(|member| SymbolicTensor::of_recipe(member)?.select_spans(axis - 1, spans));
    SymbolicTensor::stack(members.collect::<Result<_, _>>()?)
}

fn select_of_joined(of: Vec<Recipe>, along: usize, axis: usize, spans: &[Span]) -> Result<SymbolicTensor, PublishedError> {
    let members = of.into_iter().map(SymbolicTensor::of_recipe).collect::<Result<Vec<_>, _>>()?;
    if along != axis {
        let members = members.into_iter().map(|member| member.select_spans(axis, spans));
        return SymbolicTensor::concatenate(members.collect::<Result<_, _>>()?, along as i32);
    }
    let mut pieces: Vec<(usize, Vec<Span>)> = Vec::new();
    for span in spans {
        let mut start = 0;
        for (i, member) in members.iter().enumerate() {
            let stop = start + member.shape[axis];
            match (span.inside(&(start..stop)), pieces.last_mut()) {
                (None, _) => {}
                (Some(part), Some((last, parts))) if *last == i => push(parts, part),
                (Some(part), _) => pieces.push((i, vec![part])),
            }
            start = stop;
        }
    }
    let selected = pieces.into_iter().map(|(i, parts)| members[i].clone().select_spans(axis, &parts));
    joined(selected.collect::<Result<_, _>>()?, axis)
}

fn select_runs(runs: &[(u64, f32)], spans: &[Span]) -> Vec<(u64, f32)> {
    let mut selected: Vec<(u64, f32)> = Vec::new();
    for span in spans {
        let mut start = 0;
        for (rows, factor) in runs {
            let part = span.inside(&(start..start + rows)).map_or(0, |part| part.count());
            match selected.last_mut() {
                _ if part == 0 => {}
                Some((rows, last)) if last == factor => *rows += part,
                _ => selected.push((part, *factor)),
            }
            start += rows;
        }
    }
    selected
}

fn select_fp8(of: [Recipe; 2], block: Option<[u64; 2]>, axis: usize, spans: &[Span]) -> Result<SymbolicTensor, PublishedError> {
    let [weight, scales] = of.map(SymbolicTensor::of_recipe);
    let (weight, scales) = (weight?, scales?);
    let Some(block) = block else {
        // The scales' axes are the last of the weight's.
        let missing = weight.shape.len() - scales.shape.len();
        let has_axis = axis.checked_sub(missing).filter(|axis| scales.shape[*axis] > 1);
        let scales = has_axis.map_or(Ok(scales.clone()), |axis| scales.select_spans(axis, spans))?;
        return weight.select_spans(axis, spans)?.dequantise_fp8(scales, None);
    };
    in_units(axis, spans, weight.shape[axis], block[axis], false, |spans| {
        let scales = scales.clone().select_spans(axis, &times(spans, (1, block[axis])))?;
        weight.clone().select_spans(axis, spans)?.dequantise_fp8(scales, Some(block))
    })
}

/// `shape` is that of the numbers.
fn select_dequantised(
    of: &QuantisedTensors,
    affine: Affine,
    shape: &[u64],
    axis: usize,
    spans: &[Span],
) -> Result<SymbolicTensor, PublishedError> {
    let select = |weight: &[Span], groups: &[Span]| -> Result<QuantisedTensors, PublishedError> {
        Ok(QuantisedTensors {
            weight: of.weight.clone().select_spans(axis, weight)?,
            scales: of.scales.clone().select_spans(axis, groups)?,
            biases: of.biases.clone().select_spans(axis, groups)?,
        })
    };
    if axis + 1 != shape.len() {
        return select(spans, spans)?.dequantise(shape[shape.len() - 1]);
    }
    in_units(axis, spans, shape[axis], affine_unit(affine), false, |spans| {
        let (words, groups) = (times(spans, (u64::from(affine.bits), 32)), times(spans, (1, u64::from(affine.group_size))));
        select(&words, &groups)?.dequantise(count(spans))
    })
}

/// The least number of columns that is whole groups and whole words.
fn affine_unit(affine: Affine) -> u64 {
    let group_size = u64::from(affine.group_size);
    group_size * unit((group_size * u64::from(affine.bits), 32))
}

fn piece_of(of: SymbolicTensor, affine: Affine, piece: QuantisedPiece) -> Result<SymbolicTensor, PublishedError> {
    let QuantisedTensors { weight, scales, biases } = of.quantise(affine)?;
    Ok(match piece {
        QuantisedPiece::Weight => weight,
        QuantisedPiece::Scales => scales,
        QuantisedPiece::Biases => biases,
    })
}

#[cfg(test)]
#[path = "select_tests.rs"]
pub(super) mod tests;

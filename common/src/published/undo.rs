//! The way back: which entries of which tensors of the checkpoint have to become what, so that a recipe makes a new value.

use super::{
    recipe::{Recipe, SourceTensor},
    select::Span,
    symbolic::SymbolicTensor,
};
use crate::dtype::DType;
use std::collections::BTreeMap;

/// Entries of a tensor of the checkpoint, and how they follow from the new value of a parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment<'a> {
    pub source: &'a SourceTensor,
    /// The entries of each axis of the source.
    pub spans: Vec<Span>,
    /// What is done to the new value, one after the other; it has the shape of the spans then, and the source's type.
    pub steps: Vec<Step>,
}

/// An operation on an array; each undoes one of a [`Recipe`]. Numbers keep their type.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// One entry of the first axis, without that axis.
    Entry(u64),
    /// Entries `start..stop` of an axis.
    Part {
        axis: usize,
        start: u64,
        stop: u64,
    },
    Reshape(Vec<u64>),
    /// Axis `i` of the result is axis `axes[i]` of the operand.
    Transpose(Vec<usize>),
    View(DType),
    Subtract(f32),
    Divide(f32),
    /// Runs of entries of the first axis, each run by its factor.
    DivideRows(Vec<(u64, f32)>),
}

/// A recipe has no way back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{tensor}` is {action} on loading, which has no way back")]
pub struct Irreversible {
    /// The first tensor of the checkpoint that the part without a way back is made of.
    pub tensor: String,
    pub action: &'static str,
}

impl Recipe {
    /// The assignments after which this recipe makes a new value, whatever that is; up to the rounding of `Subtract` and `Divide`. No two
    /// of them meet.
    pub fn undo(&self) -> Result<Vec<Assignment<'_>>, Irreversible> {
        let mut assignments = Vec::new();
        self.undo_after(Vec::new(), &mut assignments)?;
        let mut by_source: BTreeMap<&str, Vec<&Assignment>> = BTreeMap::new();
        for assignment in &assignments {
            let others = by_source.entry(&assignment.source.name).or_default();
            if others.iter().any(|other| other.meets(assignment)) {
                return Err(Irreversible { tensor: assignment.source.name.clone(), action: "used twice" });
            }
            others.push(assignment);
        }
        Ok(assignments)
    }

    fn undo_after<'a>(&'a self, mut steps: Vec<Step>, out: &mut Vec<Assignment<'a>>) -> Result<(), Irreversible> {
        if let Some((source, spans)) = self.as_box() {
            out.push(Assignment { source, spans, steps });
            return Ok(());
        }
        let (of, step) = match self {
            Recipe::Stack(of) => {
                return (0..).zip(of).try_for_each(|(i, member)| member.undo_after(with(&steps, Step::Entry(i)), out));
            }
            Recipe::Concatenate { of, axis } => {
                let mut start = 0;
                return of.iter().try_for_each(|member| {
                    let stop = start + member.made()?.shape[*axis];
                    let part = Step::Part { axis: *axis, start, stop };
                    start = stop;
                    member.undo_after(with(&steps, part), out)
                });
            }
            Recipe::Reshape { of, .. } => (of, Step::Reshape(of.made()?.shape)),
            Recipe::Transpose { of, axes } => (of, Step::Transpose(inverse(axes))),
            Recipe::View { of, .. } => (of, Step::View(of.made()?.dtype)),
            Recipe::Add { of, addend } => (of, Step::Subtract(*addend)),
            Recipe::Scale { of, factor } if *factor != 0.0 => (of, Step::Divide(*factor)),
            Recipe::ScaleRows { of, runs } if runs.iter().all(|(_, factor)| *factor != 0.0) => (of, Step::DivideRows(runs.clone())),
            Recipe::Scale { .. } | Recipe::ScaleRows { .. } => return Err(self.irreversible("multiplied by 0")),
            Recipe::Tensor(_) | Recipe::Slice { .. } => return Err(self.irreversible("computed and then cut")),
            Recipe::NormaliseColumns { .. } => return Err(self.irreversible("normalised")),
            Recipe::Fp8 { .. } => return Err(self.irreversible("widened from fp8")),
            Recipe::Dequantise { .. } => return Err(self.irreversible("dequantised")),
            Recipe::Quantise { .. } => return Err(self.irreversible("quantised again")),
        };
        steps.push(step);
        of.undo_after(steps, out)
    }

    fn made(&self) -> Result<SymbolicTensor, Irreversible> {
        // A recipe in a weight map was made by the same checks.
        SymbolicTensor::of_recipe(self.clone()).map_err(|_| self.irreversible("made against the rules"))
    }

    fn irreversible(&self, action: &'static str) -> Irreversible {
        Irreversible { tensor: self.sources().first().map(ToString::to_string).unwrap_or_default(), action }
    }
}

impl Assignment<'_> {
    /// Whether both have an entry of the same tensor.
    pub fn meets(&self, other: &Assignment) -> bool {
        self.source.name == other.source.name && self.spans.iter().zip(&other.spans).all(|(a, b)| a.meets(b))
    }

    /// Whether every entry of the tensor is assigned.
    pub fn is_whole(&self) -> bool {
        self.spans.iter().zip(&self.source.shape).all(|(span, dim)| span.count() == *dim)
    }
}

fn with(steps: &[Step], step: Step) -> Vec<Step> {
    steps.iter().cloned().chain([step]).collect()
}

/// The permutation that brings back what `axes` moved.
fn inverse(axes: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; axes.len()];
    for (i, axis) in axes.iter().enumerate() {
        inverse[*axis] = i;
    }
    inverse
}

#[cfg(test)]
#[path = "undo_tests.rs"]
mod tests;

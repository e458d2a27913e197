//! Recipes that only put parts of tensors side by side, as a list of what goes from where to where.

use super::{
    recipe::{Recipe, SourceTensor},
    select::Span,
};
use crate::dtype::DType;

/// A box of a tensor of the checkpoint, and its place in the row-major bytes of what a recipe makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<'a> {
    pub source: &'a SourceTensor,
    /// The entries of each axis of the source.
    pub spans: Vec<Span>,
    /// Where the first element goes, in bytes.
    pub offset: u64,
    /// From one entry of an axis to the next, in bytes; elements of the last axis lie side by side.
    pub strides: Vec<u64>,
}

impl Recipe {
    /// Type and shape of what a recipe of this kind makes; None for one that computes.
    pub fn gathered_type(&self) -> Option<(DType, Vec<u64>)> {
        match self {
            Recipe::Stack(of) => {
                let (dtype, shape) = of.first()?.gathered_type()?;
                Some((dtype, [&[of.len() as u64], &shape[..]].concat()))
            }
            Recipe::Concatenate { of, axis } => {
                let (dtype, mut shape) = of.first()?.gathered_type()?;
                shape[*axis] = of.iter().map(|member| Some(member.gathered_type()?.1[*axis])).sum::<Option<u64>>()?;
                Some((dtype, shape))
            }
            Recipe::View { of, dtype } => {
                let (before, mut shape) = of.gathered_type()?;
                let last = shape.last_mut()?;
                *last = *last * before.size() / dtype.size();
                Some((*dtype, shape))
            }
            _ => {
                let (source, spans) = self.as_box()?;
                Some((source.dtype, spans.iter().map(Span::count).collect()))
            }
        }
    }

    /// What a recipe of this kind reads, in the order of the recipe; None for one that computes ([`Recipe::is_gathered`]).
    pub fn pieces(&self) -> Option<Vec<Piece<'_>>> {
        if !self.is_gathered() {
            return None;
        }
        let (dtype, shape) = self.gathered_type()?;
        let mut strides = vec![dtype.size(); shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let mut pieces = Vec::new();
        self.place(0, strides, &mut pieces)?;
        Some(pieces)
    }

    fn place<'a>(&'a self, offset: u64, mut strides: Vec<u64>, pieces: &mut Vec<Piece<'a>>) -> Option<()> {
        match self {
            Recipe::Stack(of) => {
                for (i, member) in (0..).zip(of) {
                    member.place(offset + i * strides[0], strides[1..].to_vec(), pieces)?;
                }
            }
            Recipe::Concatenate { of, axis } => {
                let mut start = 0;
                for member in of {
                    member.place(offset + start * strides[*axis], strides.clone(), pieces)?;
                    start += member.gathered_type()?.1[*axis];
                }
            }
            Recipe::View { of, .. } => {
                *strides.last_mut()? = of.gathered_type()?.0.size();
                of.place(offset, strides, pieces)?;
            }
            _ => {
                let (source, spans) = self.as_box()?;
                pieces.push(Piece { source, spans, offset, strides });
            }
        }
        Some(())
    }

    /// The tensor of the checkpoint that this is slices of, and the entries of each of its axes.
    pub(super) fn as_box(&self) -> Option<(&SourceTensor, Vec<Span>)> {
        match self {
            Recipe::Tensor(source) => Some((source, source.shape.iter().map(|dim| Span::whole(*dim)).collect())),
            Recipe::Slice { of, axis, start, stop, step } => {
                let (source, mut spans) = of.as_box()?;
                spans[*axis] = Span::new(*start, *stop, *step).of(&spans[*axis]);
                Some((source, spans))
            }
            _ => None,
        }
    }
}

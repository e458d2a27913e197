//! How a tensor that a block asks for is made of tensors of a checkpoint, as data: planned with here, evaluated by an engine.

use crate::dtype::DType;
use std::sync::Arc;

/// An expression over tensors of a checkpoint. Shapes and types follow MLX; [`super::SymbolicTensor`] checks them when it is made.
#[derive(Debug, Clone, PartialEq)]
pub enum Recipe {
    /// A tensor as it is in the file.
    Tensor(Arc<SourceTensor>),
    /// Equal shapes along a new first axis.
    Stack(Vec<Recipe>),
    Concatenate {
        of: Vec<Recipe>,
        axis: usize,
    },
    /// Entries `start`, `start + step`, ... below `stop` of an axis.
    Slice {
        of: Box<Recipe>,
        axis: usize,
        start: u64,
        stop: u64,
        step: u64,
    },
    Reshape {
        of: Box<Recipe>,
        shape: Vec<u64>,
    },
    /// Axis `i` of the result is axis `axes[i]` of the operand.
    Transpose {
        of: Box<Recipe>,
        axes: Vec<usize>,
    },
    /// The same bytes read as another type; the last axis changes by the ratio of the sizes.
    View {
        of: Box<Recipe>,
        dtype: DType,
    },
    /// Every element plus a number, in the operand's type.
    Add {
        of: Box<Recipe>,
        addend: f32,
    },
    /// Every element times a number, in the operand's type.
    Scale {
        of: Box<Recipe>,
        factor: f32,
    },
    /// Runs of entries of the first axis, each run times its factor, in the operand's type.
    ScaleRows {
        of: Box<Recipe>,
        runs: Vec<(u64, f32)>,
    },
    /// Every column over its Euclidean norm plus `eps`: `w[i, j] / (sqrt(sum_i w[i, j]²) + eps)`, reckoned in f32.
    NormaliseColumns {
        of: Box<Recipe>,
        eps: f32,
    },
    /// Bytes e4m3 times scales, as BF16. With `block` one scale a `[rows, columns]` block, the last blocks of an axis may be cut short;
    /// without, the scales are broadcast.
    Fp8 {
        weight: Box<Recipe>,
        scales: Box<Recipe>,
        block: Option<[u64; 2]>,
    },
    /// An affinely quantised matrix as numbers of the scales' type.
    Dequantise {
        weight: Box<Recipe>,
        scales: Box<Recipe>,
        biases: Box<Recipe>,
        affine: Affine,
    },
    /// One of the three tensors that affine quantisation makes of a matrix.
    Quantise {
        of: Box<Recipe>,
        affine: Affine,
        piece: QuantisedPiece,
    },
}

/// A tensor of the checkpoint, as its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
}

/// Groups of `group_size` numbers along the last axis, `bits` each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affine {
    pub group_size: u32,
    pub bits: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantisedPiece {
    Weight,
    Scales,
    Biases,
}

impl Recipe {
    /// The tensors of the checkpoint that this is made of, one entry for each time that one is used.
    pub fn sources(&self) -> Vec<&str> {
        let mut sources = Vec::new();
        self.visit(&mut |name| sources.push(name));
        sources
    }

    /// Whether this is part of a tensor of the checkpoint: slices of it, and nothing else.
    pub fn is_box(&self) -> bool {
        match self {
            Recipe::Tensor(_) => true,
            Recipe::Slice { of, .. } => of.is_box(),
            _ => false,
        }
    }

    /// Whether this puts parts of tensors of the checkpoint side by side, so that they can be read to where they belong.
    pub fn is_gathered(&self) -> bool {
        match self {
            Recipe::Stack(of) | Recipe::Concatenate { of, .. } => of.iter().all(Recipe::is_gathered),
            Recipe::View { of, .. } => of.is_gathered(),
            _ => self.is_box(),
        }
    }

    fn visit<'a>(&'a self, found: &mut impl FnMut(&'a str)) {
        match self {
            Recipe::Tensor(source) => found(&source.name),
            Recipe::Stack(of) | Recipe::Concatenate { of, .. } => of.iter().for_each(|recipe| recipe.visit(found)),
            Recipe::Slice { of, .. }
            | Recipe::Reshape { of, .. }
            | Recipe::Transpose { of, .. }
            | Recipe::View { of, .. }
            | Recipe::Add { of, .. }
            | Recipe::Scale { of, .. }
            | Recipe::ScaleRows { of, .. }
            | Recipe::NormaliseColumns { of, .. }
            | Recipe::Quantise { of, .. } => of.visit(found),
            Recipe::Fp8 { weight, scales, .. } => [weight, scales].into_iter().for_each(|recipe| recipe.visit(found)),
            Recipe::Dequantise { weight, scales, biases, .. } => {
                [weight, scales, biases].into_iter().for_each(|recipe| recipe.visit(found));
            }
        }
    }
}

//! Selections of random recipes against entries cut out of the whole. Elements are bit patterns, and arithmetic wraps: what counts is
//! which elements meet, not what becomes of them.
// Lists of one range are meant.
#![allow(clippy::single_range_in_vec_init)]

use super::*;
use crate::{dtype::DType, published::SourceTensor};

/// Row-major elements.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::published) struct Values {
    pub(in crate::published) dtype: DType,
    pub(in crate::published) shape: Vec<u64>,
    pub(in crate::published) elements: Vec<u64>,
}

impl Values {
    /// The element at an index is `from` of it.
    pub(in crate::published) fn new(dtype: DType, shape: &[u64], mut from: impl FnMut(&[u64]) -> u64) -> Self {
        let mut index = vec![0; shape.len()];
        let mut elements = Vec::new();
        for flat in 0..shape.iter().product::<u64>() {
            let mut rest = flat;
            for (axis, dim) in shape.iter().enumerate().rev() {
                (index[axis], rest) = (rest % dim, rest / dim);
            }
            elements.push(from(&index) & (u64::MAX >> (64 - 8 * dtype.size())));
        }
        Self { dtype, shape: shape.to_vec(), elements }
    }

    pub(in crate::published) fn at(&self, index: &[u64]) -> u64 {
        self.elements[index.iter().zip(&self.shape).fold(0, |flat, (i, dim)| flat * dim + i) as usize]
    }

    pub(in crate::published) fn with(&self, shape: &[u64], from: impl FnMut(&[u64]) -> u64) -> Self {
        Self::new(self.dtype, shape, from)
    }

    pub(in crate::published) fn map(&self, change: impl Fn(&[u64], u64) -> u64) -> Self {
        self.with(&self.shape, |index| change(index, self.at(index)))
    }

    /// The entries of an axis that a list names.
    pub(in crate::published) fn taken(&self, axis: usize, entries: &[u64]) -> Self {
        let mut shape = self.shape.clone();
        shape[axis] = entries.len() as u64;
        self.with(&shape, |index| self.at(&moved(index, axis, entries[index[axis] as usize])))
    }

    /// The bytes of every row, read by `size`.
    pub(in crate::published) fn bytes(&self) -> Vec<u8> {
        self.elements.iter().flat_map(|element| element.to_le_bytes().into_iter().take(self.dtype.size() as usize)).collect()
    }
}

pub(in crate::published) fn moved(index: &[u64], axis: usize, entry: u64) -> Vec<u64> {
    index.iter().enumerate().map(|(i, at)| if i == axis { entry } else { *at }).collect()
}

/// Number `i` of a row of packed words.
fn unpacked(weight: &Values, row: &[u64], i: u64, bits: u64) -> u64 {
    let bit = |bit: u64| weight.at(&[row, &[bit / 32]].concat()) >> (bit % 32) & 1;
    (0..bits).map(|n| bit(i * bits + n) << n).sum()
}

/// What tensors of a made-up checkpoint hold follows from their names.
pub(in crate::published) fn source(source: &SourceTensor) -> Values {
    let seed = source.name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into()));
    let mut random = Random(seed);
    Values::new(source.dtype, &source.shape, |_| random.next())
}

fn evaluated(recipe: &Recipe) -> Values {
    evaluated_of(recipe, &source)
}

/// The same over tensors that hold what `source` says.
pub(in crate::published) fn evaluated_of(recipe: &Recipe, source: &impl Fn(&SourceTensor) -> Values) -> Values {
    let evaluated = |recipe: &Recipe| evaluated_of(recipe, source);
    match recipe {
        Recipe::Tensor(tensor) => source(tensor),
        Recipe::Stack(of) => {
            let of: Vec<_> = of.iter().map(&evaluated).collect();
            let shape = [&[of.len() as u64], &of[0].shape[..]].concat();
            of[0].with(&shape, |index| of[index[0] as usize].at(&index[1..]))
        }
        Recipe::Concatenate { of, axis } => {
            let of: Vec<_> = of.iter().map(&evaluated).collect();
            let places: Vec<_> = of.iter().enumerate().flat_map(|(i, part)| (0..part.shape[*axis]).map(move |at| (i, at))).collect();
            let shape = moved(&of[0].shape, *axis, places.len() as u64);
            of[0].with(&shape, |index| {
                let (part, at) = places[index[*axis] as usize];
                of[part].at(&moved(index, *axis, at))
            })
        }
        Recipe::Slice { of, axis, start, stop, step } => {
            evaluated(of).taken(*axis, &(*start..*stop).step_by(*step as usize).collect::<Vec<_>>())
        }
        Recipe::Reshape { of, shape } => Values { shape: shape.clone(), ..evaluated(of) },
        Recipe::Transpose { of, axes } => {
            let of = evaluated(of);
            let shape: Vec<_> = axes.iter().map(|axis| of.shape[*axis]).collect();
            of.with(&shape, |index| {
                let place = |axis: usize| axes.iter().position(|from| *from == axis).expect("a permutation");
                of.at(&(0..axes.len()).map(|axis| index[place(axis)]).collect::<Vec<_>>())
            })
        }
        Recipe::View { of, dtype } => {
            let of = evaluated(of);
            let (last, size) = (of.shape.len() - 1, dtype.size());
            let bytes = of.bytes();
            let mut words = bytes.chunks(size as usize).map(|word| word.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
            Values::new(*dtype, &moved(&of.shape, last, of.shape[last] * of.dtype.size() / size), |_| words.next().expect("enough"))
        }
        Recipe::Add { of, addend } => evaluated(of).map(|_, element| element.wrapping_add(u64::from(addend.to_bits()))),
        Recipe::Scale { of, factor } => evaluated(of).map(|_, element| element.wrapping_mul(u64::from(factor.to_bits() | 1))),
        Recipe::ScaleRows { of, runs } => {
            let factors: Vec<u64> =
                runs.iter().flat_map(|(rows, factor)| vec![u64::from(factor.to_bits() >> 8 | 1); *rows as usize]).collect();
            evaluated(of).map(|index, element| element.wrapping_mul(factors[index[0] as usize]))
        }
        Recipe::NormaliseColumns { of, .. } => {
            let of = evaluated(of);
            let sum = |column| (0..of.shape[0]).fold(0u64, |sum, row| sum.wrapping_add(of.at(&[row, column])));
            of.map(|index, element| element ^ sum(index[1]))
        }
        Recipe::Fp8 { weight, scales, block } => fp8(&evaluated(weight), &evaluated(scales), *block),
        Recipe::Dequantise { weight, scales, biases, affine } => {
            let (weight, scales, biases) = (evaluated(weight), evaluated(scales), evaluated(biases));
            let (last, group_size) = (scales.shape.len() - 1, u64::from(affine.group_size));
            scales.with(&moved(&scales.shape, last, scales.shape[last] * group_size), |index| {
                let group = moved(index, last, index[last] / group_size);
                let number = unpacked(&weight, &index[..last], index[last], affine.bits.into());
                number.wrapping_mul(scales.at(&group)).wrapping_add(biases.at(&group))
            })
        }
        Recipe::Quantise { of, affine, piece } => quantised(&evaluated(of), *affine, *piece),
    }
}

fn fp8(weight: &Values, scales: &Values, block: Option<[u64; 2]>) -> Values {
    let missing = weight.shape.len() - scales.shape.len();
    Values::new(DType::BF16, &weight.shape, |index| {
        let at: Vec<_> = match block {
            Some(block) => index.iter().zip(block).map(|(i, size)| i / size).collect(),
            None => index[missing..].iter().zip(&scales.shape).map(|(i, dim)| if *dim == 1 { 0 } else { *i }).collect(),
        };
        weight.at(index).wrapping_mul(scales.at(&at))
    })
}

/// Like affine quantisation, a group's numbers make its scale, its bias, and the bits of each of them.
fn quantised(of: &Values, affine: Affine, piece: QuantisedPiece) -> Values {
    let (last, size, bits) = (of.shape.len() - 1, u64::from(affine.group_size), u64::from(affine.bits));
    let sum = |index: &[u64], group: u64| {
        let numbers = (group * size..(group + 1) * size).map(|i| of.at(&moved(index, last, i)));
        numbers.enumerate().fold(0u64, |sum, (i, number)| sum.wrapping_mul(3).wrapping_add(number ^ i as u64))
    };
    let number = |index: &[u64], i: u64| of.at(&moved(index, last, i)).wrapping_add(sum(index, i / size)) % (1 << bits);
    let groups = moved(&of.shape, last, of.shape[last] / size);
    match piece {
        QuantisedPiece::Scales => of.with(&groups, |index| sum(index, index[last])),
        QuantisedPiece::Biases => of.with(&groups, |index| !sum(index, index[last])),
        QuantisedPiece::Weight => Values::new(DType::U32, &moved(&of.shape, last, of.shape[last] * bits / 32), |index| {
            let bit = |at: u64| number(index, at / bits) >> (at % bits) & 1;
            (0..32).map(|n| bit(index[last] * 32 + n) << n).sum()
        }),
    }
}

/// xorshift64.
pub(in crate::published) struct Random(pub(in crate::published) u64);

impl Random {
    pub(in crate::published) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(in crate::published) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    fn of<T: Clone>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize].clone()
    }

    fn leaf(&mut self, dtype: DType, shape: &[u64]) -> SymbolicTensor {
        SymbolicTensor::of_checkpoint(&format!("t{}", self.below(1 << 30)), dtype, shape.to_vec())
    }

    fn shape(&mut self) -> Vec<u64> {
        let axes = 1 + self.below(3);
        (0..axes).map(|axis| if axis + 1 == axes { self.of(&[4, 8, 12]) } else { 1 + self.below(6) }).collect()
    }

    fn ranges(&mut self, dim: u64) -> Vec<Range<u64>> {
        let count = 1 + self.below(3);
        let range = |_| {
            let start = self.below(dim);
            start..start + 1 + self.below(dim - start)
        };
        (0..count).map(range).collect()
    }

    /// A tensor of some floats.
    pub(in crate::published) fn float(&mut self) -> SymbolicTensor {
        let shape = self.shape();
        match self.below(4) {
            0 => {
                let (rows, columns, block) = (1 + self.below(9), 1 + self.below(9), [1 + self.below(3), 1 + self.below(3)]);
                let scales = self.leaf(DType::F32, &[rows.div_ceil(block[0]), columns.div_ceil(block[1])]);
                self.leaf(DType::U8, &[rows, columns]).dequantise_fp8(scales, Some(block)).expect("blocks")
            }
            1 => {
                let skipped = self.below(shape.len() as u64) as usize;
                let scale_shape: Vec<_> = shape[skipped..].iter().map(|dim| self.of(&[1, *dim])).collect();
                let scales = self.leaf(DType::F32, &scale_shape);
                self.leaf(DType::U8, &shape).dequantise_fp8(scales, None).expect("broadcast")
            }
            2 => {
                let (rows, groups, affine) = (1 + self.below(5), 2 * (1 + self.below(3)), self.affine());
                let columns = groups * u64::from(affine.group_size);
                let weight = self.leaf(DType::U32, &[rows, columns * u64::from(affine.bits) / 32]);
                let [scales, biases] = [0, 1].map(|_| self.leaf(DType::F16, &[rows, groups]));
                QuantisedTensors { weight, scales, biases }.dequantise(columns).expect("groups")
            }
            _ => self.leaf(DType::F16, &shape),
        }
    }

    fn affine(&mut self) -> Affine {
        let (group_size, bits) = self.of(&[(8, 4), (16, 2), (8, 2), (32, 3), (16, 8)]);
        Affine { group_size, bits }
    }

    /// One verb more; the tensor as it is where the verb does not fit to it.
    pub(in crate::published) fn step(&mut self, tensor: SymbolicTensor) -> SymbolicTensor {
        let (before, n) = (tensor.clone(), tensor.shape.len());
        let axis = self.below(n as u64) as usize;
        let dim = tensor.shape[axis];
        let after = match self.below(12) {
            0 => {
                let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
                let other = [0, 1].map(|_| self.leaf(dtype, &shape));
                SymbolicTensor::stack([vec![tensor], other.to_vec()].concat())
            }
            1 => {
                let other = self.leaf(tensor.dtype, &moved(&tensor.shape, axis, 1 + axis as u64));
                SymbolicTensor::concatenate(vec![other.clone(), tensor, other], axis as i32)
            }
            2 => tensor.slice(axis as i32, 0, 1 + self.below(dim)),
            3 => tensor.every(axis as i32, self.below(dim), 2),
            4 => {
                let parts: Vec<_> = (1..=dim).filter(|part| dim.is_multiple_of(*part)).collect();
                let part = self.of(&parts);
                let shape = [&tensor.shape[..axis], &[part, dim / part], &tensor.shape[axis + 1..]].concat();
                tensor.reshape(&shape)
            }
            5 if n > 1 => {
                let at = axis.min(n - 2);
                let shape = [&tensor.shape[..at], &[tensor.shape[at] * tensor.shape[at + 1]], &tensor.shape[at + 2..]].concat();
                tensor.reshape(&shape)
            }
            6 => tensor.transpose(&(0..n).map(|i| (i + 1) % n).collect::<Vec<_>>()),
            7 => tensor.view(self.of(&[DType::U8, DType::U32, DType::F16])),
            8 => tensor.plus(1.5).and_then(|tensor| tensor.scale(-3.0)),
            9 => {
                let first = self.below(tensor.shape[0] + 1);
                let runs = [(first, 2.0), (tensor.shape[0] - first, 0.3)];
                tensor.scale_rows(&runs)
            }
            10 => tensor.normalise_columns(1e-7),
            _ => {
                let affine = self.affine();
                tensor.quantise(affine).map(|QuantisedTensors { weight, scales, biases }| self.of(&[weight, scales, biases]))
            }
        };
        after.ok().filter(|tensor| tensor.shape.iter().product::<u64>() < 4096 && tensor.shape.len() < 6).unwrap_or(before)
    }
}

#[test]
fn a_selection_is_what_is_cut_out_of_the_whole() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..6000 {
        let mut tensor = random.float();
        for _ in 0..random.below(7) {
            tensor = random.step(tensor);
        }
        let whole = evaluated(&tensor.recipe);
        assert_eq!((whole.dtype, &whole.shape), (tensor.dtype, &tensor.shape), "round {round}");
        let axis = random.below(tensor.shape.len() as u64) as usize;
        let ranges = random.ranges(tensor.shape[axis]);
        let selected = tensor.clone().select(axis, &ranges).expect("inside");
        let wanted = whole.taken(axis, &ranges.iter().cloned().flatten().collect::<Vec<_>>());
        assert_eq!((selected.dtype, &selected.shape), (wanted.dtype, &wanted.shape), "round {round}: {tensor:?} {axis} {ranges:?}");
        assert_eq!(evaluated(&selected.recipe), wanted, "round {round}: {tensor:?} {axis} {ranges:?}");
        assert_eq!(SymbolicTensor::of_recipe(selected.recipe.clone()), Ok(selected), "round {round}");
    }
}

#[test]
fn a_verb_that_selects_is_what_it_says() {
    // `slice` and `every` select too, so they are compared with recipes that were not moved.
    let mut random = Random(42);
    for round in 0..3000 {
        let mut tensor = random.float();
        for _ in 0..random.below(6) {
            tensor = random.step(tensor);
        }
        let axis = random.below(tensor.shape.len() as u64) as usize;
        let dim = tensor.shape[axis];
        let (start, step) = (random.below(dim), 1 + random.below(4));
        let of = Box::new(tensor.recipe.clone());
        let wanted = evaluated(&Recipe::Slice { of, axis, start, stop: dim, step });
        let found = tensor.clone().every(axis as i32, start, step).expect("inside");
        assert_eq!(evaluated(&found.recipe), wanted, "round {round}: {tensor:?} {axis} {start} {step}");
    }
}

/// The bytes that a recipe makes, put together from its pieces.
fn gathered(tensor: &SymbolicTensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.bytes() as usize];
    for piece in tensor.recipe.pieces().expect("gathered") {
        let (from, size) = (source(piece.source), piece.source.dtype.size() as usize);
        let counts: Vec<_> = piece.spans.iter().map(Span::count).collect();
        from.with(&counts, |index| {
            let entries: Vec<_> = index.iter().zip(&piece.spans).map(|(i, span)| span.start + i * span.step).collect();
            let at = index.iter().zip(&piece.strides).fold(piece.offset, |at, (i, stride)| at + i * stride) as usize;
            bytes[at..at + size].copy_from_slice(&from.at(&entries).to_le_bytes()[..size]);
            0
        });
    }
    bytes
}

#[test]
fn pieces_make_up_what_is_gathered() {
    let mut random = Random(7);
    let mut found = 0;
    for round in 0..6000 {
        let shape = random.shape();
        let dtype = random.of(&[DType::U8, DType::F16, DType::U32]);
        let mut tensor = random.leaf(dtype, &shape);
        for _ in 0..random.below(6) {
            let next = random.step(tensor.clone());
            tensor = if next.recipe.is_gathered() { next } else { tensor };
        }
        let axis = random.below(tensor.shape.len() as u64) as usize;
        let ranges = random.ranges(tensor.shape[axis]);
        let selected = tensor.clone().select(axis, &ranges).expect("inside");
        if selected.recipe.is_gathered() {
            found += 1;
            assert_eq!(gathered(&selected), evaluated(&selected.recipe).bytes(), "round {round}: {tensor:?} {axis} {ranges:?}");
            assert_eq!((selected.recipe.gathered_type(), selected.transient_bytes), (Some((selected.dtype, selected.shape)), 0));
        }
    }
    assert!(found > 5000, "{found}");
}

/// Elements of tensors of the checkpoint that a recipe reads.
fn elements_read(recipe: &Recipe) -> u64 {
    match recipe {
        recipe if recipe.is_box() => evaluated(recipe).elements.len() as u64,
        Recipe::Stack(of) | Recipe::Concatenate { of, .. } => of.iter().map(elements_read).sum(),
        Recipe::Slice { of, .. }
        | Recipe::Reshape { of, .. }
        | Recipe::Transpose { of, .. }
        | Recipe::View { of, .. }
        | Recipe::Add { of, .. }
        | Recipe::Scale { of, .. }
        | Recipe::ScaleRows { of, .. }
        | Recipe::NormaliseColumns { of, .. }
        | Recipe::Quantise { of, .. } => elements_read(of),
        Recipe::Fp8 { weight, scales, .. } => elements_read(weight) + elements_read(scales),
        Recipe::Dequantise { weight, scales, biases, .. } => [weight, scales, biases].map(|recipe| elements_read(recipe)).iter().sum(),
        Recipe::Tensor(_) => unreachable!("a box"),
    }
}

/// The share of the elements that a selection reads, in percent.
fn share(tensor: Result<SymbolicTensor, PublishedError>, axis: usize, ranges: &[Range<u64>]) -> u64 {
    let tensor = tensor.expect("valid");
    let selected = tensor.clone().select(axis, ranges).expect("inside");
    100 * elements_read(&selected.recipe) / elements_read(&tensor.recipe)
}

#[test]
fn no_more_is_read_than_the_entries_need() {
    let leaf = |shape: &[u64]| SymbolicTensor::of_checkpoint("x", DType::F16, shape.to_vec());
    let half = |dim: u64| [0..dim / 4, dim / 2..dim / 2 + dim / 4];
    for axis in 0..3 {
        assert_eq!(share(SymbolicTensor::stack(vec![leaf(&[8, 16]); 4]), axis, &half([4, 8, 16][axis])), 50);
        assert_eq!(share(leaf(&[8, 16, 4]).transpose(&[2, 0, 1]), axis, &half([4, 8, 16][axis])), 50);
        assert_eq!(share(leaf(&[8, 64]).reshape(&[8, 16, 4]), axis, &half([8, 16, 4][axis])), 50);
        // Queries and keys of one group after the other, then heads and dims as rows.
        let heads = || leaf(&[4 * 3 * 8, 16]).reshape(&[4, 3, 8, 16]).and_then(|heads| heads.slice(1, 0, 2));
        assert_eq!(share(heads(), [0, 2, 3][axis], &half([4, 8, 16][axis])), 50);
    }
    assert_eq!(share(SymbolicTensor::concatenate(vec![leaf(&[4, 8]), leaf(&[12, 8])], 0), 0, &[2..10]), 50);
    assert_eq!(share(leaf(&[16, 8]).every(0, 1, 2), 0, &[0..2, 4..6]), 50);
    assert_eq!(share(leaf(&[4, 4, 16]).reshape(&[16, 16]), 0, &[4..12]), 50);
    let affine = Affine { group_size: 32, bits: 4 };
    let quantised = QuantisedTensors {
        weight: SymbolicTensor::of_checkpoint("w", DType::U32, vec![8, 16]),
        scales: leaf(&[8, 4]),
        biases: leaf(&[8, 4]),
    };
    assert_eq!(share(quantised.clone().dequantise(128), 1, &[0..32, 64..96]), 50);
    assert_eq!(share(quantised.dequantise(128), 1, &[16..48]), 50);
    assert_eq!(share(leaf(&[8, 128]).quantise(affine).map(|pieces| pieces.weight), 1, &[0..8]), 50);
    assert_eq!(share(leaf(&[8, 128]).quantise(affine).map(|pieces| pieces.scales), 1, &[1..3]), 50);
    let bytes = |shape: &[u64]| SymbolicTensor::of_checkpoint("b", DType::U8, shape.to_vec());
    assert_eq!(share(bytes(&[8, 16]).dequantise_fp8(leaf(&[2, 4]), Some([4, 4])), 0, &[4..8]), 50);
    assert_eq!(share(bytes(&[8, 16]).dequantise_fp8(leaf(&[2, 4]), Some([4, 4])), 1, &[5..11]), 50);
    assert_eq!(share(bytes(&[8, 16]).view(DType::U32), 1, &[1..2, 3..4]), 50);
}

#[test]
fn what_is_read_to_its_place_needs_no_room_beside_it() {
    let leaf = |name: &str| SymbolicTensor::of_checkpoint(name, DType::F16, vec![8, 16]);
    let stack = SymbolicTensor::stack(vec![leaf("a"), leaf("b")]).expect("equal shapes");
    let selected = stack.select(2, &[0..4, 8..12]).and_then(|stack| stack.select(1, &[2..5])).expect("inside");
    assert_eq!((selected.shape.clone(), selected.bytes(), selected.transient_bytes), (vec![2, 3, 8], 96, 0));
    let scaled = leaf("a").scale(2.0).and_then(|scaled| scaled.select(0, &[0..2])).expect("inside");
    assert_eq!((scaled.bytes(), scaled.transient_bytes), (64, 64));
}

#[test]
fn entries_that_are_not_there_are_refused() {
    let leaf = || SymbolicTensor::of_checkpoint("x", DType::F16, vec![8, 16]);
    let message = |axis, ranges: &[Range<u64>]| leaf().select(axis, ranges).expect_err("refused").to_string();
    assert!(message(0, &[0..9]).contains("`x` of shape [8, 16] cannot be restricted to [0..9] along axis 0"));
    assert!(message(2, &[0..1]).contains("axis 2"));
    assert!(message(1, &[3..3]).contains("[3..3]"));
    assert!(message(1, &[]).contains("[]"));
}

//! An adapter's factors for one matrix: taken from its tensors, cut to the rank, and stacked with those of others.

use super::{Adaptable, Kind, Place, Stacks, evaluated};
use crate::{
    adapter::norm_of_rows,
    entries::{entries, spread},
    error::LmError,
    ffi,
    group::Group,
    linear::Matrix,
};
use mlx_cluster_common::tensor::Cut;
use mlx_rs::{Array, Dtype, ops};
use std::collections::BTreeMap;

/// Rows of a table whose norms are reckoned at a time: as numbers they are many times the table's size.
const TABLE_ROWS: i32 = 4096;

#[derive(Debug)]
pub(super) struct Factors {
    kind: Kind,
    /// `[input, rank]`; of experts `[experts, input, rank]`; of a table `[vocab, rank]`.
    a: Array,
    /// `[rank, output]`; of experts `[experts, rank, output]`; of a table `[rank, dims]`.
    b: Array,
    gain: Gain,
}

#[derive(Debug)]
enum Gain {
    /// LoRA.
    None,
    /// `[output]`
    Known(Array),
    /// Every rank has a part of the inputs, or of a table's rows: their squares added up, `[output]`, until the sum over all is known.
    Partial { magnitude: Array, squares: Array, group: Group },
}

impl Factors {
    /// Takes those of a matrix out; None when the adapter leaves it alone.
    pub(super) fn take(tensors: &mut BTreeMap<String, Array>, scale: f32, at: &Adaptable<'_>) -> Result<Option<Self>, LmError> {
        let path = &at.site.path;
        let mut tensor = |suffix: &str| tensors.remove(&format!("{path}.{suffix}")).map(|array| array.as_dtype(Dtype::Float32)).transpose();
        let (a, b, magnitude) = match (tensor("lora_a")?, tensor("lora_b")?, tensor("m")?) {
            (None, None, None) => return Ok(None),
            (Some(a), Some(b), magnitude) => (a, b, magnitude),
            _ => return Err(refused(path, "one of its factors is missing")),
        };
        let (a, b) = match at.kind {
            Kind::Experts => (a.swap_axes(-1, -2)?, b.swap_axes(-1, -2)?),
            Kind::Linear | Kind::Table => (a, b),
        };
        let (a, b, magnitude) = own_part(at.site, at.kind, a, b, magnitude)?;
        check(path, at.kind, at.matrix, &a, &b, magnitude.as_ref())?;
        let gain = match magnitude {
            None => Gain::None,
            Some(magnitude) => gain(at, &a, &b, magnitude, scale)?,
        };
        Ok(Some(Self { kind: at.kind, a, b, gain }))
    }

    /// Adds up what the ranks have; true when there was something to add.
    pub(super) fn settle(&mut self) -> Result<bool, LmError> {
        let Gain::Partial { magnitude, squares, group } = &self.gain else { return Ok(false) };
        let gain = ops::divide(magnitude, ops::sqrt(group.all_sum(squares)?)?)?;
        evaluated(&[&gain])?;
        self.gain = Gain::Known(gain);
        Ok(true)
    }

    pub(super) fn bytes(&self) -> u64 {
        let gain = match &self.gain {
            Gain::None => 0,
            Gain::Known(gain) => gain.nbytes(),
            Gain::Partial { magnitude, squares, .. } => magnitude.nbytes() + squares.nbytes(),
        };
        (self.a.nbytes() + self.b.nbytes() + gain) as u64
    }

    /// Those of all adapters that are loaded, of which at least one has some here. From then on each is a view of the stacks.
    pub(super) fn stacked(entries: &mut [Option<&mut Self>], scales: &[f32]) -> Result<Stacks, LmError> {
        let some = |entries: &[Option<&mut Self>]| entries.iter().flatten().next().map(|one| (one.kind, one.a.clone(), one.b.clone()));
        let Some((kind, a_like, b_like)) = some(entries) else {
            return Err(LmError::Mlx("no factors to stack".into()));
        };
        let rank = entries.iter().flatten().map(|factors| factors.a.dim(-1)).max().unwrap_or(1);
        let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
        for entry in entries.iter() {
            let (a, b) = match entry {
                Some(factors) => (factors.a.clone(), factors.b.clone()),
                None => (of_rank_0(&a_like, -1)?, of_rank_0(&b_like, -2)?),
            };
            all_a.push(padded(&a, a.ndim() - 1, rank)?);
            all_b.push(padded(&b, b.ndim() - 2, rank)?);
        }
        let (a, b) = (ops::stack(&all_a, 0)?, ops::stack(&all_b, 0)?);
        let gains = gains(entries, if kind == Kind::Table { a.dim(1) } else { b.dim(-1) })?;
        let scales = Array::from_slice(scales, &[scales.len() as i32]);
        evaluated(&[&a, &b].into_iter().chain(&gains).collect::<Vec<_>>())?;
        for (place, entry) in (0..).zip(entries.iter_mut()) {
            if let Some(factors) = entry {
                let rank = factors.a.dim(-1);
                factors.a = view(&a, place, factors.a.ndim() - 1, rank)?;
                factors.b = view(&b, place, factors.b.ndim() - 2, rank)?;
            }
        }
        let flat = |stack: Array| match kind {
            Kind::Experts => stack.reshape(&[-1, stack.dim(2), stack.dim(3)]),
            Kind::Linear | Kind::Table => Ok(stack),
        };
        Ok(Stacks { scales, a: flat(a)?, b: flat(b)?, gains })
    }
}

/// `[adapters, output]` when one has any; ones where there is none, or none is known yet (nobody uses that adapter before).
fn gains(entries: &[Option<&mut Factors>], output: i32) -> Result<Option<Array>, LmError> {
    if entries.iter().flatten().all(|factors| matches!(factors.gain, Gain::None)) {
        return Ok(None);
    }
    let gain = |entry: &Option<&mut Factors>| match entry.as_ref().map(|factors| &factors.gain) {
        Some(Gain::Known(gain)) => Ok(gain.clone()),
        _ => ops::ones::<f32>(&[output]),
    };
    Ok(Some(ops::stack(&entries.iter().map(gain).collect::<Result<Vec<_>, _>>()?, 0)?))
}

fn of_rank_0(like: &Array, axis: i32) -> Result<Array, LmError> {
    let mut shape = like.shape().to_vec();
    let at = (shape.len() as i32 + axis) as usize;
    shape[at] = 0;
    Ok(ops::zeros::<f32>(&shape)?)
}

fn padded(array: &Array, axis: usize, length: i32) -> Result<Array, LmError> {
    let mut shape = array.shape().to_vec();
    if shape[axis] == length {
        return Ok(array.clone());
    }
    shape[axis] = length - shape[axis];
    let zeros = ops::zeros::<f32>(&shape)?;
    match array.dim(axis as i32) {
        0 => Ok(zeros),
        _ => Ok(ops::concatenate(&[array.clone(), zeros], axis as i32)?),
    }
}

/// An entry of a stack, the first `rank` of an axis.
fn view(stack: &Array, place: i32, axis: usize, rank: i32) -> Result<Array, LmError> {
    let (mut start, mut stop) = (vec![0; stack.ndim()], stack.shape().to_vec());
    (start[0], stop[0], stop[axis + 1]) = (place, place + 1, rank);
    Ok(ffi::slice(stack, &start, &stop)?.squeeze_axes(&[0])?)
}

/// What the rank has of whole factors.
fn own_part(site: &Place, kind: Kind, a: Array, b: Array, magnitude: Option<Array>) -> Result<(Array, Array, Option<Array>), LmError> {
    let last = |array: &Array, ranges: &[_]| entries(array, array.ndim() - 1, ranges);
    match (&site.cut, kind) {
        // Tables are looked up and multiplied whole, after the ranks' rows were brought together.
        (None, _) | (_, Kind::Table) => Ok((a, b, magnitude)),
        (Some(Cut::Input(ranges)), _) => Ok((entries(&a, a.ndim() - 2, ranges)?, b, magnitude)),
        (Some(Cut::Output(ranges)), _) => {
            let magnitude = magnitude.map(|magnitude| last(&magnitude, ranges)).transpose()?;
            Ok((a, last(&b, ranges)?, magnitude))
        }
        (Some(Cut::Member(range)), Kind::Experts) => {
            let range = std::slice::from_ref(range);
            Ok((entries(&a, 0, range)?, entries(&b, 0, range)?, magnitude))
        }
        (Some(Cut::Member(_)), Kind::Linear) => Err(refused(&site.path, "a stack of matrices has the factors of a single one")),
    }
}

/// Whether factors fit to the matrix that is here.
fn check(path: &str, kind: Kind, matrix: &Matrix, a: &Array, b: &Array, magnitude: Option<&Array>) -> Result<(), LmError> {
    let (mut shape, rank) = (matrix.shape(), a.dim(-1));
    // The last one first.
    let (input, output) = (shape.pop().unwrap_or_default(), shape.pop().unwrap_or_default());
    let (wanted_a, wanted_b, magnitudes) = match kind {
        Kind::Linear => (vec![input, rank], vec![rank, output], output),
        Kind::Experts => ([&shape[..], &[input, rank]].concat(), [&shape[..], &[rank, output]].concat(), 0),
        // Of a split table the matrix is a part.
        Kind::Table => (vec![a.dim(0), rank], vec![rank, input], a.dim(0)),
    };
    let is_wrong = a.shape() != wanted_a || b.shape() != wanted_b || magnitude.is_some_and(|m| m.shape() != [magnitudes]);
    match is_wrong {
        true => Err(refused(path, &format!("it has {:?} and {:?}, wanted are {wanted_a:?} and {wanted_b:?}", a.shape(), b.shape()))),
        false => Ok(()),
    }
}

/// DoRA's factor on each output: the magnitude over the length of the adapted row.
fn gain(at: &Adaptable<'_>, a: &Array, b: &Array, magnitude: Array, scale: f32) -> Result<Gain, LmError> {
    let scale = Array::from_f32(scale);
    let (lengths, group) = match (at.kind, &at.site.cut) {
        (Kind::Experts, _) => return Err(refused(&at.site.path, "DoRA does not work on experts")),
        (Kind::Table, cut) => {
            let a = ops::multiply(a, scale)?;
            match cut {
                Some(Cut::Output(ranges)) => {
                    let own = table_lengths(at.matrix, &entries(&a, 0, ranges)?, b)?;
                    (spread(&own, 0, a.dim(0), ranges)?, at.site.group.as_ref())
                }
                _ => (table_lengths(at.matrix, &a, b)?, None),
            }
        }
        (Kind::Linear, cut) => {
            let adapted = ops::add(at.matrix.dense()?, ops::matmul(ops::multiply(b.t(), scale)?, a.t())?)?;
            // Rows that are whole here, such as those of a split head, are nobody else's.
            (norm_of_rows(&adapted)?, at.site.group.as_ref().filter(|_| matches!(cut, Some(Cut::Input(_)))))
        }
    };
    let Some(group) = group else {
        let gain = ops::divide(&magnitude, lengths)?;
        evaluated(&[&gain])?;
        return Ok(Gain::Known(gain));
    };
    let squares = lengths.square()?;
    evaluated(&[&squares, &magnitude])?;
    Ok(Gain::Partial { magnitude, squares, group: group.clone() })
}

fn table_lengths(matrix: &Matrix, a: &Array, b: &Array) -> Result<Array, LmError> {
    let (rows, mut lengths) = (a.dim(0), Vec::new());
    for start in (0..rows).step_by(TABLE_ROWS as usize) {
        let stop = (start + TABLE_ROWS).min(rows);
        let table = matrix.rows(&Array::from_iter(start as u32..stop as u32, &[stop - start]))?;
        let delta = ops::matmul(ffi::slice(a, &[start, 0], &[stop, a.dim(1)])?, b)?;
        let own = norm_of_rows(&ops::add(table, delta)?)?;
        evaluated(&[&own])?;
        lengths.push(own);
    }
    Ok(ops::concatenate(&lengths, 0)?)
}

fn refused(path: &str, cause: &str) -> LmError {
    LmError::Adapter { path: path.to_owned(), cause: cause.to_owned() }
}

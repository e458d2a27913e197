//! Makes a parameter by its recipe. [`Recipe`] says what each kind means.

use super::files::Files;
use crate::{error::LmError, ffi};
use mlx_cluster_common::published::{QuantisedPiece, Recipe};
use mlx_rs::{
    Array, Dtype, ops,
    ops::indexing::{IntoStrideBy, TryIndexOp},
    transforms,
};

/// Evaluated, so that the bytes are read now, and row-major in a buffer of its own, so that what it was made of can go.
pub(crate) fn made(recipe: &Recipe, files: &mut Files) -> Result<Array, LmError> {
    if let Some(array) = files.gather(recipe)? {
        return Ok(array);
    }
    let array = graph(recipe, files)?.contiguous()?;
    transforms::eval([&array])?;
    Ok(array)
}

fn graph(recipe: &Recipe, files: &mut Files) -> Result<Array, LmError> {
    if let Some(array) = files.gather(recipe)? {
        return Ok(array);
    }
    Ok(match recipe {
        Recipe::Tensor(source) => return Err(LmError::NotLoaded { name: source.name.clone() }),
        Recipe::Stack(of) => stack(of, files)?,
        Recipe::Concatenate { of, axis } => ops::concatenate(&members(of, files)?, small(*axis as u64)?)?,
        Recipe::Slice { of, axis, start, stop, step } => sliced(&graph(of, files)?, *axis, *start, *stop, *step)?,
        Recipe::Reshape { of, shape } => graph(of, files)?.reshape(&small_shape(shape)?)?,
        Recipe::Transpose { of, axes } => {
            let axes = axes.iter().map(|axis| small(*axis as u64)).collect::<Result<Vec<_>, _>>()?;
            graph(of, files)?.transpose_axes(&axes)?
        }
        Recipe::View { of, dtype } => graph(of, files)?.view_dtype(ffi::to_mlx(*dtype))?,
        Recipe::Add { of, addend } => {
            let array = graph(of, files)?;
            ops::add(&array, number(*addend, &array)?)?
        }
        Recipe::Scale { of, factor } => {
            let array = graph(of, files)?;
            ops::multiply(&array, number(*factor, &array)?)?
        }
        Recipe::ScaleRows { of, runs } => scale_rows(&graph(of, files)?, runs)?,
        Recipe::NormaliseColumns { of, eps } => normalise_columns(&graph(of, files)?, *eps)?,
        Recipe::Fp8 { weight, scales, block } => {
            let (weight, scales) = (graph(weight, files)?, graph(scales, files)?);
            dequantise_fp8(&weight, &scales, *block)?
        }
        Recipe::Dequantise { weight, scales, biases, affine } => {
            let (weight, scales, biases) = (graph(weight, files)?, graph(scales, files)?, graph(biases, files)?);
            ops::dequantize(weight, scales, &biases, affine.group_size as i32, affine.bits as i32)?
        }
        Recipe::Quantise { of, affine, piece } => {
            let (weight, scales, biases) = ops::quantize(graph(of, files)?, affine.group_size as i32, affine.bits as i32)?;
            match piece {
                QuantisedPiece::Weight => weight,
                QuantisedPiece::Scales => scales,
                QuantisedPiece::Biases => biases,
            }
        }
    })
}

/// Entries `start`, `start + step`, ... below `stop` of an axis.
pub(crate) fn sliced(array: &Array, axis: usize, start: u64, stop: u64, step: u64) -> Result<Array, LmError> {
    let (axis, range, step) = (small(axis as u64)?, small(start)?..small(stop)?, small(step)?);
    Ok(array.swap_axes(axis, 0)?.try_index(range.stride_by(step))?.swap_axes(axis, 0)?)
}

/// Members are made one after the other and written into the stack in place, so that only one of them is there beside it.
fn stack(of: &[Recipe], files: &mut Files) -> Result<Array, LmError> {
    let mut stack: Option<Array> = None;
    for (i, recipe) in (0..).zip(of) {
        let member = graph(recipe, files)?.expand_dims(0)?;
        let start: Vec<i32> = (0..member.ndim()).map(|axis| if axis == 0 { i } else { 0 }).collect();
        let stop: Vec<i32> = start.iter().zip(member.shape()).map(|(start, dim)| start + dim).collect();
        let whole = match stack.take() {
            Some(whole) => whole,
            None => empty_stack(&member, of.len())?,
        };
        let updated = ffi::slice_update(&whole, &member, &start, &stop)?;
        // MLX writes in place only when nobody else holds the buffer.
        drop((whole, member));
        transforms::eval([&updated])?;
        stack = Some(updated);
    }
    stack.ok_or_else(|| LmError::Mlx("a stack of nothing".into()))
}

fn empty_stack(member: &Array, n: usize) -> Result<Array, LmError> {
    let mut shape = member.shape().to_vec();
    shape[0] = small(n as u64)?;
    let empty = ops::zeros_dtype(&shape, member.dtype())?;
    transforms::eval([&empty])?;
    Ok(empty)
}

fn members(of: &[Recipe], files: &mut Files) -> Result<Vec<Array>, LmError> {
    of.iter().map(|recipe| graph(recipe, files)).collect()
}

fn scale_rows(array: &Array, runs: &[(u64, f32)]) -> Result<Array, LmError> {
    let factors: Vec<f32> = runs.iter().flat_map(|(rows, factor)| std::iter::repeat_n(*factor, *rows as usize)).collect();
    let mut shape = vec![1; array.ndim()];
    shape[0] = small(factors.len() as u64)?;
    let factors = Array::from_iter(factors, &shape).as_dtype(array.dtype())?;
    Ok(ops::multiply(array, factors)?)
}

fn normalise_columns(array: &Array, eps: f32) -> Result<Array, LmError> {
    let wide = array.as_dtype(Dtype::Float32)?;
    let lengths = ops::sqrt(ops::sum_axis(ops::square(&wide)?, 0, true)?)?;
    Ok(ops::divide(&wide, ops::add(lengths, Array::from_f32(eps))?)?.as_dtype(array.dtype())?)
}

fn dequantise_fp8(weight: &Array, scales: &Array, block: Option<[u64; 2]>) -> Result<Array, LmError> {
    let weight = weight.from_fp8(Dtype::Bfloat16)?;
    let (Some([rows, columns]), &[n, m]) = (block, weight.shape()) else {
        return Ok(ops::multiply(weight, scales)?.as_dtype(Dtype::Bfloat16)?);
    };
    let (rows, columns) = (small(rows)?, small(columns)?);
    let (down, across) = ((n + rows - 1) / rows, (m + columns - 1) / columns);
    let (padded_n, padded_m) = (down * rows, across * columns);
    let whole = match (padded_n, padded_m) == (n, m) {
        true => weight,
        false => ops::pad(&weight, &[(0, padded_n - n), (0, padded_m - m)], None, None)?,
    };
    let scaled = ops::multiply(whole.reshape(&[down, rows, across, columns])?, scales.reshape(&[down, 1, across, 1])?)?;
    let scaled = scaled.as_dtype(Dtype::Bfloat16)?.reshape(&[padded_n, padded_m])?;
    ffi::slice(&scaled, &[0, 0], &[n, m])
}

/// A number in an array's type, so that the result has that type too.
fn number(value: f32, like: &Array) -> Result<Array, LmError> {
    Ok(Array::from_f32(value).as_dtype(like.dtype())?)
}

fn small(number: u64) -> Result<i32, LmError> {
    i32::try_from(number).map_err(|_| LmError::Mlx(format!("an axis of {number} entries")))
}

fn small_shape(shape: &[u64]) -> Result<Vec<i32>, LmError> {
    shape.iter().map(|dim| small(*dim)).collect()
}

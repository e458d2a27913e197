//! Makes an adapter part of its base, one parameter at a time, as mlx-lm's `fuse` reckons it (`tuner/lora.py`, `tuner/dora.py`).

use crate::{
    error::LmError,
    ffi,
    weights::{Files, made, sliced, write_box},
};
use mlx_cluster_common::{
    dtype::DType,
    published::{Assignment, Step, SymbolicTensor},
    training::{
        Change, MatrixKind, ModelMatrix,
        fuse::{CanonicalTensor, NewValue, Rewrite, Rewritten},
    },
    weights::{Parameter, WeightIndex},
};
use mlx_rs::{Array, Dtype, memory, ops, ops::indexing::TryIndexOp};
use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

/// A folder of weight files, and what their headers say.
#[derive(Debug, Clone, Copy)]
pub struct Checkpoint<'a> {
    pub folder: &'a Path,
    pub index: &'a WeightIndex,
}

/// A base and an adapter that fits to it. In memory is one matrix at a time, with its change and what it is made of.
pub struct Fusion<'a> {
    base: Files<'a>,
    adapter: Files<'a>,
    base_index: &'a WeightIndex,
    adapter_index: &'a WeightIndex,
}

impl<'a> Fusion<'a> {
    pub fn new(base: Checkpoint<'a>, adapter: Checkpoint<'a>) -> Self {
        Self {
            base: Files::new(base.folder, base.index),
            adapter: Files::new(adapter.folder, adapter.index),
            base_index: base.index,
            adapter_index: adapter.index,
        }
    }

    /// Brings a new value into a copy of the base's files, which lie in `copy` under the same names.
    pub fn rewrite(&mut self, rewrite: &Rewrite, copy: &Path) -> Result<(), LmError> {
        let arrays = match &rewrite.value {
            NewValue::Kept(_) => return Ok(()),
            NewValue::Replaced(parameter) => vec![self.replaced(parameter)?],
            NewValue::Matrix { module, change } => {
                let matrix = self.matrix(module, *change)?;
                match &module.quantised {
                    None => vec![matrix],
                    Some(quantised) => {
                        let (weight, scales, biases) = ffi::quantize(&matrix, quantised.scheme)?;
                        [Some(weight), Some(scales), biases].into_iter().flatten().collect()
                    }
                }
            }
        };
        for (Rewritten { parameter, assignments }, array) in rewrite.parameters.iter().zip(&arrays) {
            check(&parameter.name, array, parameter.dtype, &parameter.shape)?;
            assignments.iter().try_for_each(|assignment| self.assign(assignment, array, copy))?;
        }
        drop(arrays);
        Ok(memory::clear_cache()?)
    }

    /// Writes the bytes of a tensor that stands alone.
    pub fn write(&mut self, tensor: &CanonicalTensor, file: &str, out: &mut impl Write) -> Result<(), LmError> {
        let array = match &tensor.value {
            NewValue::Kept(parameter) => made(&parameter.recipe, &mut self.base)?,
            NewValue::Replaced(parameter) => self.replaced(parameter)?,
            NewValue::Matrix { module, change } => self.matrix(module, *change)?,
        };
        check(&tensor.name, &array, tensor.dtype, &tensor.shape)?;
        ffi::with_bytes(&array, |bytes| out.write_all(bytes))?.map_err(|source| unwritten(file, source))?;
        drop(array);
        Ok(memory::clear_cache()?)
    }

    /// A tensor of the adapter.
    fn trained(&mut self, name: &str) -> Result<Array, LmError> {
        let entry = self.adapter_index.tensors.get(name).ok_or_else(|| LmError::NotLoaded { name: name.to_owned() })?;
        made(&SymbolicTensor::of_checkpoint(name, entry.dtype, entry.shape.clone()).recipe, &mut self.adapter)
    }

    fn replaced(&mut self, parameter: &Parameter) -> Result<Array, LmError> {
        Ok(self.trained(&parameter.name)?.as_dtype(ffi::to_mlx(parameter.dtype))?)
    }

    /// What a parameter of a matrix is after the adapter: its scales may be trained whole.
    fn current(&mut self, parameter: &Parameter) -> Result<Array, LmError> {
        match self.adapter_index.tensors.contains_key(&parameter.name) {
            true => self.replaced(parameter),
            false => made(&parameter.recipe, &mut self.base),
        }
    }

    /// The matrix as numbers, of the type that it has in the base, also where a product with the adapter is wider.
    fn matrix(&mut self, module: &ModelMatrix, change: Option<&Change>) -> Result<Array, LmError> {
        let weight = self.current(module.weight)?;
        let matrix = match &module.quantised {
            None => weight,
            Some(quantised) => {
                let scales = self.current(quantised.scales)?;
                let biases = quantised.biases.map(|biases| self.current(biases)).transpose()?;
                ffi::dequantize(&ffi::Quantised { weight: &weight, scales: &scales, biases: biases.as_ref(), scheme: quantised.scheme })?
            }
        };
        let Some(Change::LowRank { a, b, magnitude, scale }) = change else { return Ok(matrix) };
        let (a, b) = (self.trained(a)?, self.trained(b)?);
        let sum = ops::add(&matrix, product(module.kind, &a, &b, *scale)?.as_dtype(matrix.dtype())?)?;
        let Some(magnitude) = magnitude else { return Ok(sum) };
        let wide = sum.as_dtype(Dtype::Float32)?;
        let lengths = ops::sqrt(ops::sum_axis(ops::square(&wide)?, 1, false)?)?;
        let factors = ops::divide(self.trained(magnitude)?, lengths)?;
        Ok(ops::multiply(factors.expand_dims(1)?, wide)?.as_dtype(matrix.dtype())?)
    }

    fn assign(&self, assignment: &Assignment, array: &Array, copy: &Path) -> Result<(), LmError> {
        let name = &assignment.source.name;
        let entry = self.base_index.tensors.get(name).ok_or_else(|| LmError::NotLoaded { name: name.clone() })?;
        let mut new = array.clone();
        for step in &assignment.steps {
            new = stepped(step, &new)?;
        }
        let counts: Vec<u64> = assignment.spans.iter().map(|span| span.count()).collect();
        check(name, &new, assignment.source.dtype, &counts)?;
        let write = |bytes: &[u8]| {
            let file = File::options().read(true).write(true).open(copy.join(&entry.file))?;
            write_box(&file, assignment, entry.offset, bytes)
        };
        ffi::with_bytes(&new, write)?.map_err(|source| unwritten(&entry.file, source))
    }
}

/// `scale · (the product of a and b)`, in their type, as `[.., output, input]`, or `[vocab_size, dims]`.
fn product(kind: MatrixKind, a: &Array, b: &Array, scale: f32) -> Result<Array, LmError> {
    let scaled = |array: &Array| -> Result<Array, LmError> { Ok(ops::multiply(Array::from_f32(scale).as_dtype(array.dtype())?, array)?) };
    Ok(match kind {
        MatrixKind::Embedding => ops::matmul(scaled(a)?, b)?,
        MatrixKind::Experts | MatrixKind::HeadLinear => ops::matmul(scaled(b)?, a)?,
        MatrixKind::Linear => ops::matmul(scaled(&b.transpose()?)?, a.transpose()?)?,
    })
}

fn stepped(step: &Step, array: &Array) -> Result<Array, LmError> {
    let small = |number: u64| i32::try_from(number).map_err(|_| LmError::Mlx(format!("an axis of {number} entries")));
    let number = |value: f32| Array::from_f32(value).as_dtype(array.dtype());
    Ok(match step {
        Step::Entry(i) => array.try_index(small(*i)?)?,
        Step::Part { axis, start, stop } => sliced(array, *axis, *start, *stop, 1)?,
        Step::Reshape(shape) => array.reshape(&shape.iter().map(|dim| small(*dim)).collect::<Result<Vec<_>, _>>()?)?,
        Step::Transpose(axes) => array.transpose_axes(&axes.iter().map(|axis| *axis as i32).collect::<Vec<_>>())?,
        Step::View(dtype) => array.view_dtype(ffi::to_mlx(*dtype))?,
        Step::Subtract(addend) => ops::subtract(array, number(*addend)?)?,
        Step::Divide(factor) => ops::divide(array, number(*factor)?)?,
        Step::DivideRows(runs) => {
            let factors: Vec<f32> = runs.iter().flat_map(|(rows, factor)| std::iter::repeat_n(*factor, *rows as usize)).collect();
            let mut shape = vec![1; array.ndim()];
            shape[0] = small(factors.len() as u64)?;
            ops::divide(array, Array::from_iter(factors, &shape).as_dtype(array.dtype())?)?
        }
    })
}

fn check(name: &str, array: &Array, dtype: DType, shape: &[u64]) -> Result<(), LmError> {
    let same_shape = array.shape().iter().map(|dim| *dim as u64).eq(shape.iter().copied());
    match same_shape && ffi::from_mlx(array.dtype()) == Some(dtype) {
        true => Ok(()),
        false => Err(LmError::Made {
            name: name.to_owned(),
            found: format!("{:?} {:?}", array.dtype(), array.shape()),
            planned: format!("{dtype} {shape:?}"),
        }),
    }
}

fn unwritten(file: &str, source: io::Error) -> LmError {
    LmError::Write { file: file.to_owned(), source }
}

#[cfg(test)]
#[path = "fuse_tests.rs"]
mod tests;

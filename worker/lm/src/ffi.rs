//! The only unsafe code: what mlx-rs has no wrapper for, each with the reason why it is sound.
#![allow(unsafe_code)]

use crate::error::LmError;
use mlx_cluster_common::{
    dtype::DType,
    spec::{QuantizationMode, QuantizationScheme},
};
use mlx_rs::{Array, Dtype, Stream, ops};
use std::{
    ffi::{CStr, c_void},
    sync::Once,
};

/// MLX's type for ours.
pub fn to_mlx(dtype: DType) -> Dtype {
    match dtype {
        DType::Bool => Dtype::Bool,
        DType::U8 => Dtype::Uint8,
        DType::U16 => Dtype::Uint16,
        DType::U32 => Dtype::Uint32,
        DType::U64 => Dtype::Uint64,
        DType::I8 => Dtype::Int8,
        DType::I16 => Dtype::Int16,
        DType::I32 => Dtype::Int32,
        DType::I64 => Dtype::Int64,
        DType::F16 => Dtype::Float16,
        DType::BF16 => Dtype::Bfloat16,
        DType::F32 => Dtype::Float32,
        DType::F64 => Dtype::Float64,
    }
}

/// Our type for MLX's; None for complex numbers, which no model here uses.
pub fn from_mlx(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::Bool => DType::Bool,
        Dtype::Uint8 => DType::U8,
        Dtype::Uint16 => DType::U16,
        Dtype::Uint32 => DType::U32,
        Dtype::Uint64 => DType::U64,
        Dtype::Int8 => DType::I8,
        Dtype::Int16 => DType::I16,
        Dtype::Int32 => DType::I32,
        Dtype::Int64 => DType::I64,
        Dtype::Float16 => DType::F16,
        Dtype::Bfloat16 => DType::BF16,
        Dtype::Float32 => DType::F32,
        Dtype::Float64 => DType::F64,
        Dtype::Complex64 => return None,
    })
}

/// An array from row-major little-endian bytes, copied once. None when the length is not that of the shape.
pub fn array_from_bytes(bytes: &[u8], shape: &[i32], dtype: DType) -> Option<Array> {
    let elements = shape.iter().try_fold(1u64, |product, dim| u64::try_from(*dim).ok().and_then(|dim| product.checked_mul(dim)))?;
    if elements.checked_mul(dtype.size())? != bytes.len() as u64 || !cfg!(target_endian = "little") {
        return None;
    }
    // SAFETY: the buffer holds exactly the bytes that MLX copies out of it for this shape and type, checked above.
    Some(unsafe { Array::from_raw_data(bytes.as_ptr().cast::<c_void>(), shape, to_mlx(dtype)) })
}

/// An array whose row-major bytes `fill` writes to where MLX keeps them; they are zeros before.
pub fn array_filled(shape: &[i32], dtype: DType, fill: impl FnOnce(&mut [u8]) -> Result<(), LmError>) -> Result<Array, LmError> {
    let array = ops::zeros_dtype(shape, to_mlx(dtype))?;
    array.eval()?;
    // SAFETY: the array is evaluated, fresh and row-contiguous, so its data is `nbytes` initialised bytes on the heap of MLX, which live as
    // long as `array`. Nobody else knows the array, so nobody else reads or writes them during the call.
    let bytes = unsafe {
        let data = mlx_sys::mlx_array_data_uint8(array.as_ptr());
        if data.is_null() {
            return Err(LmError::Mlx("an evaluated array has no data".into()));
        }
        std::slice::from_raw_parts_mut(data.cast_mut(), array.nbytes())
    };
    fill(bytes)?;
    Ok(array)
}

/// The bytes of an array, row-major: evaluates it, and copies once.
pub fn array_to_bytes(array: &Array) -> Result<Vec<u8>, LmError> {
    with_bytes(array, <[u8]>::to_vec)
}

/// Evaluates an array and shows its row-major bytes where they are.
pub fn with_bytes<T>(array: &Array, read: impl FnOnce(&[u8]) -> T) -> Result<T, LmError> {
    // An array that is a view of another buffer (a slice, a transpose) is laid out anew first.
    let contiguous = contiguous(array)?;
    contiguous.eval()?;
    let length = contiguous.nbytes();
    // SAFETY: the array is evaluated and row-contiguous, so its data is `nbytes` readable bytes that live as long as `contiguous`, which
    // outlives the call.
    let bytes = unsafe {
        let data = mlx_sys::mlx_array_data_uint8(contiguous.as_ptr());
        if data.is_null() {
            return Err(LmError::Mlx("an evaluated array has no data".into()));
        }
        std::slice::from_raw_parts(data, length)
    };
    Ok(read(bytes))
}

fn contiguous(array: &Array) -> Result<Array, LmError> {
    call("contiguous", |result, stream| {
        // SAFETY: `result` is a fresh handle that MLX fills, `array` and `stream` are valid handles.
        unsafe { mlx_sys::mlx_contiguous(result, array.as_ptr(), false, stream) }
    })
}

/// `array[start[0]..stop[0], ...]`, without the index machinery of mlx-rs, which costs more than the operation at decode.
pub fn slice(array: &Array, start: &[i32], stop: &[i32]) -> Result<Array, LmError> {
    let strides = [1i32; 8];
    let n = start.len();
    call("slice", |result, stream| {
        // SAFETY: handles as above; the three index slices hold `n` numbers each for the duration of the call.
        unsafe { mlx_sys::mlx_slice(result, array.as_ptr(), start.as_ptr(), n, stop.as_ptr(), n, strides.as_ptr(), n, stream) }
    })
}

/// A copy of `array` with `array[start..stop] = update`; in place when nobody else holds the buffer.
pub fn slice_update(array: &Array, update: &Array, start: &[i32], stop: &[i32]) -> Result<Array, LmError> {
    let strides = [1i32; 8];
    let n = start.len();
    call("slice_update", |result, stream| {
        let (strides, start, stop) = (strides.as_ptr(), start.as_ptr(), stop.as_ptr());
        // SAFETY: handles as above; the three index slices hold `n` numbers each for the duration of the call.
        unsafe { mlx_sys::mlx_slice_update(result, array.as_ptr(), update.as_ptr(), start, n, stop, n, strides, n, stream) }
    })
}

/// A quantised matrix, or a stack of them, `[.., output, input]` as MLX takes it. mlx-rs wraps these operations for affine groups alone.
#[derive(Debug, Clone, Copy)]
pub struct Quantised<'a> {
    /// Packed words `[.., output, packed_columns]`.
    pub weight: &'a Array,
    /// `[.., output, groups]`.
    pub scales: &'a Array,
    /// As the scales; None for modes without.
    pub biases: Option<&'a Array>,
    pub scheme: QuantizationScheme,
}

impl Quantised<'_> {
    fn raw_biases(&self) -> mlx_sys::mlx_array {
        self.biases.map_or(no_array(), Array::as_ptr)
    }

    /// What MLX refused; its own message is kept by mlx-rs, which hands it to nobody else.
    fn refused(&self, name: &str, x: &Array) -> LmError {
        let (weight, scales) = (self.weight.shape(), self.scales.shape());
        LmError::Mlx(format!("{name} failed for {:?} {:?}, weight {weight:?}, scales {scales:?}, {:?}", x.dtype(), x.shape(), self.scheme))
    }
}

/// `x Wᵀ`, or `x W` without `transpose`; `x` is `[.., input]`, or `[.., output]`.
pub fn quantized_matmul(x: &Array, matrix: &Quantised, transpose: bool) -> Result<Array, LmError> {
    let (group_size, bits, mode) = raw_scheme(&matrix.scheme);
    let (weight, scales, biases) = (matrix.weight.as_ptr(), matrix.scales.as_ptr(), matrix.raw_biases());
    call("quantized_matmul", |result, stream| {
        // SAFETY: handles as in `contiguous`, an empty one stands for no biases; `mode` is a NUL-terminated constant.
        unsafe { mlx_sys::mlx_quantized_matmul(result, x.as_ptr(), weight, scales, biases, transpose, group_size, bits, mode, stream) }
    })
    .map_err(|_| matrix.refused("quantized_matmul", x))
}

/// `x Wᵀ` with the matrices `indices` of a stack, one for each row of `x`; see MLX's `gather_qmm`.
pub fn gather_quantized_matmul(x: &Array, stack: &Quantised, indices: &Array, sorted: bool) -> Result<Array, LmError> {
    let (group_size, bits, mode) = raw_scheme(&stack.scheme);
    let (weight, scales, biases) = (stack.weight.as_ptr(), stack.scales.as_ptr(), stack.raw_biases());
    call("gather_qmm", |result, stream| {
        let (x, rows, indices) = (x.as_ptr(), no_array(), indices.as_ptr());
        // SAFETY: as in `quantized_matmul`; an empty handle stands for no choice of rows.
        unsafe { mlx_sys::mlx_gather_qmm(result, x, weight, scales, biases, rows, indices, true, group_size, bits, mode, sorted, stream) }
    })
    .map_err(|_| stack.refused("gather_qmm", x))
}

/// The matrix as numbers: of the scales' type, or bfloat16 where scales are bytes, since those do not tell it.
pub fn dequantize(matrix: &Quantised) -> Result<Array, LmError> {
    let (group_size, bits, mode) = raw_scheme(&matrix.scheme);
    let (weight, scales, biases) = (matrix.weight.as_ptr(), matrix.scales.as_ptr(), matrix.raw_biases());
    let dtype = mlx_sys::mlx_optional_dtype { value: mlx_sys::mlx_dtype__MLX_BFLOAT16, has_value: false };
    call("dequantize", |result, stream| {
        // SAFETY: as in `quantized_matmul`; an empty handle stands for no global scale.
        unsafe { mlx_sys::mlx_dequantize(result, weight, scales, biases, group_size, bits, mode, no_array(), dtype, stream) }
    })
    .map_err(|_| matrix.refused("dequantize", matrix.weight))
}

/// Packed weight, scales and, for modes that have them, biases of `weight` `[.., output, input]`.
pub fn quantize(weight: &Array, scheme: QuantizationScheme) -> Result<(Array, Array, Option<Array>), LmError> {
    let (group_size, bits, mode) = raw_scheme(&scheme);
    let mut parts = call_many("quantize", |result, stream| {
        // SAFETY: `result` is a fresh handle that MLX fills, the others are as in `quantized_matmul`; no global scale.
        unsafe { mlx_sys::mlx_quantize(result, weight.as_ptr(), group_size, bits, mode, no_array(), stream) }
    })
    .map_err(|_| LmError::Mlx(format!("quantize failed for {:?} {:?}, {scheme:?}", weight.dtype(), weight.shape())))?
    .into_iter();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(packed), Some(scales), biases) if biases.is_some() == scheme.has_biases() => Ok((packed, scales, biases)),
        _ => Err(LmError::Mlx(format!("quantize gave other arrays than {scheme:?} has"))),
    }
}

fn raw_scheme(scheme: &QuantizationScheme) -> (mlx_sys::mlx_optional_int, mlx_sys::mlx_optional_int, *const std::ffi::c_char) {
    let mode: &'static CStr = match scheme.mode {
        QuantizationMode::Affine => c"affine",
        QuantizationMode::Mxfp4 => c"mxfp4",
        QuantizationMode::Nvfp4 => c"nvfp4",
        QuantizationMode::Mxfp8 => c"mxfp8",
    };
    let given = |value: u32| mlx_sys::mlx_optional_int { value: value as i32, has_value: true };
    (given(scheme.group_size), given(scheme.bits), mode.as_ptr())
}

/// The handle that stands for an array left out; it owns nothing.
fn no_array() -> mlx_sys::mlx_array {
    mlx_sys::mlx_array { ctx: std::ptr::null_mut() }
}

/// MLX's own error handler ends the process; mlx-rs puts one in its place at its first operation.
fn ensure_errors_return() -> Result<(), LmError> {
    static INSTALLED: Once = Once::new();
    let mut first = Ok(());
    INSTALLED.call_once(|| first = ops::zeros::<f32>(&[1]).map(drop));
    Ok(first?)
}

/// Runs a raw MLX operation that writes several arrays.
fn call_many(
    name: &str,
    operation: impl FnOnce(*mut mlx_sys::mlx_vector_array, mlx_sys::mlx_stream) -> i32,
) -> Result<Vec<Array>, LmError> {
    ensure_errors_return()?;
    let stream = Stream::thread_local_or_default();
    // SAFETY: makes an empty list, which is freed below on every path.
    let mut list = unsafe { mlx_sys::mlx_vector_array_new() };
    let arrays = match operation(&mut list, stream.as_ptr()) {
        // SAFETY: `list` is a valid list.
        0 => (0..unsafe { mlx_sys::mlx_vector_array_size(list) })
            // SAFETY: `result` is a fresh handle that MLX fills, `i` is below the size of the valid `list`.
            .map(|i| call(name, |result, _| unsafe { mlx_sys::mlx_vector_array_get(result, list, i) }))
            .collect(),
        _ => Err(LmError::Mlx(format!("{name} failed"))),
    };
    // SAFETY: the list is used no more; the arrays taken out of it hold their own references.
    unsafe { mlx_sys::mlx_vector_array_free(list) };
    arrays
}

/// `logsumexp(logits) - logits[target]` of each row in f32, by one kernel where there is a GPU.
pub fn fused_cross_entropy(logits: &Array, targets: &Array) -> Result<Array, LmError> {
    call("cross_entropy", |result, stream| {
        // SAFETY: `result` is a fresh handle that MLX fills, arrays and stream are valid for the call.
        unsafe { mlx_sys::mlx_fast_cross_entropy(result, logits.as_ptr(), targets.as_ptr(), stream) }
    })
}

/// Runs a raw MLX operation that writes one array.
fn call(name: &str, operation: impl FnOnce(*mut mlx_sys::mlx_array, mlx_sys::mlx_stream) -> i32) -> Result<Array, LmError> {
    ensure_errors_return()?;
    let stream = Stream::thread_local_or_default();
    // SAFETY: makes an empty handle; ownership goes to the `Array` below, which frees it also when the operation failed.
    let mut handle = unsafe { mlx_sys::mlx_array_new() };
    let status = operation(&mut handle, stream.as_ptr());
    // SAFETY: `handle` is owned by nobody else.
    let array = unsafe { Array::from_ptr(handle) };
    match status {
        0 => Ok(array),
        _ => Err(LmError::Mlx(format!("{name} failed"))),
    }
}

/// A group of processes that MLX's collectives run over.
#[derive(Debug)]
pub struct DistributedGroup(mlx_sys::mlx_distributed_group);

impl Drop for DistributedGroup {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `form_group` and is freed once, here.
        unsafe { mlx_sys::mlx_distributed_group_free(self.0) };
    }
}

/// Whether MLX has these collectives on this machine.
pub fn has_collective(name: &CStr) -> bool {
    // SAFETY: a plain query with a NUL-terminated name.
    unsafe { mlx_sys::mlx_distributed_is_available(name.as_ptr()) }
}

/// Forms a group of `size` with MLX's collectives of that name, which reads its environment for where the ranks are. Blocks until all are
/// there.
pub fn form_group(name: &CStr, size: usize) -> Result<DistributedGroup, LmError> {
    ensure_errors_return()?;
    // SAFETY: makes an empty handle, which `DistributedGroup` frees.
    let mut group = DistributedGroup(unsafe { mlx_sys::mlx_distributed_group_new() });
    // SAFETY: a valid handle to fill and a NUL-terminated name.
    let status = unsafe { mlx_sys::mlx_distributed_init(&mut group.0, true, name.as_ptr()) };
    if status != 0 {
        return Err(LmError::Group(format!("MLX cannot form it over {}", name.to_string_lossy())));
    }
    // SAFETY: `group` was filled by a call that succeeded.
    let found = unsafe { mlx_sys::mlx_distributed_group_size(group.0) };
    match usize::try_from(found) == Ok(size) {
        true => Ok(group),
        false => Err(LmError::Group(format!("it has {found} ranks instead of {size}"))),
    }
}

/// `array` as it is; its gradient becomes what `gradient` makes of it.
pub fn with_gradient(array: &Array, gradient: impl Fn(&Array) -> Result<Array, LmError> + 'static) -> Result<Array, LmError> {
    type Gradient = Box<dyn Fn(&Array) -> Result<Array, LmError>>;

    /// Gives its arguments back.
    unsafe extern "C" fn same(result: *mut mlx_sys::mlx_vector_array, arguments: mlx_sys::mlx_vector_array) -> std::ffi::c_int {
        // SAFETY: MLX calls with a result to fill and valid arguments.
        unsafe { mlx_sys::mlx_vector_array_set(result, arguments) }
    }

    unsafe extern "C" fn backward(
        result: *mut mlx_sys::mlx_vector_array,
        _primals: mlx_sys::mlx_vector_array,
        cotangents: mlx_sys::mlx_vector_array,
        _outputs: mlx_sys::mlx_vector_array,
        payload: *mut c_void,
    ) -> std::ffi::c_int {
        // SAFETY: `payload` is the box made below, which lives until `free`; MLX calls with valid lists. Nothing unwinds through C: mlx-rs's
        // operations in Result form do not panic.
        unsafe {
            let gradient = &*payload.cast::<Gradient>();
            let cotangent = call("cotangent", |array, _| mlx_sys::mlx_vector_array_get(array, cotangents, 0));
            match cotangent.and_then(|cotangent| gradient(&cotangent)) {
                Ok(made) => mlx_sys::mlx_vector_array_set_value(result, made.as_ptr()),
                Err(error) => {
                    tracing::error!(%error, "a gradient");
                    1
                }
            }
        }
    }

    unsafe extern "C" fn free(payload: *mut c_void) {
        // SAFETY: MLX frees the payload once, when nothing refers to the function any more.
        drop(unsafe { Box::from_raw(payload.cast::<Gradient>()) });
    }

    let payload: *mut Gradient = Box::into_raw(Box::new(Box::new(gradient)));
    let mut made = call_many("custom_vjp", |result, _| {
        // SAFETY: the closures are freed after the call; MLX holds what it needs of them in the graph, the payload by its own count.
        unsafe {
            let forward = mlx_sys::mlx_closure_new_func(Some(same));
            let backward = mlx_sys::mlx_closure_custom_new_func_payload(Some(backward), payload.cast(), Some(free));
            let mut function = mlx_sys::mlx_closure_new();
            let arguments = mlx_sys::mlx_vector_array_new_value(array.as_ptr());
            let status = match mlx_sys::mlx_custom_vjp(&mut function, forward, backward) {
                0 => mlx_sys::mlx_closure_apply(result, function, arguments),
                status => status,
            };
            mlx_sys::mlx_vector_array_free(arguments);
            mlx_sys::mlx_closure_free(function);
            mlx_sys::mlx_closure_custom_free(backward);
            mlx_sys::mlx_closure_free(forward);
            status
        }
    })?;
    made.pop().ok_or_else(|| LmError::Mlx("custom_vjp gave nothing".into()))
}

/// A gradient that is known later than the graph that it flows into.
///
/// MLX wants cotangents when it differentiates. A stage of a pipeline differentiates when it runs forward, so that nothing is computed twice,
/// and is told its cotangents when later stages are done.
#[derive(Debug)]
pub struct Deferred(Array);

impl Deferred {
    /// Zeros until [`fill`](Self::fill).
    pub fn new(shape: &[i32], dtype: Dtype) -> Result<Self, LmError> {
        let array = ops::zeros_dtype(shape, dtype)?;
        array.eval()?;
        Ok(Self(array))
    }

    /// For graphs that are evaluated after [`fill`](Self::fill) alone.
    pub fn array(&self) -> &Array {
        &self.0
    }

    /// Says what it is. Whatever was built on it must not have been evaluated, which the caller sees to.
    pub fn fill(self, value: &Array) -> Result<(), LmError> {
        if (value.shape(), value.dtype()) != (self.0.shape(), self.0.dtype()) {
            return Err(LmError::WrongInput {
                wanted: format!("a gradient {:?} {:?}", self.0.dtype(), self.0.shape()),
                found: format!("{:?} {:?}", value.dtype(), value.shape()),
            });
        }
        let bytes = array_to_bytes(value)?;
        // SAFETY: the array was evaluated when it was made, so its data is `nbytes` initialised bytes in a buffer of its own; nothing that reads
        // it has run yet, and none runs during the call.
        unsafe {
            let data = mlx_sys::mlx_array_data_uint8(self.0.as_ptr());
            if data.is_null() || bytes.len() != self.0.nbytes() {
                return Err(LmError::Mlx("an evaluated array has no data".into()));
            }
            std::slice::from_raw_parts_mut(data.cast_mut(), bytes.len()).copy_from_slice(&bytes);
        }
        Ok(())
    }
}

/// `array` as it is, but not before `first` has been computed.
pub fn after(array: &Array, first: &Array) -> Result<Array, LmError> {
    let mut arrays = call_many("depends", |result, _| {
        // SAFETY: two lists of one valid array each, freed after the call; `result` is a fresh list that MLX fills.
        unsafe {
            let arrays = mlx_sys::mlx_vector_array_new_value(array.as_ptr());
            let dependencies = mlx_sys::mlx_vector_array_new_value(first.as_ptr());
            let status = mlx_sys::mlx_depends(result, arrays, dependencies);
            mlx_sys::mlx_vector_array_free(arrays);
            mlx_sys::mlx_vector_array_free(dependencies);
            status
        }
    })?;
    arrays.pop().ok_or_else(|| LmError::Mlx("depends gave nothing".into()))
}

/// The sum over all ranks of a group.
pub fn all_sum(array: &Array, group: &DistributedGroup) -> Result<Array, LmError> {
    // SAFETY: array, group and stream are valid for the call; MLX keeps its own reference to the group.
    call("all_sum", |result, stream| unsafe { mlx_sys::mlx_distributed_all_sum(result, array.as_ptr(), group.0, stream) })
}

/// The arrays of all ranks, of one shape, one after the other along the first axis.
pub fn all_gather(array: &Array, group: &DistributedGroup) -> Result<Array, LmError> {
    // SAFETY: as above.
    call("all_gather", |result, stream| unsafe { mlx_sys::mlx_distributed_all_gather(result, array.as_ptr(), group.0, stream) })
}

/// Bytes that the GPU may use of the unified memory, as Metal recommends; None where there is no such device. Not run on Linux.
#[cfg(target_os = "macos")]
pub fn gpu_memory_bytes() -> Option<u64> {
    // SAFETY: plain queries on handles made and freed here; the key is a NUL-terminated constant.
    unsafe {
        let device = mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0);
        let mut info = mlx_sys::mlx_device_info_new();
        let mut bytes = 0usize;
        let known = mlx_sys::mlx_device_info_get(&mut info, device) == 0
            && mlx_sys::mlx_device_info_get_size(&mut bytes, info, c"max_recommended_working_set_size".as_ptr()) == 0;
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        (known && bytes > 0).then_some(bytes as u64)
    }
}

#[cfg(not(target_os = "macos"))]
pub fn gpu_memory_bytes() -> Option<u64> {
    None
}

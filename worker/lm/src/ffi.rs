//! The only unsafe code: what mlx-rs has no wrapper for, each with the reason why it is sound.
#![allow(unsafe_code)]

use crate::error::LmError;
use mlx_cluster_common::dtype::DType;
use mlx_rs::{Array, Dtype, Stream};
use std::ffi::c_void;

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

/// The bytes of an array, row-major: evaluates it, and copies once.
pub fn array_to_bytes(array: &Array) -> Result<Vec<u8>, LmError> {
    // An array that is a view of another buffer (a slice, a transpose) is laid out anew first.
    let contiguous = contiguous(array)?;
    contiguous.eval()?;
    let length = contiguous.nbytes();
    // SAFETY: the array is evaluated and row-contiguous, so its data is `nbytes` readable bytes that live as long as `contiguous`.
    let bytes = unsafe {
        let data = mlx_sys::mlx_array_data_uint8(contiguous.as_ptr());
        if data.is_null() {
            return Err(LmError::Mlx("an evaluated array has no data".into()));
        }
        std::slice::from_raw_parts(data, length).to_vec()
    };
    Ok(bytes)
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

/// Runs a raw MLX operation that writes one array.
fn call(name: &str, operation: impl FnOnce(*mut mlx_sys::mlx_array, mlx_sys::mlx_stream) -> i32) -> Result<Array, LmError> {
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

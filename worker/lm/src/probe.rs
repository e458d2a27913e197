//! What this machine can do, measured once: the rate of a large matrix product on the device that models run on.

use crate::error::LmError;
use mlx_rs::{Array, error::Exception, ops, transforms::compile::compile as compiled};
use std::time::{Duration, Instant};

const SIZE: i32 = 1024;
const TIME: Duration = Duration::from_millis(400);

/// Floating-point operations a second of an f32 product of two square matrices.
pub fn matmul_rate() -> Result<f64, LmError> {
    let values: Vec<f32> = (0..SIZE * SIZE).map(|i| (i % 17) as f32 / 17.0).collect();
    let a = Array::from_slice(&values, &[SIZE, SIZE]);
    ops::matmul(&a, &a)?.eval()?;
    let (start, mut rounds) = (Instant::now(), 0u32);
    while start.elapsed() < TIME {
        ops::matmul(&a, &a)?.eval()?;
        rounds += 1;
    }
    Ok(2.0 * f64::from(SIZE).powi(3) * f64::from(rounds) / start.elapsed().as_secs_f64())
}

/// An error where MLX cannot compile: on Linux it needs a C++ compiler at run time.
pub fn compile() -> Result<(), LmError> {
    let x = Array::from_slice(&[1.0f32, 2.0], &[2]);
    let mut function = compiled(|x: &Array| -> Result<Array, Exception> { ops::multiply(&ops::exp(x)?, x) }, None);
    Ok(function(&x)?.eval()?)
}

/// Bytes per second that summing a large buffer reads, with all cores.
pub fn memory_bandwidth() -> f64 {
    const BYTES_PER_THREAD: usize = 64 << 20;
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
    let buffers: Vec<Vec<u64>> = (0..threads).map(|seed| vec![seed as u64 + 1; BYTES_PER_THREAD / 8]).collect();
    let sum_all = || {
        std::thread::scope(|scope| {
            let sums: Vec<_> =
                buffers.iter().map(|buffer| scope.spawn(|| buffer.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)))).collect();
            sums.into_iter().filter_map(|sum| sum.join().ok()).fold(0u64, u64::wrapping_add)
        })
    };
    std::hint::black_box(sum_all());
    let (start, mut rounds) = (Instant::now(), 0u32);
    while start.elapsed() < TIME {
        std::hint::black_box(sum_all());
        rounds += 1;
    }
    (threads * BYTES_PER_THREAD) as f64 * f64::from(rounds) / start.elapsed().as_secs_f64()
}

//! What this machine can do, measured once: the rate of a large matrix product on the device that models run on.

use crate::error::LmError;
use mlx_rs::{Array, ops};
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

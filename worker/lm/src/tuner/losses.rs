//! Losses of rows of logits, one number a row: what is counted, and what the mean is over, is the caller's.

use crate::{error::LmError, ffi};
use mlx_rs::{Array, Device, DeviceType, Dtype, error::Exception, ops, stop_gradient};
use std::f32::consts::LN_2;

/// `-log p(target)` of rows `logits` `[N, V]` for `targets` `[N]`, u32: `[N]` in the logits' type, as `mlx.nn.losses.cross_entropy` has it.
/// On a CPU sums are in the logits' type, on a GPU in f32.
pub fn cross_entropy(logits: &Array, targets: &Array) -> Result<Array, LmError> {
    check(logits, targets, &logits.shape()[..logits.ndim().saturating_sub(1)])?;
    if matches!(Device::try_default()?.get_type()?, DeviceType::Gpu) {
        return Ok(ffi::fused_cross_entropy(logits, targets)?.as_dtype(logits.dtype())?);
    }
    let logits = logits.subtract(stop_gradient(logits.max_axis(-1, true)?)?)?;
    let score = logits.take_along_axis(targets.expand_dims(-1)?, -1)?.squeeze_axes(&[-1])?;
    Ok(logits.logsumexp_axis(-1, false)?.subtract(score)?)
}

/// `Σ p log(p / q)` with the teacher's `p` and the student's `q`, both softened: `[N]` from logits `[N, V]`, in the student's type with sums
/// in f32, as mlx-lm's `kl_div_loss` of logits over `temperature`. No gradient goes to the teacher.
pub fn kl_divergence(student: &Array, teacher: &Array, temperature: f32) -> Result<Array, LmError> {
    check(student, teacher, student.shape())?;
    let q = log_softmax(student, temperature)?;
    let p = stop_gradient(log_softmax(teacher, temperature)?)?;
    Ok(divergence(&p, &q)?.as_dtype(student.dtype())?)
}

/// `(Σ p log(p / m) + Σ q log(q / m)) / 2` with `m = (p + q) / 2`; otherwise as `kl_divergence`, and mlx-lm's `js_div_loss`.
pub fn js_divergence(student: &Array, teacher: &Array, temperature: f32) -> Result<Array, LmError> {
    check(student, teacher, student.shape())?;
    let q = log_softmax(student, temperature)?;
    let p = stop_gradient(log_softmax(teacher, temperature)?)?;
    // mlx-lm's log(1 + exp(q - p)) overflows where the two are far apart.
    let m = ops::logaddexp(&p, &q)?.subtract(Array::from_f32(LN_2))?;
    let both = divergence(&p, &m)?.add(divergence(&q, &m)?)?;
    Ok(Array::from_f32(0.5).multiply(both)?.as_dtype(student.dtype())?)
}

/// `Σ p log(p / q)` of log-probabilities along the last axis.
fn divergence(p: &Array, q: &Array) -> Result<Array, Exception> {
    p.exp()?.multiply(p.subtract(q)?)?.sum_axis(-1, false)
}

/// In f32.
fn log_softmax(logits: &Array, temperature: f32) -> Result<Array, Exception> {
    let logits = Array::from_f32(1.0 / temperature).multiply(logits.as_dtype(Dtype::Float32)?)?;
    logits.subtract(logits.logsumexp_axis(-1, true)?)
}

fn check(logits: &Array, beside: &Array, wanted: &[i32]) -> Result<(), LmError> {
    match beside.shape() == wanted && logits.ndim() > 0 {
        true => Ok(()),
        false => Err(LmError::WrongInput {
            wanted: format!("{wanted:?} beside logits {:?}", logits.shape()),
            found: format!("{:?}", beside.shape()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::{
        random,
        transforms::{eval, fallible_vjp},
    };

    type Loss = fn(&Array, &Array) -> Result<Array, LmError>;

    fn logits(seed: u64) -> Array {
        random::normal::<f32>(&[3, 7], None, 2.0, &random::key(seed).expect("key")).expect("draws")
    }

    fn values(array: &Array) -> Vec<f64> {
        eval([array]).expect("evaluates");
        array.try_as_slice::<f32>().expect("f32").iter().map(|value| f64::from(*value)).collect()
    }

    /// The gradient of the sum of a loss.
    fn gradient(loss: Loss, student: &Array, beside: &Array) -> Vec<f64> {
        let run = |arrays: &[Array]| Ok(vec![loss(&arrays[0], beside).map_err(|error| Exception::custom(error.to_string()))?]);
        let ones = ops::ones::<f32>(&[student.dim(0)]).expect("makes");
        let (_, gradients) = fallible_vjp(run, std::slice::from_ref(student), &[ones]).expect("differentiates");
        values(&gradients[0])
    }

    fn differences(loss: Loss, student: &Array, beside: &Array) -> Vec<f64> {
        let (shape, step) = (student.shape(), 1e-2);
        let base: Vec<f32> = student.try_as_slice::<f32>().expect("f32").to_vec();
        let at = |i: usize, by: f32| {
            let mut moved = base.clone();
            moved[i] += by;
            values(&loss(&Array::from_slice(&moved, shape), beside).expect("loss")).iter().sum::<f64>()
        };
        (0..base.len()).map(|i| (at(i, step) - at(i, -step)) / (2.0 * f64::from(step))).collect()
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let (student, teacher) = (logits(1), logits(2));
        eval([&student, &teacher]).expect("evaluates");
        let targets = Array::from_slice(&[0u32, 6, 3], &[3]);
        let kl: Loss = |q, p| kl_divergence(q, p, 2.0);
        let js: Loss = |q, p| js_divergence(q, p, 0.7);
        for (loss, beside) in [(cross_entropy as Loss, &targets), (kl, &teacher), (js, &teacher)] {
            for (ours, wanted) in gradient(loss, &student, beside).iter().zip(differences(loss, &student, beside)) {
                assert!((ours - wanted).abs() < 1e-3, "{ours} {wanted}");
            }
        }
    }

    #[test]
    fn equal_distributions_do_not_diverge_and_far_ones_stay_finite() {
        let same = values(&js_divergence(&logits(1), &logits(1), 1.0).expect("loss"));
        assert!(same.iter().all(|value| value.abs() < 1e-6), "{same:?}");
        let q = Array::from_slice(&[200f32, -200.0], &[1, 2]);
        let p = Array::from_slice(&[-200f32, 200.0], &[1, 2]);
        let js = values(&js_divergence(&q, &p, 1.0).expect("loss"));
        assert!((js[0] - f64::from(LN_2)).abs() < 1e-6, "{js:?}");
        assert!(gradient(|q, p| js_divergence(q, p, 1.0), &q, &p).iter().all(|value| value.is_finite()));
        let kl = values(&kl_divergence(&q, &p, 2.0).expect("loss"));
        assert!((kl[0] - 200.0).abs() < 1e-3, "{kl:?}");
    }

    #[test]
    fn misshapen_targets_are_named() {
        let error = cross_entropy(&logits(1), &Array::from_slice(&[1u32, 2], &[2])).expect_err("two targets of three");
        assert!(error.to_string().contains("[3] beside logits [3, 7]"), "{error}");
    }
}

//! Gradients added up over the ranks of a group, many small ones at once.

use crate::{error::LmError, ffi, group::Group};
use mlx_rs::{Array, ops};
use std::collections::BTreeMap;

/// Numbers of a bucket that is added up over replicas at once; 32 MiB of f32, as in mlx-lm.
const BUCKET: usize = 8 << 20;

/// Gradients of all ranks together, in buckets.
pub(super) fn summed(group: &Group, gradients: BTreeMap<String, Array>) -> Result<BTreeMap<String, Array>, LmError> {
    let mut buckets: Vec<Vec<(String, Array)>> = Vec::new();
    let mut room = 0;
    for (name, gradient) in gradients {
        let fits = buckets.last().and_then(|bucket| bucket.first()).is_some_and(|(_, first)| first.dtype() == gradient.dtype());
        if gradient.size() > room || !fits {
            buckets.push(Vec::new());
            room = BUCKET;
        }
        room = room.saturating_sub(gradient.size());
        if let Some(bucket) = buckets.last_mut() {
            bucket.push((name, gradient));
        }
    }
    let mut all = BTreeMap::new();
    for bucket in buckets {
        let flat = bucket.iter().map(|(_, gradient)| gradient.reshape(&[-1])).collect::<Result<Vec<_>, _>>()?;
        let sum = group.all_sum(&ops::concatenate(&flat, 0)?)?;
        let mut at = 0;
        for (name, gradient) in bucket {
            let own = ffi::slice(&sum, &[at], &[at + gradient.size() as i32])?;
            at += gradient.size() as i32;
            all.insert(name, own.reshape(gradient.shape())?);
        }
    }
    Ok(all)
}

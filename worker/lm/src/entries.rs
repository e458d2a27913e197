//! Ranges of entries of an axis: taken out of a whole, and put back where they were.

use crate::{error::LmError, ffi};
use mlx_rs::{Array, ops};
use std::ops::Range;

/// The entries of these ranges of an axis, one range after the other.
pub(crate) fn entries(array: &Array, axis: usize, ranges: &[Range<u32>]) -> Result<Array, LmError> {
    let parts = ranges.iter().map(|range| sliced(array, axis, range.start as i32..range.end as i32));
    let parts = parts.collect::<Result<Vec<_>, LmError>>()?;
    match parts.as_slice() {
        [one] => Ok(one.clone()),
        parts => Ok(ops::concatenate(parts, axis as i32)?),
    }
}

/// What [`entries`] took, in an axis of `length` entries, with zeros for all others. Where ranges overlap, what they have is added up.
pub(crate) fn spread(array: &Array, axis: usize, length: i32, ranges: &[Range<u32>]) -> Result<Array, LmError> {
    let mut runs: Vec<Run> = Vec::with_capacity(ranges.len());
    let mut at = 0;
    for range in ranges {
        let count = range.len() as i32;
        runs.push(Run { start: range.start as i32, from: at, count });
        at += count;
    }
    runs.sort_by_key(|run| run.start);
    let mut sum: Option<Array> = None;
    while !runs.is_empty() {
        let (layer, rest) = apart(runs);
        let spread = side_by_side(array, axis, length, &layer)?;
        sum = Some(match sum {
            Some(sum) => ops::add(sum, spread)?,
            None => spread,
        });
        runs = rest;
    }
    sum.ok_or_else(|| LmError::Mlx("entries of no ranges".into()))
}

/// Entries that belong together: where they go, and where they are.
struct Run {
    start: i32,
    from: i32,
    count: i32,
}

/// Runs that do not overlap, and the others; all in order.
fn apart(runs: Vec<Run>) -> (Vec<Run>, Vec<Run>) {
    let mut end = 0;
    runs.into_iter().partition(|run| {
        let fits = run.start >= end;
        if fits {
            end = run.start + run.count;
        }
        fits
    })
}

fn side_by_side(array: &Array, axis: usize, length: i32, runs: &[Run]) -> Result<Array, LmError> {
    let gap = |count: i32| {
        let mut shape = array.shape().to_vec();
        shape[axis] = count;
        ops::zeros_dtype(&shape, array.dtype())
    };
    let (mut parts, mut end) = (Vec::new(), 0);
    for Run { start, from, count } in runs {
        if *start > end {
            parts.push(gap(start - end)?);
        }
        parts.push(sliced(array, axis, *from..from + count)?);
        end = start + count;
    }
    if length > end {
        parts.push(gap(length - end)?);
    }
    Ok(ops::concatenate(&parts, axis as i32)?)
}

fn sliced(array: &Array, axis: usize, range: Range<i32>) -> Result<Array, LmError> {
    let (mut start, mut stop) = (vec![0; array.ndim()], array.shape().to_vec());
    (start[axis], stop[axis]) = (range.start, range.end);
    ffi::slice(array, &start, &stop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlx_rs::transforms;

    #[test]
    fn what_was_taken_goes_back_where_it_was() {
        let whole = Array::from_iter(1..=12i32, &[2, 6]);
        for ranges in [vec![2..4, 0..1], vec![3..6, 0..3], vec![5..6, 1..2], vec![2..4, 2..4, 3..6, 0..1]] {
            let taken = entries(&whole, 1, &ranges).expect("entries");
            let spread = spread(&taken, 1, 6, &ranges).expect("spread");
            let wanted = (1..=12i32).map(|number| {
                let column = (number - 1) as u32 % 6;
                number * ranges.iter().filter(|range| range.contains(&column)).count() as i32
            });
            transforms::eval([&spread]).expect("evaluates");
            assert_eq!(spread.as_slice::<i32>(), wanted.collect::<Vec<_>>(), "{ranges:?}");
        }
    }
}

//! Dividing layers into consecutive stages so that the most loaded stage is loaded least: exact, by dynamic programming.

use std::ops::Range;

/// The cheapest way to hold the layers before some layer in so many stages.
#[derive(Clone, Copy)]
struct Best {
    /// The largest load, then the sum of squares so that ties are even.
    most: f64,
    squares: f64,
    /// Where the last of these stages starts.
    start: u32,
}

/// Divides `n_layers` into `n_stages` non-empty ranges. `load(stage, layers)` is None for what does not fit; it is None for
/// every range that contains such a one. Cost: stages × layers² calls.
pub(super) fn best(n_layers: u32, n_stages: usize, load: impl Fn(usize, Range<u32>) -> Option<f64>) -> Option<Vec<Range<u32>>> {
    let mut table: Vec<Vec<Option<Best>>> = Vec::with_capacity(n_stages);
    for stage in 0..n_stages {
        let row = (0..=n_layers).map(|end| cheapest(&table, stage, end, &load)).collect();
        table.push(row);
    }
    let mut end = n_layers;
    let mut ranges = Vec::with_capacity(n_stages);
    for row in table.iter().rev() {
        let start = row.get(end as usize).copied().flatten()?.start;
        ranges.push(start..end);
        end = start;
    }
    ranges.reverse();
    (end == 0 && !ranges.is_empty()).then_some(ranges)
}

fn cheapest(table: &[Vec<Option<Best>>], stage: usize, end: u32, load: &impl Fn(usize, Range<u32>) -> Option<f64>) -> Option<Best> {
    let starts = if stage == 0 { 0..end.min(1) } else { 1..end };
    let mut cheapest: Option<Best> = None;
    for start in starts {
        let before = match stage.checked_sub(1) {
            None => Some((0.0, 0.0)),
            Some(stage) => table.get(stage).and_then(|row| *row.get(start as usize)?).map(|best| (best.most, best.squares)),
        };
        let Some((most, squares)) = before else { continue };
        let Some(load) = load(stage, start..end) else { continue };
        let candidate = Best { most: most.max(load), squares: squares + load * load, start };
        let better = |old: &Best| (candidate.most, candidate.squares) < (old.most, old.squares);
        if cheapest.as_ref().is_none_or(better) {
            cheapest = Some(candidate);
        }
    }
    cheapest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_stages_get_equal_shares_and_the_rest_is_even() {
        let even = |n_layers, n_stages| best(n_layers, n_stages, |_, layers| Some(f64::from(layers.end - layers.start)));
        assert_eq!(even(6, 2), Some(vec![0..3, 3..6]));
        assert_eq!(even(6, 3), Some(vec![0..2, 2..4, 4..6]));
        assert_eq!(even(3, 3), Some(vec![0..1, 1..2, 2..3]));
        assert_eq!(even(2, 3), None);
        assert_eq!(even(4, 0), None);
    }

    #[test]
    fn what_does_not_fit_is_avoided() {
        let small_first = |stage, layers: Range<u32>| {
            let n = layers.end - layers.start;
            (stage != 0 || n <= 1).then_some(f64::from(n))
        };
        assert_eq!(best(6, 2, small_first), Some(vec![0..1, 1..6]));
        assert_eq!(best(6, 2, |_, layers| (layers.end - layers.start <= 2).then_some(1.0)), None);
    }
}

//! Dividing units, and heads that share keys and values, over ranks in proportion to their shares.

use std::ops::Range;

/// Splitting whole groups of heads is preferred to a better balance up to this factor, since it copies no keys and values.
const COPY_FREE: f64 = 1.25;

/// Divides `n` units so that each rank has at least one, in proportion to `shares` by largest remainders. None when there are fewer units
/// than ranks.
pub(super) fn divide(n: u32, shares: &[u32]) -> Option<Vec<Range<u32>>> {
    let ranks = shares.len() as u32;
    let total: u64 = shares.iter().map(|share| u64::from(*share)).sum();
    if n < ranks || total == 0 {
        return None;
    }
    let exact = |share: &u32| u64::from(n) * u64::from(*share);
    let mut counts: Vec<u32> = shares.iter().map(|share| ((exact(share) / total) as u32).max(1)).collect();
    let given: u32 = counts.iter().sum();
    // Who is furthest below its share gets one more; who is furthest above it, and has more than one, gives one back.
    let surplus = |counts: &[u32], rank: usize| i128::from(counts[rank]) * i128::from(total) - i128::from(exact(&shares[rank]));
    for _ in given..n {
        let rank = (0..counts.len()).min_by_key(|rank| surplus(&counts, *rank))?;
        counts[rank] += 1;
    }
    for _ in n..given {
        let rank = (0..counts.len()).filter(|rank| counts[*rank] > 1).max_by_key(|rank| surplus(&counts, *rank))?;
        counts[rank] -= 1;
    }
    let mut start = 0;
    let range = |count: &u32| {
        start += count;
        start - count..start
    };
    Some(counts.iter().map(range).collect())
}

/// Divides `n` entries of an axis in units of `unit` entries.
pub(super) fn divide_by(n: u32, unit: u32, shares: &[u32]) -> Option<Vec<Range<u32>>> {
    if unit == 0 || !n.is_multiple_of(unit) {
        return None;
    }
    let units = divide(n / unit, shares)?;
    Some(units.into_iter().map(|range| range.start * unit..range.end * unit).collect())
}

/// The heads of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heads {
    /// Of the queries, or of whatever there is most of.
    pub(super) queries: Range<u32>,
    /// The head whose keys and values each of the rank's own heads of that kind holds: each serves equally many queries, for which some may
    /// have to be there several times.
    pub(super) shared: Vec<u32>,
}

impl Heads {
    fn new(queries: Range<u32>, per_shared: u32) -> Self {
        let first = queries.start / per_shared;
        let last = (queries.end - 1) / per_shared;
        let run = |shared: u32| queries.end.min((shared + 1) * per_shared) - queries.start.max(shared * per_shared);
        let serves = (first..=last).map(run).fold(0, gcd);
        let shared = (first..=last).flat_map(|shared| std::iter::repeat_n(shared, (run(shared) / serves) as usize)).collect();
        Self { queries, shared }
    }
}

/// Divides `n` heads, of which `n / n_shared` consecutive ones share keys and values, in units of `unit` heads. Whole groups where that is
/// balanced enough, else groups are cut and what they share is copied to several ranks.
pub(super) fn divide_heads(n: u32, n_shared: u32, unit: u32, shares: &[u32]) -> Option<Vec<Heads>> {
    if n_shared == 0 || unit == 0 || !n.is_multiple_of(n_shared) {
        return None;
    }
    let per_shared = n / n_shared;
    let whole_groups = divide_by(n, lcm(per_shared, unit), shares);
    let fine = divide_by(n, unit, shares);
    let ranges = match (whole_groups, fine) {
        (Some(whole), Some(fine)) if excess(&whole, shares) > COPY_FREE * excess(&fine, shares) => fine,
        (Some(whole), _) => whole,
        (None, fine) => fine?,
    };
    Some(ranges.into_iter().map(|queries| Heads::new(queries, per_shared)).collect())
}

/// By how much the worst rank has more than its share; what the whole group waits for.
fn excess(ranges: &[Range<u32>], shares: &[u32]) -> f64 {
    let loads = ranges.iter().zip(shares).map(|(range, share)| f64::from(range.end - range.start) / f64::from(*share));
    loads.fold(0.0, f64::max)
}

pub(super) fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

pub(super) fn lcm(a: u32, b: u32) -> u32 {
    if a == 0 || b == 0 { 0 } else { a / gcd(a, b) * b }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(n: u32, shares: &[u32]) -> Option<Vec<u32>> {
        Some(divide(n, shares)?.iter().map(|range| range.end - range.start).collect())
    }

    #[test]
    fn units_go_by_shares_and_nobody_is_left_out() {
        assert_eq!(counts(8, &[1, 1]), Some(vec![4, 4]));
        assert_eq!(counts(6, &[2, 1]), Some(vec![4, 2]));
        assert_eq!(counts(4, &[1, 1, 1]), Some(vec![2, 1, 1]));
        assert_eq!(counts(3, &[100, 1, 1]), Some(vec![1, 1, 1]));
        assert_eq!(counts(10, &[97, 1, 1, 1]), Some(vec![7, 1, 1, 1]));
        assert_eq!(counts(2, &[1, 1, 1]), None);
    }

    #[test]
    fn ranges_tile_for_all_shares() {
        for n in 1..40 {
            for a in 1..7 {
                for b in 1..7 {
                    for c in 1..7 {
                        let Some(ranges) = divide(n, &[a, b, c]) else {
                            assert!(n < 3);
                            continue;
                        };
                        assert!(ranges.iter().all(|range| range.start < range.end));
                        assert_eq!((ranges[0].start, ranges[0].end, ranges[1].end), (0, ranges[1].start, ranges[2].start));
                        assert_eq!(ranges[2].end, n);
                    }
                }
            }
        }
    }

    #[test]
    fn groups_stay_whole_where_that_is_balanced() {
        let heads = |n, n_shared, unit, shares: &[u32]| {
            divide_heads(n, n_shared, unit, shares)
                .map(|all| all.into_iter().map(|heads| (heads.queries, heads.shared)).collect::<Vec<_>>())
        };
        assert_eq!(heads(6, 2, 1, &[1, 1]), Some(vec![(0..3, vec![0]), (3..6, vec![1])]));
        // One head of keys for all: everybody has it.
        assert_eq!(heads(4, 1, 1, &[1, 1]), Some(vec![(0..2, vec![0]), (2..4, vec![0])]));
        // Columns of the output go in pairs of heads, so the second rank's queries are served 1 and 3 by a head.
        assert_eq!(heads(6, 2, 2, &[1, 1]), Some(vec![(0..4, vec![0, 0, 0, 1]), (4..6, vec![1])]));
        assert_eq!(heads(6, 2, 1, &[2, 1]), Some(vec![(0..4, vec![0, 0, 0, 1]), (4..6, vec![1])]));
        assert_eq!(heads(8, 4, 1, &[3, 1]), Some(vec![(0..6, vec![0, 1, 2]), (6..8, vec![3])]));
        assert_eq!(heads(2, 2, 1, &[1, 1, 1]), None);
    }
}

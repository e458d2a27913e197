//! Deals the rows of a batch to data-parallel replicas, and cuts what each gets into micro-batches.

use mlx_cluster_common::training::{MicroBatch, Row};
use std::cmp::{Ordering, Reverse};

/// How much goes through a model at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroLimits {
    pub rows: usize,
    /// Of all rows together. A row that is longer goes alone.
    pub tokens: u64,
}

/// Micro-batches for each replica, as many lists as `shares`, and one without any. Every row is in exactly one.
///
/// The longest rows are dealt first, each to the replica that would be the least loaded for its share with it (Graham's LPT rule for
/// machines of different speeds), so that token counts come near the shares. A replica with a share of 0 gets nothing, unless all
/// are 0: then all are equal. A replica may get nothing too when there are fewer rows than replicas. Rows of a replica stay in the order
/// of the batch, and `first_row` is the place there. `batch` is the number of the batch, for dropout.
pub fn divide(rows: Vec<Row>, batch: u64, shares: &[u32], limits: MicroLimits) -> Vec<Vec<MicroBatch>> {
    let batch_targets = super::batch_targets(&rows);
    let mut dealt: Vec<Vec<(u32, Row)>> = vec![Vec::new(); shares.len().max(1)];
    let replicas = deal(&rows, shares);
    for (index, (row, replica)) in rows.into_iter().zip(replicas).enumerate() {
        dealt[replica].push((index as u32, row));
    }
    let micro = |rows: Vec<(u32, Row)>| {
        let cut = cut(rows, limits);
        cut.into_iter().map(|(first_row, rows)| MicroBatch { rows, batch_targets, batch, first_row }).collect()
    };
    dealt.into_iter().map(micro).collect()
}

/// The replica of each row.
fn deal(rows: &[Row], shares: &[u32]) -> Vec<usize> {
    let equal = shares.iter().all(|share| *share == 0);
    let open: Vec<(usize, u128)> = shares
        .iter()
        .enumerate()
        .filter(|(_, share)| equal || **share > 0)
        .map(|(replica, share)| (replica, u128::from(if equal { 1 } else { *share })))
        .collect();
    let mut longest_first: Vec<usize> = (0..rows.len()).collect();
    longest_first.sort_by_key(|index| Reverse(rows[*index].tokens.len()));
    let mut loads = vec![0u128; shares.len().max(1)];
    let mut replicas = vec![0; rows.len()];
    for index in longest_first {
        let len = rows[index].tokens.len() as u128;
        // a / share_a against b / share_b, without division
        let by_load = |(a, share_a): &&(usize, u128), (b, share_b): &&(usize, u128)| -> Ordering {
            ((loads[*a] + len) * share_b).cmp(&((loads[*b] + len) * share_a))
        };
        let replica = open.iter().min_by(by_load).map_or(0, |(replica, _)| *replica);
        loads[replica] += len;
        replicas[index] = replica;
    }
    replicas
}

fn cut(rows: Vec<(u32, Row)>, limits: MicroLimits) -> Vec<(u32, Vec<Row>)> {
    let mut parts: Vec<(u32, Vec<Row>)> = Vec::new();
    let mut tokens = 0;
    for (index, row) in rows {
        let len = row.tokens.len() as u64;
        match parts.last_mut() {
            Some((_, part)) if part.len() < limits.rows && tokens + len <= limits.tokens => {
                tokens += len;
                part.push(row);
            }
            _ => {
                tokens = len;
                parts.push((index, vec![row]));
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WIDE: MicroLimits = MicroLimits { rows: usize::MAX, tokens: u64::MAX };

    fn rows(lengths: &[usize]) -> Vec<Row> {
        let row = |(index, len): (usize, &usize)| Row { tokens: vec![index as u32; *len], targets: vec![0; *len], counted: 0..*len as u32 };
        lengths.iter().enumerate().map(row).collect()
    }

    fn tokens(parts: &[MicroBatch]) -> u64 {
        parts.iter().map(MicroBatch::n_tokens).sum()
    }

    #[test]
    fn tokens_come_near_the_shares() {
        let divided = divide(rows(&[10, 20, 30, 40, 50, 60, 70, 80, 90, 150]), 7, &[1, 2, 0], WIDE);
        assert_eq!(divided.iter().map(|parts| tokens(parts)).collect::<Vec<_>>(), [200, 400, 0]);
        assert!(divided[2].is_empty());
        let one = &divided[0][0];
        assert_eq!((one.batch, one.batch_targets), (7, 600));
    }

    #[test]
    fn micro_batches_keep_to_both_limits() {
        let limits = MicroLimits { rows: 2, tokens: 10 };
        let divided = divide(rows(&[4, 5, 1, 12, 6, 6]), 0, &[1], limits);
        let lengths: Vec<Vec<usize>> = divided[0].iter().map(|part| part.rows.iter().map(|row| row.tokens.len()).collect()).collect();
        assert_eq!(lengths, [vec![4, 5], vec![1], vec![12], vec![6], vec![6]]);
        assert_eq!(divided[0].iter().map(|part| part.first_row).collect::<Vec<_>>(), [0, 2, 3, 4, 5]);
    }

    #[test]
    fn fewer_rows_than_replicas_leave_some_idle() {
        let divided = divide(rows(&[3]), 0, &[0, 0, 0], WIDE);
        assert_eq!(divided.iter().map(Vec::len).collect::<Vec<_>>(), [1, 0, 0]);
        assert!(divide(Vec::new(), 0, &[1, 1], WIDE).iter().all(Vec::is_empty));
        assert_eq!(divide(rows(&[3]), 0, &[], WIDE).concat().len(), 1);
    }

    proptest! {
        #[test]
        fn every_row_goes_to_one_place(
            lengths in prop::collection::vec(1usize..100, 0..60),
            shares in prop::collection::vec(0u32..5, 1..6),
            micro_rows in 1usize..8,
            micro_tokens in 1u64..300,
        ) {
            let limits = MicroLimits { rows: micro_rows, tokens: micro_tokens };
            let all = rows(&lengths);
            let divided = divide(all.clone(), 3, &shares, limits);
            prop_assert_eq!(divided.len(), shares.len());
            let parts: Vec<_> = divided.iter().flatten().collect();
            let mut seen: Vec<_> = parts.iter().flat_map(|part| part.rows.clone()).collect();
            seen.sort_by_key(|row| row.tokens[0]);
            prop_assert_eq!(&seen, &all);
            for part in &parts {
                prop_assert!(!part.rows.is_empty() && part.rows.len() <= micro_rows);
                prop_assert!(part.rows.len() == 1 || part.n_tokens() <= micro_tokens);
                prop_assert_eq!(part.rows[0].tokens[0], part.first_row);
                prop_assert_eq!(part.batch_targets, lengths.iter().sum::<usize>() as u64);
            }
            prop_assert_eq!(&divided, &divide(all, 3, &shares, limits));
            // The bound of the LPT rule for a replica that got its last row because all others would have been worse off.
            let (total, weights) = (lengths.iter().sum::<usize>() as u64, shares.iter().map(|share| u64::from(*share)).sum::<u64>());
            let longest = lengths.iter().copied().max().unwrap_or(0) as u64;
            for (parts, share) in divided.iter().zip(&shares) {
                if weights > 0 {
                    let others = shares.len() as u64 - 1;
                    prop_assert!(tokens(parts) * weights <= (total + others * longest) * u64::from(*share));
                    prop_assert!(*share > 0 || parts.is_empty());
                }
            }
        }
    }
}

//! What a plan says about training besides which worker holds which layers.

use super::{Parallel, TrainStrategy};
use crate::units::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A batch of fewer tokens than this is not cut at all, and replicas do not get fewer of one: smaller products do not keep a matrix unit busy, and
/// take about as long.
pub const PIECE_TOKENS_MIN: u32 = 512;
/// Micro-batches of a pipeline have about as many tokens at least: what they lose in products, they win by shorter waits at both ends of an update.
pub const MICRO_TOKENS_MIN: u32 = 256;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingPlan {
    /// As asked for.
    pub strategy: TrainStrategy,
    /// What the ranks of each stage are to each other. Replicas take rows of a batch in proportion to their shares.
    pub parallel: Parallel,
    /// The most rows that go through a rank together.
    pub micro_batch_rows: u32,
    /// Rows of a batch, over all replicas.
    pub batch_size: u32,
    /// The longest row that memory was reckoned for.
    pub tokens_per_row: u32,
    /// Batches for each update.
    pub accumulation: u32,
    /// As `fine_tune_type` says.
    pub fine_tune: String,
    /// Numbers that are trained in the whole model.
    pub trainable: u64,
    /// Of the gradients that replicas add up, the most of a stage.
    pub gradients: Bytes,
    /// Of one batch of rows of full length; None where the speed of a worker is not known.
    pub step_seconds: Option<f64>,
}

impl TrainingPlan {
    /// What the ranks of a stage do, given their shares.
    pub fn parallel_text(&self, n_stages: usize, shares: &[u32]) -> String {
        let by_shares: Vec<String> = shares.iter().map(u32::to_string).collect();
        match (self.parallel, shares.len()) {
            (_, 0 | 1) if n_stages > 1 => format!("all rows through {n_stages} stages"),
            (_, 0 | 1) => "all rows on one worker".to_owned(),
            (Parallel::Data, n) => format!("{n} replicas by rows {}, which add up {} of gradients", by_shares.join(":"), self.gradients),
            (Parallel::Tensor, n) => format!("every matrix in {n} parts {}", by_shares.join(":")),
        }
    }

    /// Rows of a batch for each replica: whole numbers in proportion to the shares, the rest to those that are furthest below theirs.
    pub fn deal(rows: u32, shares: &[u32]) -> Vec<u32> {
        let all: u64 = shares.iter().map(|share| u64::from(*share)).sum::<u64>().max(1);
        let product = |share: &u32| u64::from(rows) * u64::from(*share);
        let mut dealt: Vec<u32> = shares.iter().map(|share| (product(share) / all) as u32).collect();
        let rest = rows.saturating_sub(dealt.iter().sum());
        let mut order: Vec<usize> = (0..shares.len()).collect();
        order.sort_by_key(|rank| (std::cmp::Reverse(shares.get(*rank).map_or(0, product) % all), *rank));
        for rank in order.into_iter().take(rest as usize) {
            if let Some(own) = dealt.get_mut(rank) {
                *own += 1;
            }
        }
        dealt
    }
}

impl fmt::Display for TrainingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { micro_batch_rows, batch_size, tokens_per_row, accumulation, fine_tune, trainable, .. } = self;
        write!(
            f,
            "{fine_tune} of {:.3}M parameters, batches of {batch_size} rows of up to {tokens_per_row} tokens",
            *trainable as f64 / 1e6
        )?;
        write!(f, ", at most {micro_batch_rows} at once on a worker")?;
        if *accumulation > 1 { write!(f, ", an update every {accumulation} batches") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_dealt_by_share_and_none_is_lost() {
        assert_eq!(TrainingPlan::deal(10, &[3, 2]), [6, 4]);
        assert_eq!(TrainingPlan::deal(4, &[3, 2]), [2, 2], "2.4 and 1.6");
        assert_eq!(TrainingPlan::deal(1, &[1, 1]), [1, 0]);
        assert_eq!(TrainingPlan::deal(7, &[]), Vec::<u32>::new());
        for rows in 0..50 {
            assert_eq!(TrainingPlan::deal(rows, &[5, 1, 3]).iter().sum::<u32>(), rows);
        }
        assert_eq!(TrainingPlan::deal(u32::MAX, &[u32::MAX, 1]).iter().map(|rows| u64::from(*rows)).sum::<u64>(), u64::from(u32::MAX));
    }
}

//! Micro-batches between wire and nouns.

use crate::{WireError, wire};
use mlx_cluster_common::training::{MicroBatch, Row};

impl From<MicroBatch> for wire::TrainRows {
    fn from(micro: MicroBatch) -> Self {
        let row = |row: Row| wire::TrainRow {
            counted_start: row.counted.start,
            counted_end: row.counted.end,
            tokens: row.tokens,
            targets: row.targets,
        };
        Self {
            rows: micro.rows.into_iter().map(row).collect(),
            batch_targets: micro.batch_targets,
            batch: micro.batch,
            first_row: micro.first_row,
        }
    }
}

impl TryFrom<wire::TrainRows> for MicroBatch {
    type Error = WireError;

    fn try_from(micro: wire::TrainRows) -> Result<Self, WireError> {
        let row = |row: wire::TrainRow| {
            let fits = row.targets.len() == row.tokens.len()
                && row.counted_start <= row.counted_end
                && row.counted_end as usize <= row.tokens.len();
            let counted = row.counted_start..row.counted_end;
            fits.then_some(Row { tokens: row.tokens, targets: row.targets, counted })
                .ok_or(WireError::Invalid { field: "rows", value: "targets and tokens do not belong together".into() })
        };
        if micro.batch_targets == 0 {
            return Err(WireError::Invalid { field: "batch_targets", value: "a mean over nothing".into() });
        }
        Ok(Self {
            rows: micro.rows.into_iter().map(row).collect::<Result<_, _>>()?,
            batch_targets: micro.batch_targets,
            batch: micro.batch,
            first_row: micro.first_row,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micro() -> MicroBatch {
        let row =
            |tokens: Vec<u32>| Row { targets: tokens.iter().map(|token| token + 1).collect(), counted: 1..tokens.len() as u32, tokens };
        MicroBatch { rows: vec![row(vec![3, 4, 5]), row(vec![9, 1])], batch_targets: 7, batch: 12, first_row: 2 }
    }

    #[test]
    fn micro_batches_survive_the_wire() {
        assert_eq!(MicroBatch::try_from(wire::TrainRows::from(micro())), Ok(micro()));
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let broken = |change: fn(&mut wire::TrainRows)| {
            let mut rows = wire::TrainRows::from(micro());
            change(&mut rows);
            MicroBatch::try_from(rows)
        };
        assert!(broken(|rows| rows.batch_targets = 0).is_err());
        assert!(broken(|rows| rows.rows[0].targets.truncate(2)).is_err());
        assert!(broken(|rows| rows.rows[0].counted_end = 4).is_err());
        assert!(broken(|rows| rows.rows[1].counted_start = 3).is_err());
    }
}

//! A micro-batch as arrays.

use crate::{error::LmError, packing::Packing};
use mlx_cluster_common::training::MicroBatch;
use mlx_rs::Array;

/// Rows of a micro-batch one after the other, without padding.
#[derive(Debug)]
pub(crate) struct Lot {
    pub(crate) packing: Packing,
    /// Tokens of each row.
    pub(crate) lengths: Vec<i32>,
    /// `[tokens]`
    pub(crate) ids: Array,
    /// Those of all tokens whose targets count.
    pub(crate) counted: Vec<i32>,
    /// `[counted]`
    pub(crate) targets: Array,
    /// In the whole batch.
    pub(crate) batch_targets: u64,
}

impl Lot {
    pub(crate) fn new(micro: &MicroBatch) -> Result<Self, LmError> {
        let (mut ids, mut lengths) = (Vec::<u32>::new(), Vec::new());
        let (mut counted, mut targets) = (Vec::new(), Vec::<u32>::new());
        for row in micro.rows.iter().filter(|row| !row.tokens.is_empty()) {
            if row.targets.len() != row.tokens.len() || row.counted.end as usize > row.tokens.len() {
                return Err(LmError::WrongInput {
                    wanted: format!("a target for each of {} tokens", row.tokens.len()),
                    found: format!("{}, of which {:?} count", row.targets.len(), row.counted),
                });
            }
            let first = ids.len() as i32;
            counted.extend(row.counted.clone().map(|at| first + at as i32));
            targets.extend(row.targets.get(row.counted.start as usize..row.counted.end as usize).unwrap_or_default());
            ids.extend(&row.tokens);
            lengths.push(row.tokens.len() as i32);
        }
        if ids.is_empty() {
            return Err(LmError::WrongInput { wanted: "tokens".into(), found: "none".into() });
        }
        Ok(Self {
            packing: Packing::whole(&lengths),
            lengths,
            ids: Array::from_slice(&ids, &[ids.len() as i32]),
            counted,
            targets: Array::from_slice(&targets, &[targets.len() as i32]),
            batch_targets: micro.batch_targets,
        })
    }
}

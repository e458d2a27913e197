//! Counted randomness: what training draws depends on a seed and on what is drawn, not on the order, a stage's layers, or a rank's rows.

use crate::error::LmError;
use mlx_rs::{Array, error::Exception, ops, random};
use sha2::{Digest, Sha256};

/// Numbers of `[low, high)` in f32 for what is called `name`, such as a new adapter's factor.
pub fn uniform(seed: u64, name: &str, shape: &[i32], low: f32, high: f32) -> Result<Array, LmError> {
    let key = key("uniform", &[seed], name)?;
    Ok(random::uniform::<_, f32>(low, high, shape, &key)?)
}

/// Where rows of tokens lie in the batches of a training, and which of their inputs are dropped by what is called `name`.
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    pub seed: u64,
    pub name: &'a str,
    /// The number of the batch.
    pub batch: u64,
    /// The first row's place in the batch, also when the batch is computed in parts or by several ranks.
    pub first_row: u32,
    /// The part that is dropped, 0 to below 1.
    pub rate: f32,
}

impl Dropout<'_> {
    /// Which inputs stay, bool `[Σ lengths, width]`: of rows one below the other, of so many tokens each. A row's part depends on its own
    /// length, not on its neighbours.
    pub fn mask(&self, lengths: &[i32], width: i32) -> Result<Array, LmError> {
        let stays = Array::from_f32(1.0 - self.rate);
        let row = |(row, length): (u64, &i32)| {
            let key = key("dropout", &[self.seed, self.batch, row], self.name)?;
            random::bernoulli(&stays, &[*length, width], &key)
        };
        let rows = (u64::from(self.first_row)..).zip(lengths).map(row).collect::<Result<Vec<_>, Exception>>()?;
        Ok(ops::concatenate(&rows, 0)?)
    }
}

/// A key of MLX's generator: the start of a hash, so that neighbouring seeds and names have nothing to do with each other.
fn key(purpose: &str, numbers: &[u64], name: &str) -> Result<Array, Exception> {
    let mut hash = Sha256::new_with_prefix(purpose);
    numbers.iter().for_each(|number| hash.update(number.to_le_bytes()));
    hash.update(name);
    let start = hash.finalize().iter().take(8).fold(0u64, |key, byte| (key << 8) | u64::from(*byte));
    random::key(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ffi::{array_to_bytes, slice};
    use std::collections::BTreeSet;

    fn mask(batch: u64, first_row: u32, name: &str, lengths: &[i32]) -> Array {
        Dropout { seed: 1, name, batch, first_row, rate: 0.25 }.mask(lengths, 64).expect("draws")
    }

    fn bytes(array: &Array) -> Vec<u8> {
        array_to_bytes(array).expect("evaluates")
    }

    #[test]
    fn factors_depend_on_seed_and_name() {
        let draw = |seed, name| bytes(&uniform(seed, name, &[4, 8], -0.5, 0.5).expect("draws"));
        assert_eq!(draw(0, "layers.0.q_proj.lora_a"), draw(0, "layers.0.q_proj.lora_a"));
        let others = [draw(0, "layers.0.q_proj.lora_a"), draw(1, "layers.0.q_proj.lora_a"), draw(0, "layers.1.q_proj.lora_a")];
        assert_eq!(others.into_iter().collect::<BTreeSet<_>>().len(), 3);
    }

    #[test]
    fn factors_stay_the_same_from_version_to_version() {
        let factor = uniform(7, "layers.3.mlp.down_proj.lora_a", &[2, 2], -1.0, 1.0).expect("draws");
        let values: Vec<f32> = bytes(&factor).chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let wanted = [0.7956308, 0.7152287, -0.6325214, -0.11415213];
        assert!(values.len() == 4 && values.iter().zip(wanted).all(|(value, wanted)| (value - wanted).abs() < 1e-6), "{values:?}");
    }

    #[test]
    fn a_row_drops_the_same_in_any_part_of_its_batch() {
        let whole = mask(5, 0, "q", &[3, 40, 9]);
        let middle = slice(&whole, &[3, 0], &[43, 64]).expect("slices");
        assert_eq!(bytes(&middle), bytes(&mask(5, 1, "q", &[40])));
        assert_eq!(bytes(&middle), bytes(&slice(&mask(5, 0, "q", &[7, 40]), &[7, 0], &[47, 64]).expect("slices")));
        for other in [mask(6, 1, "q", &[40]), mask(5, 2, "q", &[40]), mask(5, 1, "v", &[40])] {
            assert_ne!(bytes(&middle), bytes(&other));
        }
    }

    #[test]
    fn as_much_is_dropped_as_is_said() {
        let kept = bytes(&mask(0, 0, "q", &[500, 500])).iter().map(|kept| f64::from(*kept)).sum::<f64>() / 64_000.0;
        assert!((kept - 0.75).abs() < 0.01, "{kept}");
    }
}

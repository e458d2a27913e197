//! NumPy's legacy random numbers, in which mlx-lm draws the order of batches: `np.random.seed` and `np.random.permutation`.
//!
//! `RandomState` is MT19937 with `init_genrand` for a whole number as the seed; `shuffle` is Fisher and Yates' from the end, with
//! masked rejection for each draw (`numpy/random/src/distributions/distributions.c`, `random_interval`).

use rand_mt::Mt;

/// The state of `np.random` after `np.random.seed`.
#[derive(Debug, Clone)]
pub(super) struct NumpyRandom(Mt);

impl NumpyRandom {
    pub(super) fn new(seed: u32) -> Self {
        Self(Mt::new(seed))
    }

    /// `np.random.permutation(len)`.
    pub(super) fn permutation(&mut self, len: u32) -> Vec<u32> {
        let mut items: Vec<u32> = (0..len).collect();
        for last in (1..len).rev() {
            let other = self.interval(last);
            items.swap(last as usize, other as usize);
        }
        items
    }

    /// Leaves the state that [`permutation`](Self::permutation) leaves.
    pub(super) fn skip_permutation(&mut self, len: u32) {
        for last in (1..len).rev() {
            self.interval(last);
        }
    }

    /// Evenly from 0 to `max`, both included.
    fn interval(&mut self, max: u32) -> u32 {
        let Some(mask) = u32::MAX.checked_shr(max.leading_zeros()) else { return 0 };
        loop {
            let value = self.0.next_u32() & mask;
            if value <= max {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn golden() -> Value {
        serde_json::from_str(include_str!("golden.json")).unwrap()
    }

    #[test]
    fn permutations_are_numpys() {
        for case in golden()["permutations"].as_array().unwrap() {
            let seed = u32::try_from(case["seed"].as_u64().unwrap()).unwrap();
            let mut random = NumpyRandom::new(seed);
            for draw in case["draws"].as_array().unwrap() {
                let len = u32::try_from(draw["len"].as_u64().unwrap()).unwrap();
                let mut skipped = random.clone();
                let permutation = random.permutation(len);
                skipped.skip_permutation(len);
                let expected: Vec<u32> = serde_json::from_value(draw["first"].clone()).unwrap();
                assert_eq!(permutation[..expected.len()], expected, "seed {seed}, {len}");
                let weighed: u64 = permutation.iter().enumerate().map(|(at, item)| (at as u64 + 1) * u64::from(*item)).sum();
                assert_eq!(weighed, draw["weighed_sum"].as_u64().unwrap(), "seed {seed}, {len}");
                assert_eq!(random.0, skipped.0);
            }
        }
    }

    #[test]
    fn nothing_and_one_draw_nothing() {
        let mut random = NumpyRandom::new(5);
        assert_eq!((random.permutation(0), random.permutation(1)), (vec![], vec![0]));
        assert_eq!(random.0, NumpyRandom::new(5).0);
    }
}

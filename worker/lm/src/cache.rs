//! Keys and values of one sequence in one layer.

use crate::{error::LmError, ffi};
use mlx_rs::{Array, ops};

/// Caches grow by this many tokens, so that most steps write into room that is there and the allocator sees few sizes.
const GROWTH: i32 = 256;

/// Keys and values `[1, kv_heads, capacity, head_dim]`, of which the first `length` tokens are filled.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    buffers: Option<(Array, Array)>,
    length: i32,
}

impl KvCache {
    /// Tokens held.
    pub fn length(&self) -> i32 {
        self.length
    }

    /// Appends `keys` and `values` `[1, kv_heads, n, head_dim]` and gives back the last `visible` tokens of all that are held
    /// (all of them when there are fewer).
    pub fn append(&mut self, keys: &Array, values: &Array, visible: Option<i32>) -> Result<(Array, Array), LmError> {
        let n = keys.dim(2);
        let (old_keys, old_values) = match self.buffers.take() {
            Some((old_keys, old_values)) => (self.grow(old_keys, n)?, self.grow(old_values, n)?),
            None => (room(keys, n)?, room(values, n)?),
        };
        let end = self.length + n;
        let write =
            |buffer: &Array, new: &Array| ffi::slice_update(buffer, new, &[0, 0, self.length, 0], &[1, new.dim(1), end, new.dim(3)]);
        let (new_keys, new_values) = (write(&old_keys, keys)?, write(&old_values, values)?);
        let start = visible.map_or(0, |visible| (end - visible).max(0));
        let read = |buffer: &Array| ffi::slice(buffer, &[0, 0, start, 0], &[1, buffer.dim(1), end, buffer.dim(3)]);
        let filled = (read(&new_keys)?, read(&new_values)?);
        self.buffers = Some((new_keys, new_values));
        self.length = end;
        Ok(filled)
    }

    fn grow(&self, buffer: Array, n: i32) -> Result<Array, LmError> {
        if self.length + n <= buffer.dim(2) {
            return Ok(buffer);
        }
        let filled = ffi::slice(&buffer, &[0, 0, 0, 0], &[1, buffer.dim(1), self.length, buffer.dim(3)])?;
        let wanted = (self.length + n + GROWTH - 1) / GROWTH * GROWTH;
        let added = ops::zeros_dtype(&[1, buffer.dim(1), wanted - self.length, buffer.dim(3)], buffer.dtype())?;
        Ok(ops::concatenate(&[filled, added], 2)?)
    }

    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.buffers.iter().flat_map(|(keys, values)| [keys, values])
    }
}

fn room(like: &Array, n: i32) -> Result<Array, LmError> {
    let capacity = (n + GROWTH - 1) / GROWTH * GROWTH;
    Ok(ops::zeros_dtype(&[1, like.dim(1), capacity, like.dim(3)], like.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(from: i32, n: i32) -> Array {
        let values: Vec<f32> = (from..from + n).map(|value| value as f32).collect();
        Array::from_slice(&values, &[1, 1, n, 1])
    }

    #[test]
    fn what_was_appended_comes_back_in_order_across_growth() {
        let mut cache = KvCache::default();
        let mut length = 0;
        for n in [3, 1, 255, 300, 1] {
            let (keys, values) = cache.append(&tokens(length, n), &tokens(1000 + length, n), None).expect("appended");
            length += n;
            let expected: Vec<f32> = (0..length).map(|value| value as f32).collect();
            assert_eq!(keys.to_vec_exact::<f32>().expect("floats"), expected);
            assert_eq!(values.to_vec_exact::<f32>().expect("floats")[0], 1000.0);
            assert_eq!(cache.length(), length);
        }
        let (keys, _) = cache.append(&tokens(length, 1), &tokens(length, 1), Some(4)).expect("appended");
        assert_eq!(keys.to_vec_exact::<f32>().expect("floats"), [557.0, 558.0, 559.0, 560.0]);
    }
}

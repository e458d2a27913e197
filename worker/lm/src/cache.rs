//! What one sequence leaves behind in one layer: keys and values that grow with it, or a state of fixed size.

use crate::{error::LmError, ffi};
use mlx_rs::{Array, ops};

/// Caches grow by this many tokens, so that most steps write into room that is there and the allocator sees few sizes.
const GROWTH: i32 = 256;

/// A layer's memory of one sequence.
#[derive(Debug, Clone)]
pub enum Cache {
    Attention(KvCache),
    Recurrent(RecurrentState),
    /// Of mixers side by side, and of attention that keeps more than one kind of key.
    Several(Vec<Cache>),
}

impl Cache {
    pub fn arrays(&self) -> Vec<&Array> {
        match self {
            Cache::Attention(cache) => cache.arrays().collect(),
            Cache::Recurrent(state) => state.arrays.iter().collect(),
            Cache::Several(caches) => caches.iter().flat_map(Cache::arrays).collect(),
        }
    }

    /// Whether the last `n` tokens can be taken back: states of fixed size have forgotten what was before, and so has a window that moved on.
    pub fn can_trim(&self, n: i32) -> bool {
        match self {
            Cache::Attention(cache) => cache.can_trim(n),
            Cache::Recurrent(state) => n == 0 || state.arrays.is_empty(),
            Cache::Several(caches) => caches.iter().all(|cache| cache.can_trim(n)),
        }
    }

    /// Takes back the last `n` tokens; false, and nothing happens, where that is impossible.
    #[must_use]
    pub fn trim(&mut self, n: i32) -> bool {
        if !self.can_trim(n) {
            return false;
        }
        match self {
            Cache::Attention(cache) => cache.end -= n,
            Cache::Recurrent(_) => {}
            Cache::Several(caches) => caches.iter_mut().for_each(|cache| {
                // Cannot fail: asked above.
                let _ = cache.trim(n);
            }),
        }
        true
    }
}

/// The state of a recurrence; empty before the first token.
#[derive(Debug, Clone, Default)]
pub struct RecurrentState {
    pub arrays: Vec<Array>,
}

/// Keys `[1, kv_heads, capacity, key_dim]` and values `[1, kv_heads, capacity, value_dim]` of consecutive tokens, or any other number of
/// arrays `[1, heads, capacity, dim]` that grow together.
///
/// With a window, tokens that no later one sees are dropped when room is needed: what is held stays in the order of time and below
/// `window + GROWTH` tokens plus those of one step.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    /// None before the first token.
    buffers: Vec<Array>,
    /// Position of the first token held.
    start: i32,
    /// Position after the last token held.
    end: i32,
    /// How many tokens each token sees, itself included.
    window: Option<i32>,
}

impl KvCache {
    pub fn with_window(window: Option<i32>) -> Self {
        Self { window, ..Self::default() }
    }

    /// Tokens that were appended and not taken back.
    pub fn length(&self) -> i32 {
        self.end
    }

    /// Appends `keys` and `values` `[1, kv_heads, n, dim]` and gives back those that the new tokens see.
    pub fn append(&mut self, keys: &Array, values: &Array) -> Result<(Array, Array), LmError> {
        let [keys, values] = self.append_all([keys, values])?;
        Ok((keys, values))
    }

    /// The same for as many arrays `[1, heads, n, dim]` as the cache has held from its first token on.
    pub fn append_all<const N: usize>(&mut self, new: [&Array; N]) -> Result<[Array; N], LmError> {
        let n = new.first().map_or(0, |array| array.dim(2));
        let old = match std::mem::take(&mut self.buffers) {
            buffers if buffers.is_empty() => new.iter().map(|array| room(array, n)).collect::<Result<_, _>>()?,
            buffers => self.make_room(buffers, n)?,
        };
        if old.len() != N {
            return Err(LmError::Mlx(format!("a cache of {} arrays was given {N}", old.len())));
        }
        let (from, to) = (self.end - self.start, self.end - self.start + n);
        let write = |(buffer, new): (Array, &Array)| ffi::slice_update(&buffer, new, &[0, 0, from, 0], &[1, new.dim(1), to, new.dim(3)]);
        self.buffers = old.into_iter().zip(new).map(write).collect::<Result<_, _>>()?;
        self.end += n;
        self.visible_arrays(n)
    }

    /// Keys and values that the last `n` tokens see.
    pub fn visible(&self, n: i32) -> Result<(Array, Array), LmError> {
        let [keys, values] = self.visible_arrays(n)?;
        Ok((keys, values))
    }

    /// What the last `n` tokens see of each of the cache's arrays.
    pub fn visible_arrays<const N: usize>(&self, n: i32) -> Result<[Array; N], LmError> {
        let first = self.window.map_or(self.start, |window| (self.end - n - window + 1).max(self.start));
        let (from, to) = (first - self.start, self.end - self.start);
        let read = |buffer: &Array| ffi::slice(buffer, &[0, 0, from, 0], &[1, buffer.dim(1), to, buffer.dim(3)]);
        let seen: Vec<Array> = self.buffers.iter().map(read).collect::<Result<_, _>>()?;
        <[Array; N]>::try_from(seen).map_err(|seen| LmError::Mlx(format!("a cache of {} arrays was asked for {N}", seen.len())))
    }

    /// Room for `n` more tokens: behind a window, by letting go of what nobody sees any more; else by growing.
    fn make_room(&mut self, buffers: Vec<Array>, n: i32) -> Result<Vec<Array>, LmError> {
        let held = self.end - self.start;
        if buffers.first().is_some_and(|buffer| held + n <= buffer.dim(2)) {
            return Ok(buffers);
        }
        let kept = self.window.map_or(held, |window| held.min(window - 1));
        let capacity = (kept + n + GROWTH - 1) / GROWTH * GROWTH;
        self.start = self.end - kept;
        let moved = |buffer: Array| {
            let filled = ffi::slice(&buffer, &[0, 0, held - kept, 0], &[1, buffer.dim(1), held, buffer.dim(3)])?;
            let added = ops::zeros_dtype(&[1, buffer.dim(1), capacity - kept, buffer.dim(3)], buffer.dtype())?;
            Ok::<Array, LmError>(ops::concatenate(&[filled, added], 2)?)
        };
        buffers.into_iter().map(moved).collect()
    }

    fn can_trim(&self, n: i32) -> bool {
        // The first token after the cut must still find its whole window.
        let needed = self.window.map_or(0, |window| (self.end - n - window + 1).max(0));
        n >= 0 && n <= self.end && self.start <= needed
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.buffers.iter()
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

    fn numbers(array: &Array) -> Vec<f32> {
        array.to_vec_exact::<f32>().expect("floats")
    }

    fn range(from: i32, to: i32) -> Vec<f32> {
        (from..to).map(|value| value as f32).collect()
    }

    #[test]
    fn what_was_appended_comes_back_in_order_across_growth() {
        let mut cache = KvCache::default();
        let mut length = 0;
        for n in [3, 1, 255, 300, 1] {
            let (keys, values) = cache.append(&tokens(length, n), &tokens(1000 + length, n)).expect("appended");
            length += n;
            assert_eq!(numbers(&keys), range(0, length));
            assert_eq!(numbers(&values)[0], 1000.0);
            assert_eq!(cache.length(), length);
        }
    }

    #[test]
    fn a_window_sees_its_tokens_and_forgets_the_rest() {
        let mut cache = KvCache::with_window(Some(4));
        let mut length = 0;
        for n in [3, 1, 255, 300, 1, 1, 700, 2] {
            let (keys, _) = cache.append(&tokens(length, n), &tokens(length, n)).expect("appended");
            assert_eq!(numbers(&keys), range((length - 3).max(0), length + n), "{n} tokens at {length}");
            length += n;
        }
        assert!(cache.arrays().all(|buffer| buffer.dim(2) <= 1024));
    }

    #[test]
    fn tokens_are_taken_back_where_nothing_was_forgotten() {
        let mut cache = Cache::Attention(KvCache::with_window(Some(4)));
        let append = |cache: &mut Cache, from: i32, n: i32| match cache {
            Cache::Attention(cache) => numbers(&cache.append(&tokens(from, n), &tokens(from, n)).expect("appended").0),
            _ => Vec::new(),
        };
        append(&mut cache, 0, 200);
        assert!(cache.trim(5));
        assert_eq!(append(&mut cache, 195, 1), range(192, 196));
        append(&mut cache, 196, 400);
        assert!(cache.trim(390));
        assert!(!cache.trim(200), "the window before it is gone");
        assert!(!Cache::Recurrent(RecurrentState { arrays: vec![tokens(0, 1)] }).trim(1));
    }
}

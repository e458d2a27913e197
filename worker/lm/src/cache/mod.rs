//! What one sequence leaves behind in one layer: keys and values that grow with it, or a state of fixed size.

mod kv;
mod limited;
mod rows;
mod sliding;

pub use kv::{KvCache, Reach, Seen, Window};

use crate::error::LmError;
use mlx_rs::Array;

/// A layer's memory of one sequence.
#[derive(Debug, Clone)]
pub enum Cache {
    Attention(KvCache),
    Recurrent(RecurrentState),
    /// Of mixers side by side.
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

    /// The same for what is read once, as in training: holds what comes first as it is, without room for more.
    pub fn exact(mut self) -> Self {
        match &mut self {
            Cache::Attention(cache) => cache.make_exact(),
            Cache::Recurrent(_) => {}
            Cache::Several(caches) => caches.iter_mut().for_each(|cache| *cache = std::mem::take(cache).exact()),
        }
        self
    }

    /// Whether the last `n` tokens can be taken back: states of fixed size have forgotten what was before, and so has a window that moved on
    /// and what was quantised since.
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
            Cache::Attention(cache) => cache.trim(n),
            Cache::Recurrent(_) => {}
            Cache::Several(caches) => caches.iter_mut().for_each(|cache| {
                // Cannot fail: asked above.
                let _ = cache.trim(n);
            }),
        }
        true
    }
}

impl Default for Cache {
    fn default() -> Self {
        Cache::Several(Vec::new())
    }
}

/// The state of a recurrence; empty before the first token.
#[derive(Debug, Clone, Default)]
pub struct RecurrentState {
    pub arrays: Vec<Array>,
}

fn unwritten() -> LmError {
    LmError::Mlx("a cache was read before anything was written".into())
}

#[cfg(test)]
mod tests;

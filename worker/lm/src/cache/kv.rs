//! Keys and values of one sequence in one layer: how they are kept, and what new tokens see of them.

use super::{limited::Limited, rows::Rows, sliding::Sliding};
use crate::{error::LmError, linear::Matrix};
use mlx_cluster_common::{
    cache::{CacheOptions, KEPT_TOKENS},
    spec::QuantizationScheme,
};
use mlx_rs::Array;

/// Keys `[1, kv_heads, tokens, key_dim]` and values `[1, kv_heads, tokens, value_dim]`, or any number of arrays that grow together.
#[derive(Debug, Clone)]
pub struct KvCache {
    history: History,
    quantization: Option<Quantization>,
    /// As long as it is the latest append that crossed the start of quantisation: what its tokens before the start see.
    before: Option<Box<History>>,
}

#[derive(Debug, Clone, Copy)]
struct Quantization {
    scheme: QuantizationScheme,
    /// Tokens from this position on see everything quantised.
    start: i32,
}

#[derive(Debug, Clone)]
enum History {
    Sliding(Sliding),
    Limited(Limited),
}

/// The first `kept` tokens and the last `recent`, itself included, are what a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub kept: i32,
    pub recent: i32,
}

/// Which of the tokens held each of the last `n` sees, besides coming after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    pub n: i32,
    pub held: i32,
    pub window: Option<Window>,
}

/// What the last `n` tokens see, or some of them where others see something else.
#[derive(Debug, Clone)]
pub struct Seen {
    n: i32,
    window: Option<Window>,
    rows: Rows,
}

impl Window {
    pub fn size(&self) -> i32 {
        self.kept + self.recent
    }
}

impl Reach {
    /// Whether a token sees all that comes before it.
    pub fn is_whole(&self) -> bool {
        self.n == 1 || self.window.is_none_or(|window| self.held <= window.size())
    }
}

impl Seen {
    pub(super) fn new(n: i32, rows: Rows, window: Option<Window>) -> Self {
        Self { n, window, rows }
    }

    pub fn reach(&self) -> Reach {
        Reach { n: self.n, held: self.rows.capacity(), window: self.window }
    }

    /// The arrays of a cache that keeps them as they are.
    fn arrays<const N: usize>(&self) -> Result<[Array; N], LmError> {
        match <[Array; N]>::try_from(self.rows.arrays().to_vec()) {
            Ok(arrays) if self.rows.is_plain() => Ok(arrays),
            _ => Err(LmError::Mlx(format!("a cache of {N} arrays holds others"))),
        }
    }

    /// Keys and values as they are; None when they are quantised.
    pub fn plain(&self) -> Option<(&Array, &Array)> {
        match self.rows.arrays() {
            [keys, values] if self.rows.is_plain() => Some((keys, values)),
            _ => None,
        }
    }

    /// Keys and values as operands of matrix products, `[1, kv_heads, 1, held, dim]`.
    pub fn matrices(&self) -> Result<(Matrix, Matrix), LmError> {
        let mut matrices = self.rows.matrices()?.into_iter();
        match (matrices.next(), matrices.next(), matrices.next()) {
            (Some(keys), Some(values), None) => Ok((keys, values)),
            _ => Err(LmError::Mlx("a cache of other arrays than keys and values".into())),
        }
    }

    pub fn kv_heads(&self) -> i32 {
        self.rows.arrays().first().map_or(0, |array| array.dim(1))
    }
}

impl Default for KvCache {
    fn default() -> Self {
        Self::with_window(None)
    }
}

impl KvCache {
    /// With arrays as they are, in the order of time.
    pub fn with_window(window: Option<i32>) -> Self {
        Self { history: History::Sliding(Sliding::new(window)), quantization: None, before: None }
    }

    /// For attention with this window.
    pub fn new(window: Option<i32>, options: &CacheOptions) -> Self {
        let quantization = options
            .quantization
            .map(|quantization| Quantization { scheme: quantization.scheme(), start: limit(quantization.start()).max(1) });
        let (kept, plain) = (KEPT_TOKENS as i32, Self::with_window(window));
        match (window, options.max_kv_size) {
            (None, Some(size)) => {
                let window = Window { kept, recent: limit(size) - kept };
                Self { history: History::Limited(Limited::new(window)), quantization, before: None }
            }
            _ => Self { quantization, ..plain },
        }
    }

    /// Holds what comes first as it is, without room for more.
    pub(super) fn make_exact(&mut self) {
        if let History::Sliding(sliding) = &mut self.history {
            sliding.is_exact = true;
        }
    }

    /// Tokens that were appended and not taken back.
    pub fn length(&self) -> i32 {
        self.history.end()
    }

    /// Appends arrays `[1, heads, n, dim]`, as many as were appended before.
    pub fn extend(&mut self, new: &[&Array]) -> Result<(), LmError> {
        self.before = None;
        let new = Rows::plain(new);
        let Some(Quantization { scheme, start }) = self.quantization else {
            return self.history.append(&new);
        };
        let n = new.capacity();
        match (start - self.length()).clamp(0, n) {
            plain if plain == n => self.history.append(&new),
            0 => {
                self.history.quantise(scheme)?;
                self.history.append(&new.quantised(scheme)?)
            }
            plain => {
                self.history.append(&new.slice(0, plain)?)?;
                self.before = Some(Box::new(self.history.clone()));
                self.history.quantise(scheme)?;
                self.history.append(&new.slice(plain, n)?.quantised(scheme)?)
            }
        }
    }

    /// What the last `n` tokens see, `n` being 1 or as many as were appended last: the whole for all of them, or first for those before the
    /// start of quantisation.
    pub fn seen(&self, n: i32) -> Result<Vec<Seen>, LmError> {
        let late = match &self.before {
            Some(before) => self.length() - before.end(),
            None => n,
        };
        match &self.before {
            Some(before) if late < n => Ok(vec![before.seen(n - late)?, self.history.seen(late)?]),
            _ => Ok(vec![self.history.seen(n)?]),
        }
    }

    /// The same of a cache that keeps arrays as they are.
    pub fn seen_arrays<const N: usize>(&self, n: i32) -> Result<([Array; N], Reach), LmError> {
        let seen = self.history.seen(n)?;
        Ok((seen.arrays()?, seen.reach()))
    }

    /// Whether the last `n` tokens can be taken back: all of them always; else not what a window has moved past, nor to before the start of
    /// quantisation, where tokens would have to see what is no more.
    pub(super) fn can_trim(&self, n: i32) -> bool {
        let is_plain = self.history.rows().is_none_or(Rows::is_plain);
        let stays_behind = self.quantization.is_none_or(|quantization| self.length() - n >= quantization.start);
        n == self.length() || (0..self.length()).contains(&n) && (is_plain || stays_behind) && self.history.can_trim(n)
    }

    pub(super) fn trim(&mut self, n: i32) {
        self.before = None;
        match n == self.length() {
            true => self.history.clear(),
            false => self.history.trim(n),
        }
    }

    pub(super) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.history.rows().into_iter().flat_map(Rows::arrays)
    }
}

impl History {
    fn end(&self) -> i32 {
        match self {
            Self::Sliding(sliding) => sliding.end,
            Self::Limited(limited) => limited.end,
        }
    }

    fn append(&mut self, new: &Rows) -> Result<(), LmError> {
        match self {
            Self::Sliding(sliding) => sliding.append(new),
            Self::Limited(limited) => limited.append(new),
        }
    }

    fn seen(&self, n: i32) -> Result<Seen, LmError> {
        match self {
            Self::Sliding(sliding) => sliding.seen(n),
            Self::Limited(limited) => limited.seen(n),
        }
    }

    fn can_trim(&self, n: i32) -> bool {
        match self {
            Self::Sliding(sliding) => sliding.can_trim(n),
            Self::Limited(limited) => limited.can_trim(n),
        }
    }

    fn trim(&mut self, n: i32) {
        match self {
            Self::Sliding(sliding) => sliding.trim(n),
            Self::Limited(limited) => limited.trim(n),
        }
    }

    fn clear(&mut self) {
        *self = match self {
            Self::Sliding(sliding) => Self::Sliding(Sliding::new(sliding.window)),
            Self::Limited(limited) => Self::Limited(Limited::new(limited.window)),
        };
    }

    /// Everything held, if it is not yet.
    fn quantise(&mut self, scheme: QuantizationScheme) -> Result<(), LmError> {
        let rows = match self {
            Self::Sliding(sliding) => &mut sliding.rows,
            Self::Limited(limited) => &mut limited.rows,
        };
        if let Some(rows) = rows.as_mut().filter(|rows| rows.is_plain()) {
            *rows = rows.quantised(scheme)?;
        }
        Ok(())
    }

    fn rows(&self) -> Option<&Rows> {
        match self {
            Self::Sliding(sliding) => sliding.rows.as_ref(),
            Self::Limited(limited) => limited.rows.as_ref(),
        }
    }
}

/// Positions are counted in i32, with room for sums.
fn limit(tokens: u32) -> i32 {
    tokens.min(i32::MAX as u32 / 2) as i32
}

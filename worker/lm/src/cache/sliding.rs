//! A cache that grows with its sequence, and with a window drops what lies behind it.

use super::{
    Seen, Window,
    rows::{Rows, rounded},
};
use crate::error::LmError;

/// Consecutive tokens in the order of time. With a window, tokens that no later one sees are dropped when room is needed: what is held stays
/// below `window` tokens, those of one step and one step of growth.
#[derive(Debug, Clone, Default)]
pub(super) struct Sliding {
    pub(super) rows: Option<Rows>,
    /// Position of the first token held.
    start: i32,
    /// Position after the last token held.
    pub(super) end: i32,
    /// How many tokens each token sees, itself included.
    pub(super) window: Option<i32>,
    /// What comes first is held as it is, without room for more: for what is read once, as in training.
    pub(super) is_exact: bool,
}

impl Sliding {
    pub(super) fn new(window: Option<i32>) -> Self {
        Self { window, ..Self::default() }
    }

    pub(super) fn append(&mut self, new: &Rows) -> Result<(), LmError> {
        let n = new.capacity();
        let rows = match self.rows.take() {
            Some(rows) => self.make_room(rows, n)?,
            None if self.is_exact => {
                (self.rows, self.end) = (Some(new.clone()), self.end + n);
                return Ok(());
            }
            None => new.room(rounded(n))?,
        };
        self.rows = Some(rows.write(new, self.end - self.start)?);
        self.end += n;
        Ok(())
    }

    /// What the last `n` tokens see.
    pub(super) fn seen(&self, n: i32) -> Result<Seen, LmError> {
        let rows = self.rows.as_ref().ok_or_else(super::unwritten)?;
        let first = self.window.map_or(self.start, |window| (self.end - n - window + 1).max(self.start));
        let rows = rows.slice(first - self.start, self.end - self.start)?;
        Ok(Seen::new(n, rows, self.window.map(|recent| Window { kept: 0, recent })))
    }

    /// Room for `n` more tokens: behind a window, by letting go of what nobody sees any more; else by growing.
    fn make_room(&mut self, rows: Rows, n: i32) -> Result<Rows, LmError> {
        let held = self.end - self.start;
        if held + n <= rows.capacity() {
            return Ok(rows);
        }
        let kept = self.window.map_or(held, |window| held.min(window - 1));
        self.start = self.end - kept;
        rows.moved(held - kept, held, rounded(kept + n))
    }

    pub(super) fn can_trim(&self, n: i32) -> bool {
        // The first token after the cut must still find its whole window.
        let needed = self.window.map_or(0, |window| (self.end - n - window + 1).max(0));
        self.start <= needed
    }

    pub(super) fn trim(&mut self, n: i32) {
        self.end -= n;
    }
}

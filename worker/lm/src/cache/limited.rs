//! A cache of limited size: the first tokens of a sequence stay, of the others the most recent ones.

use super::{
    Seen, Window,
    rows::{Rows, rounded},
};
use crate::error::LmError;

/// A token sees the first `kept` tokens and the last `recent`, itself included, however the prompt was cut; so does mlx-lm's
/// `RotatingKVCache` for single tokens. (Its longer chunks see other tokens: a first chunk not the kept ones, a later one not all of them.)
///
/// Tokens that come one by one take the place of the oldest, so the recent ones stand rotated; the order means nothing to a single query,
/// and keys carry their positions. Several at once are put behind the others in the order of time, and stay until the next token comes.
#[derive(Debug, Clone)]
pub(super) struct Limited {
    pub(super) rows: Option<Rows>,
    pub(super) window: Window,
    /// Tokens so far.
    pub(super) end: i32,
    /// Tokens in the buffers: the kept ones, then others.
    held: i32,
    /// Where the oldest of the others stands among them; 0 when they are in the order of time.
    oldest: i32,
}

impl Limited {
    pub(super) fn new(window: Window) -> Self {
        Self { rows: None, window, end: 0, held: 0, oldest: 0 }
    }

    pub(super) fn append(&mut self, new: &Rows) -> Result<(), LmError> {
        let n = new.capacity();
        match self.rows.take() {
            None if n > self.window.size() => {
                self.rows = Some(new.clone());
                self.held = n;
            }
            None => {
                let room = new.room(rounded(n).min(self.window.size()))?;
                self.put_behind(room, new)?;
            }
            Some(rows) if self.held + n <= self.window.size() => {
                let (held, capacity) = (self.held, rounded(self.held + n).min(self.window.size()));
                let rows = if held + n <= rows.capacity() { rows } else { rows.moved(0, held, capacity)? };
                self.put_behind(rows, new)?;
            }
            Some(rows) if n == 1 => self.replace_oldest(rows, new)?,
            Some(rows) => {
                let mut parts = self.cut(&rows, self.window.recent - 1)?;
                parts.push(new.clone());
                let joined = Rows::joined(&parts)?;
                self.held = joined.capacity();
                self.oldest = 0;
                self.rows = Some(joined);
            }
        }
        self.end += n;
        Ok(())
    }

    fn put_behind(&mut self, rows: Rows, new: &Rows) -> Result<(), LmError> {
        self.rows = Some(rows.write(new, self.held)?);
        self.held += new.capacity();
        Ok(())
    }

    fn replace_oldest(&mut self, rows: Rows, new: &Rows) -> Result<(), LmError> {
        let Window { kept, recent } = self.window;
        let rows = if self.held > self.window.size() { Rows::joined(&self.cut(&rows, recent)?)? } else { rows };
        self.held = self.window.size();
        self.rows = Some(rows.write(new, kept + self.oldest)?);
        self.oldest = (self.oldest + 1) % recent;
        Ok(())
    }

    /// What the last `n` tokens see: of several, those of the latest append.
    pub(super) fn seen(&self, n: i32) -> Result<Seen, LmError> {
        let rows = self.rows.as_ref().ok_or_else(super::unwritten)?;
        if n > 1 && self.oldest > 0 {
            return Err(LmError::Mlx(format!("{n} tokens were asked for of a cache that was given one")));
        }
        let rows = match n {
            1 if self.held > self.window.size() => Rows::joined(&self.cut(rows, self.window.recent)?)?,
            _ => rows.slice(0, self.held)?,
        };
        Ok(Seen::new(n, rows, Some(self.window)))
    }

    /// The kept tokens, and the last `recent` others in the order of time.
    fn cut(&self, rows: &Rows, recent: i32) -> Result<Vec<Rows>, LmError> {
        let kept = self.window.kept.min(self.held);
        let dropped = (self.held - kept - recent).max(0);
        let turn = kept + self.oldest;
        // In the order of time: from the oldest to the end of the buffers, then from the kept ones to the oldest.
        let first = (turn + dropped, self.held);
        let second = (kept + (dropped - (self.held - turn)).max(0), turn);
        let parts = [(0, kept), first, second].into_iter().filter(|(from, to)| from < to);
        parts.map(|(from, to)| rows.slice(from, to)).collect()
    }

    pub(super) fn can_trim(&self, n: i32) -> bool {
        // Places that were taken twice have forgotten who was there first.
        let all_there = self.held == self.end;
        self.oldest == 0 && (all_there || n <= self.held - self.window.size() + 1)
    }

    pub(super) fn trim(&mut self, n: i32) {
        self.end -= n;
        self.held -= n;
    }
}

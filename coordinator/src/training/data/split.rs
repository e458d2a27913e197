//! Expressions such as `train[:80%]` that name parts of a data set, with the meaning that Python's `datasets` gives them
//! (`datasets/arrow_reader.py`, `ReadInstruction`).

use std::ops::Range;

/// Why an expression names no part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{expression}` names no split ({reason}): write train, train[:80%], train[-10%:], train[100:200] or train+test")]
pub struct SplitError {
    pub expression: String,
    pub reason: &'static str,
}

/// A part of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) split: String,
    pub(super) from: Option<i64>,
    pub(super) to: Option<i64>,
    pub(super) percent: bool,
}

/// Parts of splits, in the order in which their rows follow each other.
pub(super) fn parse(expression: &str) -> Result<Vec<Slice>, SplitError> {
    let refused = |reason| SplitError { expression: expression.chars().take(80).collect(), reason };
    expression.split('+').map(|part| slice(part.trim()).map_err(refused)).collect()
}

fn slice(text: &str) -> Result<Slice, &'static str> {
    let (split, bounds) = match text.split_once('[') {
        None => (text, None),
        Some((split, rest)) => (split, Some(rest.strip_suffix(']').ok_or("the `]` at the end is missing")?)),
    };
    let is_word = |word: &str| !word.is_empty() && word.chars().all(|char| char.is_ascii_alphanumeric() || char == '_');
    if !split.split('.').all(is_word) {
        return Err("a split's name consists of letters, digits, `_` and `.`");
    }
    let split = split.to_owned();
    let Some(bounds) = bounds else { return Ok(Slice { split, from: None, to: None, percent: false }) };
    let (from, to) = bounds.split_once(':').ok_or("the `:` between the brackets is missing")?;
    let ((from, from_percent), (to, to_percent)) = (bound(from)?, bound(to)?);
    let percent = from_percent || to_percent;
    if percent && [from, to].into_iter().flatten().any(|bound| bound.unsigned_abs() > 100) {
        return Err("it has more than 100%");
    }
    Ok(Slice { split, from, to, percent })
}

fn bound(text: &str) -> Result<(Option<i64>, bool), &'static str> {
    let (number, percent) = text.strip_suffix('%').map_or((text, false), |number| (number, true));
    if number.is_empty() && !percent {
        return Ok((None, false));
    }
    let number: i64 = number.replace('_', "").parse().map_err(|_| "a bound is a whole number, or one with `%`")?;
    Ok((Some(number), percent))
}

impl Slice {
    /// Of a split with `rows` rows.
    pub(super) fn of(&self, rows: u64) -> Range<u64> {
        let count = i64::try_from(rows).unwrap_or(i64::MAX);
        let place = |bound: Option<i64>, otherwise: i64| {
            let place = match bound {
                None => otherwise,
                // As Python's `round`, halves to the even neighbour.
                Some(bound) if self.percent => ((bound as f64) * (count as f64) / 100.0).round_ties_even() as i64,
                Some(bound) => bound,
            };
            let from_start = if place < 0 { place.saturating_add(count).max(0) } else { place };
            from_start.min(count) as u64
        };
        place(self.from, 0)..place(self.to, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(expression: &str, rows: u64) -> Vec<(String, Range<u64>)> {
        parse(expression).unwrap().into_iter().map(|slice| (slice.split.clone(), slice.of(rows))).collect()
    }

    #[test]
    fn slices_are_those_of_datasets() {
        let one = |expression: &str, rows| of(expression, rows)[0].1.clone();
        assert_eq!(of("train", 10), [("train".to_owned(), 0..10)]);
        assert_eq!(one("train[:80%]", 10), 0..8);
        assert_eq!(one("train[-10%:]", 10), 9..10);
        assert_eq!(one("train[-10%:]", 25), 23..25);
        assert_eq!(one("train[:50%]", 5), 0..2);
        assert_eq!(one("train[:50%]", 7), 0..4);
        assert_eq!(one("train[100:200]", 150), 100..150);
        assert_eq!(one("train[-3:-1]", 10), 7..9);
        assert_eq!(one("train[-30:]", 10), 0..10);
        assert_eq!(one("train[1_0:]", 12), 10..12);
        assert_eq!(one("train[:]", 4), 0..4);
        assert!(one("train[8:2]", 10).is_empty());
        assert_eq!(of("train[:1] + test.clean[1:]", 3), [("train".to_owned(), 0..1), ("test.clean".to_owned(), 1..3)]);
    }

    #[test]
    fn other_expressions_are_refused() {
        for expression in [
            "",
            "train[",
            "train[1]",
            "train[a:]",
            "train[:101%]",
            "train[-9223372036854775808%:]",
            "../x",
            "train[:%]",
            "train+",
            "train[:1](closest)",
        ] {
            let error = parse(expression).unwrap_err();
            assert!(error.to_string().starts_with(&format!("`{expression}` names no split")), "{error}");
        }
    }
}

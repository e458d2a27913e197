//! Typed reading of one mapping of a config. As in mlx-lm, a key whose value is null is a key that is not there.

use super::error::TrainingConfigError as Error;
use crate::nearest::near;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// A mapping, and where it stands in the config.
pub(super) struct Table<'a> {
    /// Empty for the config itself, else such as `lora_parameters.`
    prefix: String,
    map: &'a Map<String, Value>,
}

/// Which numbers are allowed.
#[derive(Clone, Copy)]
pub(super) enum Numbers {
    Any,
    /// From 0.
    NotNegative,
    /// Above 0.
    Positive,
    /// From 0 to below 1.
    Fraction,
}

impl<'a> Table<'a> {
    pub(super) fn root(map: &'a Map<String, Value>) -> Self {
        Self { prefix: String::new(), map }
    }

    /// `key` is the full path of `value`.
    pub(super) fn of(key: &str, value: &'a Value) -> Result<Self, Error> {
        match value.as_object() {
            Some(map) => Ok(Self { prefix: format!("{key}."), map }),
            None => Err(Error::invalid(key.to_owned(), value, "a mapping of keys to values")),
        }
    }

    /// The full path of a key of this mapping.
    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Refuses keys that are not in `known`. `hint` may say more about a key than which known one is the nearest.
    pub(super) fn only(&self, known: &[&str], hint: fn(&str) -> Option<&'static str>) -> Result<(), Error> {
        match self.map.keys().find(|key| !known.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let hint = match (hint(key), near(key, known.iter().copied())) {
                    (Some(hint), _) => format!(": {hint}"),
                    (None, Some(nearest)) => format!("; the nearest is `{}`", self.path(nearest)),
                    (None, None) => String::new(),
                };
                Err(Error::UnknownKey { key: self.path(&key.chars().take(60).collect::<String>()), hint })
            }
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(Error::invalid(self.path(key), value, "true or false")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(Error::invalid(self.path(key), value, "a text")),
        }
    }

    /// A text with something in it.
    pub(super) fn name(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.text(key)? {
            Some("") => Err(Error::invalid(self.path(key), &Value::from(""), "a text that is not empty")),
            name => Ok(name),
        }
    }

    /// A whole number.
    pub(super) fn whole<T: TryFrom<i64>>(&self, key: &str, default: T, allowed: RangeInclusive<i64>) -> Result<T, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => whole(self.path(key), value, allowed),
        }
    }

    /// A whole number from 1, or None for -1, which means all.
    pub(super) fn whole_or_all<T: TryFrom<i64>>(&self, key: &str, default: T) -> Result<Option<T>, Error> {
        match self.get(key) {
            None => Ok(Some(default)),
            Some(value) if value.as_i64() == Some(-1) => Ok(None),
            Some(value) => whole(self.path(key), value, 1..=MOST)
                .map(Some)
                .map_err(|_| Error::invalid(self.path(key), value, format!("a whole number from 1 to {MOST}, or -1 for all"))),
        }
    }

    pub(super) fn number(&self, key: &str, default: f64, allowed: Numbers) -> Result<f64, Error> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => number(self.path(key), value, allowed),
        }
    }

    /// As [`Self::number`], in the precision in which MLX computes.
    pub(super) fn number_f32(&self, key: &str, default: f32, allowed: Numbers) -> Result<f32, Error> {
        Ok(self.number(key, f64::from(default), allowed)? as f32)
    }

    pub(super) fn pair(&self, key: &str, default: [f64; 2], allowed: Numbers) -> Result<[f64; 2], Error> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Array(items)) if items.len() == 2 => {
                let number = |i: usize| number(format!("{}[{i}]", self.path(key)), &items[i], allowed);
                Ok([number(0)?, number(1)?])
            }
            Some(value) => Err(Error::invalid(self.path(key), value, "a list of two numbers")),
        }
    }
}

/// No count of a config is higher.
pub(super) const MOST: i64 = u32::MAX as i64;

/// Python's `1e3` is a float: a number without fraction will do.
pub(super) fn whole<T: TryFrom<i64>>(key: String, value: &Value, allowed: RangeInclusive<i64>) -> Result<T, Error> {
    let of_float = || value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 1e15).map(|number| number as i64);
    let number = value.as_i64().or_else(of_float).filter(|number| allowed.contains(number));
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| Error::invalid(key, value, format!("a whole number from {} to {}", allowed.start(), allowed.end())))
}

pub(super) fn number(key: String, value: &Value, allowed: Numbers) -> Result<f64, Error> {
    let right = |number: &f64| {
        let in_range = match allowed {
            Numbers::Any => true,
            Numbers::NotNegative => *number >= 0.0,
            Numbers::Positive => *number > 0.0,
            Numbers::Fraction => (0.0..1.0).contains(number),
        };
        // What is computed with is an f32.
        in_range && number.abs() <= f64::from(f32::MAX)
    };
    value.as_f64().filter(right).ok_or_else(|| {
        let allowed = match allowed {
            Numbers::Any => "a number",
            Numbers::NotNegative => "a number from 0",
            Numbers::Positive => "a number above 0",
            Numbers::Fraction => "a number from 0 to below 1",
        };
        Error::invalid(key, value, allowed)
    })
}

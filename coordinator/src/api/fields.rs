//! A JSON object read field by field: wrong types and left-over fields are refused by name, and null is the same as absent.

use super::error::{ApiError, shown, shown_value};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// An object of which each field is taken once; [`Fields::finish`] refuses what nobody took.
#[derive(Debug)]
pub(super) struct Fields {
    /// Where the object stands, such as `messages[0].`; empty for the body itself.
    prefix: String,
    left: Map<String, Value>,
}

impl Fields {
    /// The body of a request.
    pub(super) fn of_body(body: Value) -> Result<Self, ApiError> {
        match body {
            Value::Object(left) => Ok(Self { prefix: String::new(), left }),
            other => Err(ApiError::WrongType { param: "body".into(), wanted: "a JSON object".into(), found: shown_value(&other) }),
        }
    }

    /// The object at `path`.
    pub(super) fn at(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(left) => Ok(Self { prefix: format!("{path}."), left }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The full name of a field of this object, as errors give it.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(super) fn value(&mut self, name: &str) -> Option<Value> {
        self.left.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(&self.path(name), "true or false", &other)),
        }
    }

    /// A number that an `f32` can hold.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<f32>, ApiError> {
        self.value(name).map(|value| as_f32(&self.path(name), &value)).transpose()
    }

    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        self.value(name).map(|value| as_integer(&self.path(name), &value, range)).transpose()
    }

    pub(super) fn list(&mut self, name: &str) -> Result<Option<Vec<Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong_type(&self.path(name), "a list", &other)),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(wrong_type(&self.path(name), "an object", &other)),
        }
    }

    pub(super) fn missing(&self, name: &str, hint: impl Into<String>) -> ApiError {
        ApiError::Missing { param: self.path(name), hint: hint.into() }
    }

    pub(super) fn unsupported(&self, name: &str, hint: impl Into<String>) -> ApiError {
        ApiError::Unsupported { param: self.path(name), hint: hint.into() }
    }

    /// Takes a field that changes nothing, whatever it says: a label for the client's own use.
    pub(super) fn label(&mut self, name: &str) {
        self.left.shift_remove(name);
    }

    /// Takes a field that is accepted with the one value that asks for nothing.
    pub(super) fn only(&mut self, name: &str, harmless: &[Value]) -> Result<(), ApiError> {
        match self.value(name) {
            None => Ok(()),
            Some(value) if harmless.contains(&value) => Ok(()),
            Some(value) => {
                let allowed: Vec<String> = harmless.iter().map(Value::to_string).collect();
                let found = match &value {
                    Value::Array(_) | Value::Object(_) => shown(&value.to_string()),
                    other => other.to_string(),
                };
                let hint =
                    if allowed.is_empty() { String::new() } else { format!(" with the value {found} (only {})", allowed.join(", ")) };
                Err(self.unsupported(name, hint))
            }
        }
    }

    /// Refuses the first field that is left; null asks for nothing.
    pub(super) fn finish(self) -> Result<(), ApiError> {
        match self.left.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::Unsupported { param: self.path(&shown(name)), hint: String::new() }),
        }
    }
}

pub(super) fn wrong_type(param: &str, wanted: &str, found: &Value) -> ApiError {
    ApiError::WrongType { param: param.into(), wanted: wanted.into(), found: shown_value(found) }
}

pub(super) fn out_of_range(param: &str, wanted: impl Into<String>, found: impl ToString) -> ApiError {
    ApiError::OutOfRange { param: param.into(), wanted: wanted.into(), found: found.to_string() }
}

pub(super) fn as_f32(param: &str, value: &Value) -> Result<f32, ApiError> {
    let Some(number) = value.as_f64() else { return Err(wrong_type(param, "a number", value)) };
    let narrow = number as f32;
    if narrow.is_finite() { Ok(narrow) } else { Err(out_of_range(param, "a number of common size", value)) }
}

pub(super) fn as_integer(param: &str, value: &Value, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let wanted = || match (*range.start(), *range.end()) {
        (i64::MIN, i64::MAX) => "a whole number of at most 64 bits".to_owned(),
        (start, end) => format!("a whole number from {start} to {end}"),
    };
    if !value.is_number() {
        return Err(wrong_type(param, &wanted(), value));
    }
    match value.as_i64() {
        Some(number) if range.contains(&number) => Ok(number),
        _ => Err(out_of_range(param, wanted(), value)),
    }
}

/// A token id of the vocabulary, from a list.
pub(super) fn as_token_id(path: &str, index: usize, value: &Value, vocab_size: u32) -> Result<u32, ApiError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|id| *id < vocab_size);
    let param = || format!("{path}[{index}]");
    let wanted = || format!("a token id from 0 to {}", vocab_size.saturating_sub(1));
    match id {
        Some(id) => Ok(id),
        None if value.is_number() => Err(out_of_range(&param(), wanted(), value)),
        None => Err(wrong_type(&param(), &wanted(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(body: Value) -> Fields {
        Fields::of_body(body).expect("an object")
    }

    #[test]
    fn what_nobody_took_is_refused_by_name() {
        let mut body = fields(json!({"a": 1, "b": null, "c": true}));
        assert_eq!(body.integer("a", 0..=2), Ok(Some(1)));
        assert_eq!(body.finish(), Err(ApiError::Unsupported { param: "c".into(), hint: String::new() }));
        assert_eq!(fields(json!({"b": null})).finish(), Ok(()));
    }

    #[test]
    fn wrong_types_and_ranges_name_the_field() {
        let message = |result: Result<(), ApiError>| result.expect_err("refused").to_string();
        let of = |value: Value| fields(json!({"x": value}));
        assert_eq!(message(of(json!("5")).integer("x", 1..=9).map(drop)), "`x` must be a whole number from 1 to 9, not the string \"5\"");
        assert_eq!(message(of(json!(1.5)).integer("x", 1..=9).map(drop)), "`x` must be a whole number from 1 to 9, not 1.5");
        assert_eq!(message(of(json!(1e18)).integer("x", 1..=9).map(drop)), "`x` must be a whole number from 1 to 9, not 1e+18");
        assert_eq!(message(of(json!(1e308)).number("x").map(drop)), "`x` must be a number of common size, not 1e+308");
        assert_eq!(message(of(json!([1])).bool("x").map(drop)), "`x` must be true or false, not a list of 1");
        assert_eq!(message(of(json!(7)).string("x").map(drop)), "`x` must be a string, not 7");
        assert_eq!(
            message(of(json!(7)).only("x", &[json!(1)])),
            "`x` is not supported with the value 7 (only 1); remove it from the request"
        );
        let inner = Fields::at("messages[2]", json!({"x": 1})).expect("an object");
        assert_eq!(message(inner.finish()), "`messages[2].x` is not supported; remove it from the request");
    }

    #[test]
    fn null_is_absent() {
        assert_eq!(fields(json!({"x": null})).string("x"), Ok(None));
        assert_eq!(fields(json!({"x": null})).only("x", &[json!(1)]), Ok(()));
    }
}

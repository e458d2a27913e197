//! JSON from outside, read strictly: no key twice, bounded in depth and in the number of values.

use super::error::ApiError;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::{cell::Cell, fmt};

pub(super) const DEPTH_MAX: usize = 64;

/// Values of any kind in one body; each takes some dozen bytes of memory however short it is written.
const VALUES_MAX: usize = 2_000_000;

const TOO_DEEP: &str = "too deep";

/// Reads a body. Names the line and column of the first fault.
pub(super) fn parse(body: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(body).map_err(|error| ApiError::NotUtf8 { offset: error.valid_up_to() })?;
    let values_left = Cell::new(VALUES_MAX);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Strict { depth_left: DEPTH_MAX, values_left: &values_left }.deserialize(&mut deserializer);
    value.and_then(|value| deserializer.end().map(|()| value)).map_err(|error| explain(error, text))
}

fn explain(error: serde_json::Error, text: &str) -> ApiError {
    let (line, column) = (error.line(), error.column());
    let full = error.to_string();
    let mut message = full.split(" at line ").next().unwrap_or(&full).to_owned();
    if message == TOO_DEEP {
        return ApiError::JsonTooDeep { max: DEPTH_MAX };
    }
    if text.trim().is_empty() {
        message = "it is empty".into();
    }
    let rest: String =
        text.lines().nth(line.saturating_sub(1)).unwrap_or_default().chars().skip(column.saturating_sub(2)).take(12).collect();
    if ["NaN", "nan", "Infinity", "inf"].iter().any(|word| rest.contains(word)) {
        message = format!("{message} (NaN and Infinity are not JSON numbers)");
    }
    ApiError::InvalidJson { message, line, column }
}

#[derive(Clone, Copy)]
struct Strict<'a> {
    depth_left: usize,
    values_left: &'a Cell<usize>,
}

impl Strict<'_> {
    fn inner<E: Error>(self) -> Result<Self, E> {
        match self.depth_left.checked_sub(1) {
            Some(depth_left) => Ok(Self { depth_left, ..self }),
            None => Err(E::custom(TOO_DEEP)),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.values_left.get().checked_sub(1);
        self.values_left.set(left.ok_or_else(|| D::Error::custom(format!("more than {VALUES_MAX} values")))?);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key `{}` is there twice", super::error::shown(&key))));
            }
            let value = entries.next_value_seed(inner)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn good_json_is_read_as_serde_json_does() {
        let text = r#"{"b": [1, -2, 0.5, 1e3, true, null], "a": {"": "\ud83d\ude00 \u0000"}}"#;
        assert_eq!(parse(text.as_bytes()), Ok(serde_json::from_str(text).expect("good")));
        assert_eq!(parse(b" 7 "), Ok(json!(7)));
    }

    #[test]
    fn faults_have_their_place() {
        let fault = |text: &[u8]| match parse(text) {
            Err(ApiError::InvalidJson { message, line, column }) => (message, line, column),
            other => panic!("{other:?}"),
        };
        assert_eq!(fault(b"{\n \"a\": }"), ("expected value".into(), 2, 7));
        assert_eq!(fault(b"{} {}").0, "trailing characters");
        assert_eq!(fault(b"").0, "it is empty");
        assert!(fault(br#"{"temperature": NaN}"#).0.contains("NaN and Infinity are not JSON numbers"));
        assert!(fault(br#"{"temperature": 1e999}"#).0.contains("number out of range"));
        assert!(fault(br#"{"a": 1, "a": 2}"#).0.contains("the key `a` is there twice"));
        assert!(fault(br#"{"a": "\ud800"}"#).0.contains("hex escape"));
        assert_eq!(parse(b"{\"a\": \"\xff\"}"), Err(ApiError::NotUtf8 { offset: 7 }));
    }

    #[test]
    fn depth_and_size_are_bounded() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(parse(nested(64).as_bytes()).is_ok());
        assert_eq!(parse(nested(65).as_bytes()), Err(ApiError::JsonTooDeep { max: 64 }));
        assert_eq!(parse("[".repeat(1_000_000).as_bytes()), Err(ApiError::JsonTooDeep { max: 64 }));
        let many = format!("[{}0]", "0,".repeat(VALUES_MAX));
        assert!(matches!(parse(many.as_bytes()), Err(ApiError::InvalidJson { message, .. }) if message.contains("2000000 values")));
    }
}

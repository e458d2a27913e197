//! Typed reading of `config.json`: each value checked where it is read, each error names its key.

use serde_json::{Map, Value};

/// Why a config was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    #[error("config.json has no `{key}`: the file is incomplete, download the model again")]
    Missing { key: String },
    #[error("config.json: `{key}` must be {wanted}, not {found}")]
    Invalid { key: String, wanted: String, found: String },
    #[error("config.json: {message}")]
    Contradiction { message: String },
    #[error(
        "model_type `{model_type}` is not supported; the nearest supported one is `{nearest}`. `mlx-cluster models supported` lists all {supported}; \
         docs/adding-an-architecture.md says how to add one"
    )]
    UnknownModelType { model_type: String, nearest: &'static str, supported: usize },
    #[error("config.json: {feature} is not supported yet for model_type `{model_type}`")]
    Unsupported { model_type: String, feature: String },
}

/// Parses a `config.json`. Python writes numbers that JSON does not have (`Infinity`, `NaN`) as bare words: they become
/// `{"__float__": "Infinity"}`, which transformers writes for them since its version 5.
pub fn parse_json(text: &[u8]) -> Result<Value, serde_json::Error> {
    serde_json::from_slice(text).or_else(|error| match with_bare_words(text) {
        Some(text) => serde_json::from_slice(&text),
        None => Err(error),
    })
}

/// None when there are no such words outside of texts.
fn with_bare_words(text: &[u8]) -> Option<Vec<u8>> {
    const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];
    let (mut out, mut rest, mut in_text, mut found) = (Vec::with_capacity(text.len()), text, false, false);
    while let [first, others @ ..] = rest {
        let word = WORDS.iter().find(|word| !in_text && rest.starts_with(word.as_bytes()));
        if let Some(word) = word {
            out.extend_from_slice(format!("{{\"__float__\": \"{word}\"}}").as_bytes());
            rest = &rest[word.len()..];
            found = true;
            continue;
        }
        out.push(*first);
        rest = others;
        match (*first, others) {
            (b'"', _) => in_text = !in_text,
            (b'\\', [escaped, others @ ..]) if in_text => {
                out.push(*escaped);
                rest = others;
            }
            _ => {}
        }
    }
    found.then_some(out)
}

/// A number, also one that JSON does not have.
fn number(value: &Value) -> Option<f64> {
    let word = || match value.get("__float__")?.as_str()? {
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        _ => None,
    };
    value.as_f64().or_else(word)
}

/// A JSON object of a config, with the path to it for messages.
#[derive(Debug, Clone, Copy)]
pub struct Config<'a> {
    map: &'a Map<String, Value>,
    path: &'static str,
}

impl<'a> Config<'a> {
    pub fn new(value: &'a Value) -> Result<Self, ConfigError> {
        let map = value.as_object().ok_or_else(|| invalid("config.json", "an object", value))?;
        Ok(Self { map, path: "" })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// The value, None when absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// The nested object under `key`.
    pub fn object(&self, key: &'static str, path: &'static str) -> Result<Option<Config<'a>>, ConfigError> {
        self.get(key)
            .map(|value| {
                let map = value.as_object().ok_or_else(|| invalid(&self.key(key), "an object", value))?;
                Ok(Config { map, path })
            })
            .transpose()
    }

    /// Its entries, with those of `defaults` whose keys it lacks.
    pub fn filled(&self, defaults: Map<String, Value>) -> Map<String, Value> {
        let mut entries = defaults;
        entries.extend(self.map.clone());
        entries
    }

    /// Other entries at the same place.
    pub fn with_entries<'b>(&self, entries: &'b Map<String, Value>) -> Config<'b> {
        Config { map: entries, path: self.path }
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, ConfigError> {
        value.ok_or_else(|| ConfigError::Missing { key: self.key(key) })
    }

    /// An integer from `min` to `max`.
    pub fn maybe_u32(&self, key: &str, min: u32, max: u32) -> Result<Option<u32>, ConfigError> {
        self.get(key)
            .map(|value| {
                let number = value.as_u64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && *x >= 0.0).map(|x| x as u64));
                number
                    .and_then(|number| u32::try_from(number).ok())
                    .filter(|number| (min..=max).contains(number))
                    .ok_or_else(|| invalid(&self.key(key), &format!("a whole number from {min} to {max}"), value))
            })
            .transpose()
    }

    pub fn u32(&self, key: &str, min: u32, max: u32) -> Result<u32, ConfigError> {
        self.required(key, self.maybe_u32(key, min, max)?)
    }

    /// A number from `min` to `max`; infinite only where a bound is.
    pub fn maybe_f32(&self, key: &str, min: f32, max: f32) -> Result<Option<f32>, ConfigError> {
        self.get(key)
            .map(|value| {
                number(value)
                    .map(|number| number as f32)
                    .filter(|number| (min..=max).contains(number))
                    .ok_or_else(|| invalid(&self.key(key), &format!("a number from {min} to {max}"), value))
            })
            .transpose()
    }

    pub fn f32(&self, key: &str, min: f32, max: f32) -> Result<f32, ConfigError> {
        self.required(key, self.maybe_f32(key, min, max)?)
    }

    /// The same in double precision, for what is multiplied before it is rounded to a whole number.
    pub fn maybe_f64(&self, key: &str, min: f64, max: f64) -> Result<Option<f64>, ConfigError> {
        self.get(key)
            .map(|value| {
                let number = number(value).filter(|number| (min..=max).contains(number));
                number.ok_or_else(|| invalid(&self.key(key), &format!("a number from {min} to {max}"), value))
            })
            .transpose()
    }

    pub fn f64(&self, key: &str, min: f64, max: f64) -> Result<f64, ConfigError> {
        self.required(key, self.maybe_f64(key, min, max)?)
    }

    /// A list of finite numbers from `min` to `max`.
    pub fn f64s(&self, key: &str, min: f64, max: f64) -> Result<Option<Vec<f64>>, ConfigError> {
        self.get(key)
            .map(|value| {
                let number = |value: &Value| number(value).filter(|number| (min..=max).contains(number));
                let items = value.as_array().and_then(|items| items.iter().map(number).collect::<Option<Vec<_>>>());
                items.ok_or_else(|| invalid(&self.key(key), &format!("a list of numbers from {min} to {max}"), value))
            })
            .transpose()
    }

    /// The same in single precision.
    pub fn f32s(&self, key: &str, min: f32, max: f32) -> Result<Option<Vec<f32>>, ConfigError> {
        let items = self.f64s(key, min.into(), max.into())?;
        Ok(items.map(|items| items.into_iter().map(|number| number as f32).collect()))
    }

    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        self.get(key).map_or(Ok(default), |value| value.as_bool().ok_or_else(|| invalid(&self.key(key), "true or false", value)))
    }

    pub fn bools(&self, key: &str) -> Result<Option<Vec<bool>>, ConfigError> {
        self.get(key)
            .map(|value| {
                let items = value.as_array().and_then(|items| items.iter().map(Value::as_bool).collect::<Option<Vec<_>>>());
                items.ok_or_else(|| invalid(&self.key(key), "a list of true and false", value))
            })
            .transpose()
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| invalid(&self.key(key), "a text", value))).transpose()
    }

    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        self.get(key)
            .map(|value| {
                let items = value.as_array().and_then(|items| items.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
                items.ok_or_else(|| invalid(&self.key(key), "a list of texts", value))
            })
            .transpose()
    }

    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
        self.get(key)
            .map(|value| {
                let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
                let items = value.as_array().and_then(|items| items.iter().map(number).collect::<Option<Vec<_>>>());
                items.ok_or_else(|| invalid(&self.key(key), "a list of whole numbers", value))
            })
            .transpose()
    }

    /// All keys with their values, in the order of the file.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.map.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The token ids that end a generation: `eos_token_id` as a number or a list.
    pub fn eos_token_ids(&self, vocab_size: u32) -> Result<Vec<u32>, ConfigError> {
        let ids = match self.get("eos_token_id") {
            None => Vec::new(),
            Some(Value::Array(_)) => self.u32s("eos_token_id")?.unwrap_or_default(),
            Some(_) => self.maybe_u32("eos_token_id", 0, u32::MAX)?.into_iter().collect(),
        };
        match ids.iter().find(|id| **id >= vocab_size) {
            Some(id) => Err(ConfigError::Invalid {
                key: "eos_token_id".into(),
                wanted: format!("below the vocabulary size {vocab_size}"),
                found: id.to_string(),
            }),
            None => Ok(ids),
        }
    }
}

fn invalid(key: &str, wanted: &str, found: &Value) -> ConfigError {
    let mut found: String = found.to_string().chars().take(80).collect();
    if found.is_empty() {
        found.push_str("nothing");
    }
    ConfigError::Invalid { key: key.to_owned(), wanted: wanted.to_owned(), found }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_that_json_does_not_have() {
        let value =
            parse_json(br#"{"a": Infinity, "b": [0.5, -Infinity], "c": "Infinity \" NaN", "d": {"__float__": "Infinity"}}"#).expect("read");
        let config = Config::new(&value).expect("an object");
        assert_eq!(config.f32("a", 0.0, f32::INFINITY), Ok(f32::INFINITY));
        assert!(config.f32("a", 0.0, 1e30).is_err());
        assert_eq!(config.f64s("b", f64::NEG_INFINITY, 1.0), Ok(Some(vec![0.5, f64::NEG_INFINITY])));
        assert_eq!(config.text("c"), Ok(Some("Infinity \" NaN")));
        assert_eq!(config.f32("d", 0.0, f32::INFINITY), Ok(f32::INFINITY));
        assert!(parse_json(b"{\"a\": Infinite}").is_err());
    }

    #[test]
    fn errors_name_the_key() {
        let value = json!({"a": 0, "b": "5", "c": null, "d": 1e12, "e": [1, -2], "rope": {"factor": "x"}});
        let config = Config::new(&value).expect("an object");
        let message = |error: ConfigError| error.to_string();
        assert_eq!(message(config.u32("a", 1, 9).expect_err("too small")), "config.json: `a` must be a whole number from 1 to 9, not 0");
        assert_eq!(message(config.u32("b", 1, 9).expect_err("a text")), "config.json: `b` must be a whole number from 1 to 9, not \"5\"");
        assert_eq!(config.u32("c", 1, 9), Err(ConfigError::Missing { key: "c".into() }));
        assert!(config.u32("d", 1, 9).is_err());
        assert!(config.u32s("e").is_err());
        assert_eq!(config.f32s("e", -2.0, 1.0), Ok(Some(vec![1.0, -2.0])));
        assert!(message(config.f64s("e", 0.0, 1.0).expect_err("negative")).contains("`e` must be a list of numbers from 0 to 1"));
        assert!(config.maybe_f64("b", 0.0, 9.0).is_err());
        let rope = config.object("rope", "rope.").expect("an object").expect("present");
        assert!(message(rope.f32("factor", 0.0, 1.0).expect_err("a text")).contains("`rope.factor`"));
    }
}

//! Why the configuration of a training job was refused: a sentence each, with the key, its value, and what is allowed.

use crate::nearest::nearest;
use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrainingConfigError {
    #[error("`{key}` is not a key of a training config{hint}")]
    UnknownKey { key: String, hint: String },
    #[error("`{key}` is missing{hint}")]
    Missing { key: String, hint: String },
    #[error("`{key}` is {value}, but must be {allowed}")]
    Invalid { key: String, value: String, allowed: String },
    #[error("`{key}` is {value}, but must be one of {known}; the nearest is `{nearest}`")]
    UnknownChoice { key: String, value: String, known: String, nearest: String },
    /// Known to mlx-lm, and not done here.
    #[error("`{key}` is {value}: {reason}")]
    Refused { key: String, value: String, reason: &'static str },
    /// Two keys that do not go together.
    #[error("{0}")]
    Contradiction(String),
}

impl TrainingConfigError {
    pub(super) fn invalid(key: String, value: &Value, allowed: impl Into<String>) -> Self {
        Self::Invalid { key, value: shown(value), allowed: allowed.into() }
    }

    pub(super) fn unknown_choice(key: String, value: &str, known: &[&str]) -> Self {
        Self::UnknownChoice {
            key,
            value: shown(&Value::from(value)),
            known: known.join(", "),
            nearest: nearest(&value.to_lowercase(), known.iter().copied()).unwrap_or_default().to_owned(),
        }
    }

    pub(super) fn missing(key: String, hint: impl Into<String>) -> Self {
        Self::Missing { key, hint: hint.into() }
    }
}

/// A value as JSON, cut when it is long.
pub(super) fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

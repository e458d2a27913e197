//! The forms that rows have, as mlx-lm's `create_dataset` tells them apart, and reading one row.

use super::error::RowFault;
use mlx_cluster_common::config::parse_json;
use serde_json::{Map, Value, json};

/// Names of the fields that are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Features {
    pub prompt: String,
    pub completion: String,
    pub text: String,
    pub chat: String,
}

impl Default for Features {
    fn default() -> Self {
        let [prompt, completion, text, chat] = ["prompt", "completion", "text", "messages"].map(str::to_owned);
        Self { prompt, completion, text, chat }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Completions,
    Chat,
    Text,
}

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Text(String),
    /// Prompts and completions too are chats, of two messages.
    Chat {
        messages: Vec<Value>,
        tools: Option<Vec<Value>>,
    },
}

pub(super) type Object = Map<String, Value>;

impl Form {
    /// Of the set whose first row this is.
    pub(super) fn of(row: &Object, features: &Features) -> Option<Self> {
        if row.contains_key(&features.prompt) && row.contains_key(&features.completion) {
            Some(Form::Completions)
        } else if row.contains_key(&features.chat) {
            Some(Form::Chat)
        } else if row.contains_key(&features.text) {
            Some(Form::Text)
        } else {
            None
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Form::Completions => "prompt and completion",
            Form::Chat => "chat",
            Form::Text => "text",
        }
    }

    /// Takes what is needed out of a row.
    pub(super) fn content(self, row: &Object, features: &Features, mask_prompt: bool) -> Result<Content, RowFault> {
        match self {
            Form::Text => Ok(Content::Text(text(row, &features.text)?)),
            Form::Completions => {
                let prompt = text(row, &features.prompt)?;
                let completion = text(row, &features.completion)?;
                let message = |role: &str, content: String| json!({"role": role, "content": content});
                let messages = vec![message("user", prompt), message("assistant", completion)];
                Ok(Content::Chat { messages, tools: tools(row)? })
            }
            Form::Chat => {
                let messages = messages(row, &features.chat)?;
                if mask_prompt && !messages.iter().any(is_assistant) {
                    return Err(RowFault::NoAssistant { key: features.chat.clone() });
                }
                Ok(Content::Chat { messages, tools: tools(row)? })
            }
        }
    }
}

impl Content {
    /// Whether the assistant has the last word; true for a text.
    pub(super) fn ends_with_assistant(&self) -> bool {
        match self {
            Content::Text(_) => true,
            Content::Chat { messages, .. } => messages.last().is_some_and(is_assistant),
        }
    }
}

/// Whether the assistant says this message.
pub(super) fn is_assistant(message: &Value) -> bool {
    message.get("role").and_then(Value::as_str) == Some("assistant")
}

pub(super) fn object(line: &[u8]) -> Result<Object, RowFault> {
    // Some editors put a byte order mark before a text.
    let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    let value = parse_json(line).map_err(|error| RowFault::NotJson { column: characters(line, error.column()), detail: cause(&error) })?;
    match value {
        Value::Object(row) => Ok(row),
        other => Err(RowFault::NotAnObject { found: kind(&other) }),
    }
}

/// What an editor calls the column of this byte: serde counts bytes.
fn characters(line: &[u8], column: usize) -> usize {
    String::from_utf8_lossy(&line[..column.min(line.len())]).chars().count()
}

/// Without the place, of which only the column means something here.
fn cause(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.rsplit_once(" at line ").map_or(text.clone(), |(cause, _)| cause.to_owned())
}

/// A copy, since one field may be both the prompt and the completion.
fn field(row: &Object, key: &str) -> Result<Value, RowFault> {
    row.get(key).cloned().ok_or_else(|| RowFault::Missing { key: key.to_owned() })
}

fn text(row: &Object, key: &str) -> Result<String, RowFault> {
    match field(row, key)? {
        Value::String(text) => Ok(text),
        other => Err(RowFault::NotText { key: key.to_owned(), found: kind(&other) }),
    }
}

fn messages(row: &Object, key: &str) -> Result<Vec<Value>, RowFault> {
    let refused = |found| RowFault::NotMessages { key: key.to_owned(), found };
    match field(row, key)? {
        Value::Array(messages) if messages.is_empty() => Err(refused("an empty list")),
        Value::Array(messages) => {
            let has_role = |message: &Value| message.get("role").is_some_and(Value::is_string);
            if messages.iter().all(has_role) { Ok(messages) } else { Err(refused("a list with something else in it")) }
        }
        other => Err(refused(kind(&other))),
    }
}

fn tools(row: &Object) -> Result<Option<Vec<Value>>, RowFault> {
    match row.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(tools)) if tools.iter().all(Value::is_object) => Ok(Some(tools.clone())),
        Some(Value::Array(_)) => Err(RowFault::NotTools { found: "a list with something else in it" }),
        Some(other) => Err(RowFault::NotTools { found: kind(other) }),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

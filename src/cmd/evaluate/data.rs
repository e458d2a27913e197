//! Rows of a JSONL file in mlx-lm's three forms, each with its line, so that an error can say where.

use crate::failure::{Exit, Failure};
use serde_json::{Map, Value, json};
use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

/// A longer line is no row of a data set.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// What a model should say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    /// In the file, from 1.
    pub(super) line: usize,
    pub(super) content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Chat {
        /// All but the last message.
        prompt: Vec<Value>,
        /// The last message, of the assistant.
        answer: Value,
        /// For the template.
        tools: Option<Value>,
    },
    Completion {
        prompt: String,
        completion: String,
    },
    Text(String),
}

impl Row {
    pub(super) fn is_chat(&self) -> bool {
        matches!(self.content, Content::Chat { .. })
    }
}

/// The first `limit` rows; empty lines are none.
pub(super) fn read_rows(path: &Path, limit: Option<u64>) -> anyhow::Result<Vec<Row>> {
    let failed = |cause: String| Failure::new(Exit::BadFile, format!("{}: {cause}", path.display()));
    let file =
        File::open(path).map_err(|error| failed(format!("cannot be read ({error}): give --data a JSONL file, or a folder with one")))?;
    let mut reader = BufReader::new(file);
    let limit = limit.map_or(usize::MAX, |limit| limit as usize);
    let mut rows = Vec::new();
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let read = (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut text).map_err(|error| failed(error.to_string()))?;
        if read == 0 || rows.len() >= limit {
            break;
        }
        if read as u64 == LINE_BYTES_MAX {
            return Err(failed(format!("line {line} has more than {LINE_BYTES_MAX} bytes")).into());
        }
        if !text.trim_ascii().is_empty() {
            let content = content(&text).map_err(|cause| failed(format!("line {line} {cause}")))?;
            rows.push(Row { line, content });
        }
    }
    if rows.is_empty() {
        return Err(failed("holds no rows".into()).into());
    }
    Ok(rows)
}

fn content(line: &[u8]) -> Result<Content, String> {
    let value: Value = serde_json::from_slice(line).map_err(|error| format!("is not JSON ({error})"))?;
    let Value::Object(mut row) = value else { return Err("is not a JSON object".into()) };
    if let Some(messages) = row.remove("messages") {
        return chat(messages, row.remove("tools").filter(|tools| !tools.is_null()));
    }
    if row.contains_key("prompt") || row.contains_key("completion") {
        return Ok(Content::Completion { prompt: text_of(&mut row, "prompt")?, completion: text_of(&mut row, "completion")? });
    }
    match row.contains_key("text") {
        true => Ok(Content::Text(text_of(&mut row, "text")?)),
        false => Err("has neither `messages`, nor `prompt` and `completion`, nor `text`".into()),
    }
}

fn text_of(row: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    match row.remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("has a `{key}` that is no text")),
        None => Err(format!("has no `{key}`")),
    }
}

fn chat(messages: Value, tools: Option<Value>) -> Result<Content, String> {
    let Value::Array(mut prompt) = messages else { return Err("has `messages` that are no list".into()) };
    let answer = prompt.pop().ok_or("has an empty list of `messages`")?;
    if answer["role"] != json!("assistant") {
        return Err("ends with a message that is not the assistant's, so there is no answer to measure".into());
    }
    match prompt.is_empty() {
        true => Err("has no message before the assistant's".into()),
        false => Ok(Content::Chat { prompt, answer, tools }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, limit: Option<u64>) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("test.jsonl");
        std::fs::write(&path, text).expect("written");
        read_rows(&path, limit).map_err(|error| error.to_string())
    }

    #[test]
    fn the_three_forms_are_read_with_their_lines() {
        let text = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n\n\
                    {\"prompt\": \"p\", \"completion\": \"c\", \"extra\": 1}\n{\"text\": \"t\"}";
        let rows = read(text, None).expect("valid");
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 3, 4]);
        assert!(rows[0].is_chat() && matches!(&rows[0].content, Content::Chat { prompt, tools: None, .. } if prompt.len() == 1));
        assert_eq!(rows[1].content, Content::Completion { prompt: "p".into(), completion: "c".into() });
        assert_eq!(rows[2].content, Content::Text("t".into()));
        assert_eq!(read(text, Some(2)).expect("valid").len(), 2);
    }

    #[test]
    fn a_bad_row_is_named_with_file_and_line() {
        for (text, cause) in [
            ("", "holds no rows"),
            ("{\"text\": \"a\"}\n{", "test.jsonl: line 2 is not JSON"),
            ("[1]", "line 1 is not a JSON object"),
            ("{\"a\": 1}", "has neither `messages`"),
            ("{\"prompt\": \"a\"}", "has no `completion`"),
            ("{\"text\": 1}", "has a `text` that is no text"),
            ("{\"messages\": []}", "an empty list"),
            ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "not the assistant's"),
            ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}", "no message before"),
        ] {
            let message = read(text, None).expect_err("refused");
            assert!(message.contains(cause), "{message}");
        }
    }
}

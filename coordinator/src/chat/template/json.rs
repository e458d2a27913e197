//! JSON on its way into a template, and out of it as Python writes it: the `tojson` filter, and numbers.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::meter::{self, BoundedText};

const MAX_DEPTH: usize = 200;

/// A template value that equals `json`; objects keep the order of their members.
pub(super) fn to_value(json: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(signed), _) => Value::from(signed),
            (None, Some(unsigned)) => Value::from(unsigned),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(members) => Value::from_pairs(members.iter().map(|(name, part)| (name.as_str(), to_value(part)))),
    }
}

/// A message, whose reasoning templates find under the name they know, whichever name the client used. As transformers does it.
pub(super) fn to_message(json: &serde_json::Value) -> Value {
    let names = ["reasoning_content", "thinking", "reasoning"];
    let reasoning = names.iter().find_map(|name| json.get(name).filter(|value| !value.is_null()));
    match (json, reasoning) {
        (serde_json::Value::Object(members), Some(reasoning)) => {
            let mut aliased = serde_json::Map::from_iter([("thinking".to_owned(), reasoning.clone())]);
            aliased.extend(members.clone());
            aliased.insert("reasoning_content".to_owned(), reasoning.clone());
            to_value(&serde_json::Value::Object(aliased))
        }
        _ => to_value(json),
    }
}

/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of Hugging Face, that is `json.dumps`:
/// `", "` and `": "` between parts, non-ASCII text as it is, no HTML escapes.
///
/// # Errors
/// For what `json.dumps` refuses (undefined, functions), for more than 8 MiB and for unknown arguments.
pub(super) fn tojson(state: &mut State, value: &Value, ascii: Option<bool>, options: Kwargs) -> Result<Value, Error> {
    let ensure_ascii = match ascii {
        Some(flag) => flag,
        None => options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    let indent = indent_text(options.get::<Option<Value>>("indent")?)?;
    let (item, key) = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators must be a pair of texts")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = JsonWriter { out: BoundedText::default(), ensure_ascii, indent, item, key, sort_keys };
    writer.value(value, 0)?;
    meter::charge(state, writer.out.text.len())?;
    Ok(writer.out.text.into())
}

fn indent_text(indent: Option<Value>) -> Result<Option<String>, Error> {
    let Some(indent) = indent.filter(|value| !value.is_none() && !value.is_undefined()) else { return Ok(None) };
    if let Some(text) = indent.as_str() {
        return Ok(Some(text.to_owned()));
    }
    // Python takes a negative number as "new lines, no spaces".
    let width = i64::try_from(indent).map_err(|_| invalid("indent must be a number or a text"))?;
    Ok(Some(" ".repeat(width.clamp(0, 64) as usize)))
}

struct JsonWriter {
    out: BoundedText,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(meter::Halt::Budget("lists nested too deep").into());
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.sequence(value, depth),
            ValueKind::Map => self.map(value, depth),
            kind => Err(invalid(format!("a value of kind {kind} cannot be written as JSON"))),
        }
    }

    fn number(&mut self, value: &Value) -> Result<(), Error> {
        match as_float(value) {
            Some(float) if float.is_nan() => self.out.push_str("NaN"),
            Some(float) if float.is_infinite() => self.out.push_str(if float > 0.0 { "Infinity" } else { "-Infinity" }),
            Some(float) => self.out.push_str(&python_float(float)),
            None => self.out.push(value),
        }
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.out.push_str(&quoted(text, self.ensure_ascii))
    }

    fn sequence(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.out.push_str("[")?;
        let mut empty = true;
        for part in value.try_iter()? {
            self.separate(empty, depth + 1)?;
            empty = false;
            self.value(&part, depth + 1)?;
        }
        self.close(empty, depth, "]")
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut members = Vec::new();
        for key in value.try_iter()? {
            let part = value.get_item(&key)?;
            members.push((key_text(&key)?, part));
        }
        if self.sort_keys {
            members.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.out.push_str("{")?;
        let empty = members.is_empty();
        for (at, (key, part)) in members.iter().enumerate() {
            self.separate(at == 0, depth + 1)?;
            self.string(key)?;
            let separator = std::mem::take(&mut self.key);
            self.out.push_str(&separator)?;
            self.key = separator;
            self.value(part, depth + 1)?;
        }
        self.close(empty, depth, "}")
    }

    fn separate(&mut self, first: bool, depth: usize) -> Result<(), Error> {
        if !first {
            self.out.push_str(&self.item)?;
        }
        self.new_line(depth)
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: &str) -> Result<(), Error> {
        if !empty {
            self.new_line(depth)?;
        }
        self.out.push_str(bracket)
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        self.out.push_str("\n")?;
        for _ in 0..depth {
            self.out.push_str(indent)?;
        }
        Ok(())
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(as_float(key).map_or_else(|| key.to_string(), python_float)),
        kind => Err(invalid(format!("a key of kind {kind} cannot be written as JSON"))),
    }
}

fn quoted(text: &str, ensure_ascii: bool) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            _ if (char as u32) < 0x20 || (ensure_ascii && !(' '..='~').contains(&char)) => {
                for unit in char.encode_utf16(&mut [0; 2]) {
                    // Writing into a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            _ => out.push(char),
        }
    }
    out.push('"');
    out
}

/// The number if it is a floating-point one; `1` and `1.0` print differently.
pub(super) fn as_float(value: &Value) -> Option<f64> {
    if value.kind() == ValueKind::Number && !value.is_integer() { f64::try_from(value.clone()).ok() } else { None }
}

/// The shortest text that reads back as `float`, with Python's choice of where to use an exponent.
pub(super) fn python_float(float: f64) -> String {
    if float.is_nan() {
        return "nan".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if float != 0.0 && !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

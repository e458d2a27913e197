//! What chat templates expect of Python: methods of `str`, `list` and `dict`, and the filters and tests in which minijinja differs.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

use super::meter::{self, BoundedText, Halt, MAX_TEXT_BYTES};

/// Registers everything of this file.
pub(super) fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", super::json::tojson);
    env.add_filter("replace", |state: &mut State, text: String, old: String, new: String, count: Option<i64>| {
        replace(state, &text, &old, &new, count)
    });
    env.add_filter("join", join_filter);
    env.add_filter("format", |state: &mut State, pattern: String, args: Rest<Value>| {
        bound_format(state, &pattern, &args)?;
        minijinja::formatting::format(minijinja::formatting::FormatStyle::Printf, &pattern, &args)
    });
    env.add_filter("indent", indent);
    for name in ["length", "count"] {
        env.add_filter(name, |value: &Value| if value.is_undefined() { Ok(0) } else { filters::length(value) });
    }
    // Not in Jinja, or of no use in a prompt, and able to build a large value from small ones.
    for name in ["batch", "slice", "chain", "zip", "pprint", "sum"] {
        env.remove_filter(name);
    }
    env.remove_global("debug");
    env.add_function("dict", dict);
    env.add_test("iterable", |value: &Value| {
        value.is_undefined() || (!value.is_none() && value.kind() != ValueKind::Plain && value.try_iter().is_ok())
    });
    env.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    });
}

fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => match text_method(state, text, name, args) {
            Err(error) if error.kind() == ErrorKind::UnknownMethod => pycompat::unknown_method_callback(state, value, name, args),
            done => done,
        },
        (ValueKind::Seq | ValueKind::Iterable, _) => match (name, args) {
            ("index", [wanted]) => {
                let found = value.try_iter()?.position(|part| part == *wanted);
                found.map(Value::from).ok_or_else(|| invalid("the value is not in the list"))
            }
            ("count", [wanted]) => Ok(value.try_iter()?.filter(|part| part == wanted).count().into()),
            ("copy", []) => Ok(value.clone()),
            _ => Err(ErrorKind::UnknownMethod.into()),
        },
        (ValueKind::Map, _) if name == "copy" && args.is_empty() => Ok(value.clone()),
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn text_method(state: &mut State, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "replace" => {
            let (old, new, count): (String, String, Option<i64>) = from_args(args)?;
            replace(state, text, &old, &new, count)
        }
        "join" => {
            let (parts,): (Value,) = from_args(args)?;
            join(state, parts.try_iter()?, text)
        }
        "format" => {
            bound_format(state, text, args)?;
            Err(ErrorKind::UnknownMethod.into())
        }
        "rsplit" => rsplit(text, args),
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => partition(text, args, name == "rpartition"),
        "zfill" | "ljust" | "rjust" | "center" => pad(text, name, args),
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = text.find(wanted).ok_or_else(|| invalid("substring not found"))?;
            Ok(text.get(..at).unwrap_or_default().chars().count().into())
        }
        "casefold" => Ok(text.to_lowercase().into()),
        "isdecimal" => Ok((!text.is_empty() && text.chars().all(char::is_numeric)).into()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn replace(state: &mut State, text: &str, old: &str, new: &str, count: Option<i64>) -> Result<Value, Error> {
    let limit = count.filter(|count| *count >= 0).map_or(usize::MAX, |count| count as usize);
    let times = text.matches(old).take(limit).count();
    meter::charge(state, text.len().saturating_add(times.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, limit).into())
}

fn join_filter(
    state: &mut State,
    parts: Value,
    separator: Option<Value>,
    attribute: Option<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let separator = match separator {
        Some(separator) => Some(separator),
        None => options.get::<Option<Value>>("d")?,
    };
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => options.get::<Option<Value>>("attribute")?,
    };
    options.assert_all_used()?;
    let separator = separator.map(|value| value.to_string()).unwrap_or_default();
    let parts = if parts.is_undefined() { Value::from(Vec::<Value>::new()) } else { parts };
    match attribute {
        None => join(state, parts.try_iter()?, &separator),
        Some(key) => join(state, parts.try_iter()?.map(|part| part.get_item(&key).unwrap_or_default()), &separator),
    }
}

fn join(state: &mut State, parts: impl Iterator<Item = Value>, separator: &str) -> Result<Value, Error> {
    let mut joined = BoundedText::default();
    for (at, part) in parts.enumerate() {
        if at > 0 {
            joined.push_str(separator)?;
        }
        joined.push(&part)?;
    }
    meter::charge(state, joined.text.len())?;
    Ok(joined.text.into())
}

/// Refuses format patterns that could build more than the limit: long arguments many times, or huge widths.
fn bound_format(state: &mut State, pattern: &str, args: &[Value]) -> Result<(), Error> {
    let digits = pattern.split(|char: char| !char.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    if digits > 4 || pattern.contains('*') {
        return Err(Halt::Budget("a format with a width above 9999").into());
    }
    let mut longest = 9999;
    for arg in args {
        let mut printed = BoundedText::default();
        printed.push(arg)?;
        longest = longest.max(printed.text.len());
    }
    let places = pattern.bytes().filter(|byte| matches!(byte, b'%' | b'{')).count();
    if pattern.len().saturating_add(places.saturating_mul(longest)) > 8 * MAX_TEXT_BYTES {
        return Err(Halt::Budget("a text of more than 8 MiB").into());
    }
    meter::charge(state, 0)
}

/// Jinja's `indent(width=4, first=false, blank=false)`; minijinja's drops a new line at the end, Jinja's keeps it.
fn indent(state: &mut State, text: String, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args: Vec<Value> = args.0.into_iter().map(ValueOrKwargs::into_value).collect();
    let (width, first, blank, options): (Option<Value>, Option<bool>, Option<bool>, Kwargs) = from_args(&args)?;
    let width = match width {
        Some(width) => Some(width),
        None => options.get::<Option<Value>>("width")?,
    };
    let first = first.or(options.get::<Option<bool>>("first")?).unwrap_or(false);
    let blank = blank.or(options.get::<Option<bool>>("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    let lines = text.matches('\n').count() + 1;
    let width_bytes = match &width {
        None => 4,
        Some(width) => width.as_str().map(str::len).or(width.as_usize()).ok_or_else(|| invalid("width must be a number"))?,
    };
    meter::charge(state, text.len().saturating_add(lines.saturating_mul(width_bytes)))?;
    let indention = width.as_ref().and_then(Value::as_str).map_or_else(|| " ".repeat(width_bytes), str::to_owned);
    let mut out = if first { indention.clone() } else { String::new() };
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out.push_str(&indention);
            }
        }
        out.push_str(line);
    }
    Ok(out.into())
}

fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, limit, options): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let limit = match limit {
        Some(limit) => Some(limit),
        None => options.get::<Option<i64>>("maxsplit")?,
    };
    options.assert_all_used()?;
    let limit = limit.filter(|limit| *limit >= 0).map_or(usize::MAX, |limit| limit as usize);
    let mut parts: Vec<Value> = match separator.as_ref().and_then(Value::as_str) {
        Some("") => return Err(invalid("empty separator")),
        Some(separator) => text.rsplitn(limit.saturating_add(1), separator).map(Value::from).collect(),
        None => rsplit_whitespace(text, limit),
    };
    parts.reverse();
    Ok(parts.into())
}

fn rsplit_whitespace(text: &str, limit: usize) -> Vec<Value> {
    let mut parts = Vec::new();
    let mut rest = text.trim_end();
    while parts.len() < limit {
        let Some(at) = rest.rfind(char::is_whitespace) else { break };
        let (head, word) = rest.split_at(at);
        parts.push(Value::from(word.trim_start()));
        rest = head.trim_end();
    }
    let rest = if parts.len() < limit { rest.trim_start() } else { rest };
    if !rest.is_empty() {
        parts.push(rest.into());
    }
    parts
}

fn partition(text: &str, args: &[Value], from_end: bool) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(invalid("empty separator"));
    }
    let found = if from_end { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((head, tail)) => [head, separator, tail],
        None if from_end => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn pad(text: &str, side: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<String>) = from_args(args)?;
    if width > MAX_TEXT_BYTES / 4 {
        return Err(Halt::Budget("a text of more than 8 MiB").into());
    }
    let fill = if side == "zfill" { "0" } else { fill.as_deref().unwrap_or(" ") };
    if fill.chars().count() != 1 {
        return Err(invalid("the fill character must be exactly one character long"));
    }
    let missing = width.saturating_sub(text.chars().count());
    let (left, right) = match side {
        "ljust" => (0, missing),
        // Python puts the odd one to the left when the width is odd.
        "center" => (missing / 2 + (missing & width & 1), missing - (missing / 2 + (missing & width & 1))),
        _ => (missing, 0),
    };
    let sign = text.get(..1).filter(|first| side == "zfill" && matches!(*first, "+" | "-")).unwrap_or_default();
    let digits = text.get(sign.len()..).unwrap_or_default();
    Ok(format!("{sign}{}{digits}{}", fill.repeat(left), fill.repeat(right)).into())
}

/// `dict()`, `dict(mapping)`, `dict(pairs)`, each with more members as named arguments.
fn dict(start: Option<Value>, members: Kwargs) -> Result<Value, Error> {
    let start = match start {
        Some(pairs) if matches!(pairs.kind(), ValueKind::Seq | ValueKind::Iterable) => {
            let mut collected = Vec::new();
            for pair in pairs.try_iter()? {
                let parts: Vec<Value> = pair.try_iter()?.take(3).collect();
                let [key, value] = parts.as_slice() else {
                    return Err(invalid("dict() takes pairs"));
                };
                collected.push((key.clone(), value.clone()));
            }
            Some(Value::from_pairs(collected))
        }
        start => start,
    };
    minijinja::functions::dict(start, members)
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

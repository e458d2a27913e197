//! How a model writes tool calls, told from its chat template, and reading one of them.

use serde::Deserialize;
use serde_json::value::RawValue;

/// A way of writing tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": .., "arguments": {..}}</tool_call>`: Hermes, Qwen2.5, Qwen3 and many fine-tunes.
    Json,
}

/// The format of a model whose chat template is `template_source`, or `None` when it has none that we can read.
pub fn tool_format(template_source: &str) -> Option<ToolFormat> {
    // These use the same tag around XML: Qwen3-Coder and GLM-4.5.
    let xml = ["<function=", "<arg_key>"].iter().any(|mark| template_source.contains(mark));
    (!xml && template_source.contains("<tool_call>")).then_some(ToolFormat::Json)
}

/// A call that a model wants to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The function.
    pub name: String,
    /// A JSON object, as text, as the model wrote it.
    pub arguments: String,
}

impl ToolFormat {
    pub(super) fn open(self) -> &'static str {
        match self {
            Self::Json => "<tool_call>",
        }
    }

    pub(super) fn close(self) -> &'static str {
        match self {
            Self::Json => "</tool_call>",
        }
    }

    /// Whether a body that starts like this can still become a call.
    pub(super) fn may_start(self, body: &str) -> bool {
        match self {
            Self::Json => body.trim_start().chars().next().is_none_or(|first| first == '{'),
        }
    }

    /// Whether `body` ends inside a quoted text, where the closing mark is not a mark.
    pub(super) fn ends_in_string(self, body: &str) -> bool {
        match self {
            Self::Json => ends_in_json_string(body),
        }
    }

    /// The call in `body`, or `None` when it is malformed.
    pub(super) fn parse(self, body: &str) -> Option<ToolCall> {
        match self {
            Self::Json => parse_json_call(body),
        }
    }
}

fn ends_in_json_string(body: &str) -> bool {
    let mut inside = false;
    let mut chars = body.chars();
    while let Some(char) = chars.next() {
        match char {
            '\\' if inside => drop(chars.next()),
            '"' => inside = !inside,
            _ => {}
        }
    }
    inside
}

fn parse_json_call(body: &str) -> Option<ToolCall> {
    #[derive(Deserialize)]
    struct Call<'a> {
        name: String,
        #[serde(borrow, default, alias = "parameters")]
        arguments: Option<&'a RawValue>,
    }
    let call: Call = serde_json::from_str(body).ok()?;
    let written = call.arguments.map_or("null", RawValue::get);
    let arguments = match written.as_bytes().first()? {
        b'{' => written.to_owned(),
        // Some models put the object into a text, as the API does.
        b'"' => serde_json::from_str::<String>(written).ok().filter(|text| is_object(text))?,
        b'n' => "{}".to_owned(),
        _ => return None,
    };
    (!call.name.is_empty()).then_some(ToolCall { name: call.name, arguments })
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Option<(String, String)> {
        ToolFormat::Json.parse(body).map(|call| (call.name, call.arguments))
    }

    #[test]
    fn the_template_tells_the_format() {
        assert_eq!(tool_format("..<tool_call>\n{\"name\": .."), Some(ToolFormat::Json));
        assert_eq!(tool_format("..<tool_call>\n<function=.."), None);
        assert_eq!(tool_format("..<tool_call>{{ name }}<arg_key>.."), None);
        assert_eq!(tool_format("{{ messages }}"), None);
    }

    #[test]
    fn arguments_are_kept_as_written() {
        let found = parse("\n{\"name\": \"add\", \"arguments\": {\"b\": 2, \"a\":1.0}}\n");
        assert_eq!(found, Some(("add".to_owned(), "{\"b\": 2, \"a\":1.0}".to_owned())));
        let found = parse(r#"{"arguments": "{\"a\": \"x\"}", "name": "add"}"#);
        assert_eq!(found, Some(("add".to_owned(), "{\"a\": \"x\"}".to_owned())));
        assert_eq!(parse(r#"{"name": "now"}"#), Some(("now".to_owned(), "{}".to_owned())));
        assert_eq!(parse(r#"{"name": "now", "arguments": null}"#), Some(("now".to_owned(), "{}".to_owned())));
        assert_eq!(parse(r#"{"name": "f", "parameters": {}}"#), Some(("f".to_owned(), "{}".to_owned())));
    }

    #[test]
    fn malformed_calls_are_no_calls() {
        for body in ["", "{}", "add(1)", r#"{"name": "f""#, r#"{"name": "", "arguments": {}}"#, r#"{"name": 1}"#] {
            assert_eq!(parse(body), None, "{body}");
        }
        for arguments in ["[1]", "3", "\"x\"", "true", "{\"a\":}"] {
            assert_eq!(parse(&format!("{{\"name\": \"f\", \"arguments\": {arguments}}}")), None, "{arguments}");
        }
    }
}

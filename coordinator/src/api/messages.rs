//! The messages of a chat: checked field by field, and written as chat templates expect them.

use super::{
    error::ApiError,
    fields::{Fields, wrong_type},
};
use serde_json::{Map, Value, json};

const MESSAGES_MAX: usize = 4096;

/// The messages for the template: content is one string, arguments of tool calls are objects.
pub(super) fn take_messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let items = fields.list("messages")?.ok_or_else(|| fields.missing("messages", "; send a list of messages"))?;
    if items.is_empty() {
        return Err(ApiError::Invalid { param: "messages".into(), message: "it is an empty list; send at least one message".into() });
    }
    if items.len() > MESSAGES_MAX {
        let message = format!("it has {} messages, more than {MESSAGES_MAX}", items.len());
        return Err(ApiError::Invalid { param: "messages".into(), message });
    }
    items.into_iter().enumerate().map(|(i, item)| message(&format!("messages[{i}]"), item)).collect()
}

fn message(path: &str, item: Value) -> Result<Value, ApiError> {
    let mut fields = Fields::at(path, item)?;
    let role = fields.string("role")?.ok_or_else(|| fields.missing("role", ""))?;
    let content = content(&mut fields)?;
    let mut message = Map::new();
    match role.as_str() {
        "system" | "user" => message.insert("role".into(), role.as_str().into()),
        // OpenAI's newer name; templates know the older one.
        "developer" => message.insert("role".into(), "system".into()),
        "assistant" => {
            assistant(&mut fields, &mut message, content.is_some())?;
            message.insert("role".into(), "assistant".into())
        }
        "tool" => {
            if let Some(id) = fields.string("tool_call_id")? {
                message.insert("tool_call_id".into(), id.into());
            }
            message.insert("role".into(), "tool".into())
        }
        other => {
            let wanted = "one of system, developer, user, assistant, tool".into();
            return Err(ApiError::OutOfRange { param: fields.path("role"), wanted, found: format!("`{}`", super::error::shown(other)) });
        }
    };
    if content.is_none() && role != "assistant" {
        return Err(fields.missing("content", "; send a string"));
    }
    message.insert("content".into(), content.unwrap_or_default().into());
    if let Some(name) = fields.string("name")? {
        message.insert("name".into(), name.into());
    }
    fields.finish()?;
    Ok(message.into())
}

/// A string, or text parts that make up one.
fn content(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let path = fields.path("content");
    let parts = match fields.value("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(wrong_type(&path, "a string or a list of text parts", &other)),
    };
    let mut whole = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut part = Fields::at(&format!("{path}[{i}]"), part)?;
        let kind = part.string("type")?.ok_or_else(|| part.missing("type", ""))?;
        if kind != "text" {
            return Err(part.unsupported("type", format!(" with the value `{}` (only text)", super::error::shown(&kind))));
        }
        whole.push_str(&part.string("text")?.ok_or_else(|| part.missing("text", ""))?);
        part.finish()?;
    }
    Ok(Some(whole))
}

fn assistant(fields: &mut Fields, message: &mut Map<String, Value>, has_content: bool) -> Result<(), ApiError> {
    for name in ["refusal", "audio", "function_call"] {
        fields.only(name, &[])?;
    }
    // The official clients send an answer back as they got it.
    fields.only("annotations", &[json!([])])?;
    let reasoning = fields.string("reasoning_content")?;
    if let Some(reasoning) = fields.string("reasoning")?.or(reasoning) {
        message.insert("reasoning_content".into(), reasoning.into());
    }
    let calls = fields.list("tool_calls")?.unwrap_or_default();
    if calls.is_empty() && !has_content {
        return Err(fields.missing("content", "; an assistant's message needs content or tool_calls"));
    }
    if !calls.is_empty() {
        let path = fields.path("tool_calls");
        let calls: Result<Vec<Value>, _> =
            calls.into_iter().enumerate().map(|(i, call)| tool_call(&format!("{path}[{i}]"), call)).collect();
        message.insert("tool_calls".into(), calls?.into());
    }
    Ok(())
}

fn tool_call(path: &str, call: Value) -> Result<Value, ApiError> {
    let mut fields = Fields::at(path, call)?;
    fields.label("index");
    fields.only("type", &[json!("function")])?;
    let id = fields.string("id")?;
    let inner = fields.value("function").ok_or_else(|| fields.missing("function", ""))?;
    let mut function = Fields::at(&fields.path("function"), inner)?;
    let name = function.string("name")?.ok_or_else(|| function.missing("name", ""))?;
    let arguments = arguments(&mut function)?;
    function.finish()?;
    fields.finish()?;
    let mut call = json!({"type": "function", "function": {"name": name, "arguments": arguments}});
    if let Some(id) = id {
        call["id"] = id.into();
    }
    Ok(call)
}

/// An object, as templates want it; the API has it as a text, which models sometimes write badly.
fn arguments(function: &mut Fields) -> Result<Value, ApiError> {
    let path = function.path("arguments");
    match function.value("arguments") {
        None => Ok(json!({})),
        Some(object @ Value::Object(_)) => Ok(object),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(json!({})),
        Some(Value::String(text)) => match super::json::parse(text.as_bytes()) {
            Ok(object @ Value::Object(_)) => Ok(object),
            _ => Ok(text.into()),
        },
        Some(other) => Err(wrong_type(&path, "a JSON object as a string", &other)),
    }
}

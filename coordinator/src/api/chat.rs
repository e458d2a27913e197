//! `POST /v1/chat/completions`: messages rendered by the model's chat template, and the answer taken apart.

use super::{
    Api,
    answer::{Answer, Meta, respond},
    body::JsonBody,
    chat_answer::{ChatAnswer, ChatShape},
    choice::Choice,
    error::{ApiError, shown, shown_value},
    fields::{Fields, out_of_range},
    generation::Generation,
    messages::take_messages,
    prompt::{Prompt, check_bytes},
    run::{Run, Task},
};
use crate::{
    chat::{detokenize::Detokenizer, output::OutputFormat, template::ChatTemplate},
    serving::ServedModel,
};
use axum::{extract::State, response::Response};
use mlx_cluster_common::sampling::TOP_LOGPROBS_MAX;
use serde_json::{Map, Value, json};
use std::sync::Arc;

const TOOLS_MAX: usize = 128;
const TOOL_NAME_CHARS_MAX: usize = 64;

/// What every chat template is given anyway.
const TEMPLATE_ARGUMENTS: [&str; 4] = ["chat_template", "messages", "tools", "add_generation_prompt"];

struct ChatRequest {
    template: ChatTemplate,
    messages: Vec<Value>,
    /// None when the model shall not call any.
    tools: Option<Vec<Value>>,
    format: OutputFormat,
    template_kwargs: Map<String, Value>,
    generation: Generation,
    shape: ChatShape,
    logprobs: Option<u32>,
}

pub(super) async fn chat_completions(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<Response, ApiError> {
    let model = api.model(fields.string("model")?)?;
    let request = ChatRequest::take(fields, &model)?;
    let ChatRequest { template, messages, tools, format, template_kwargs, generation, shape, logprobs } = request;
    let its_model = Arc::clone(&model);
    let read = move || {
        let special = its_model.tokenizer.special_tokens();
        let text = template.render(&messages, tools.as_deref(), true, &template_kwargs, special)?;
        check_bytes(text.len(), &its_model)?;
        let ids = its_model.tokenizer.encode(&text, false)?;
        Prompt::new(ids, Some(text), &its_model, true)
    };
    let prompt = Arc::new(api.text.run(read).await?);
    let task = |index: u32| {
        let mut params = generation.params.clone();
        params.seed = params.seed.wrapping_add(index.into());
        params.max_tokens = prompt.max_tokens(generation.max_tokens, &model);
        params.logprobs = logprobs;
        let detokenizer = Detokenizer::new(Arc::clone(&model.tokenizer), true);
        let choice = Choice::new(detokenizer, generation.stop.clone(), params.stop_tokens.clone());
        Task { prompt: Arc::clone(&prompt), params, choice }
    };
    let tasks = (0..generation.n).map(task).collect();
    let meta = Meta::new("chatcmpl-", "chat.completion", &model, std::slice::from_ref(&prompt), &generation);
    let answer = ChatAnswer::new(&model, &prompt, &generation, format, shape);
    let run = Run::start(&api, &model, tasks).await?;
    respond(&api, run, meta, Answer::Chat(answer)).await
}

impl ChatRequest {
    fn take(mut fields: Fields, model: &ServedModel) -> Result<Self, ApiError> {
        let Some(template) = model.template.clone() else {
            return Err(no_template(model));
        };
        let messages = take_messages(&mut fields)?;
        let content = |message: &Value| message["content"].as_str().map_or(0, str::len);
        check_bytes(messages.iter().map(content).sum(), model)?;
        let (tools, parallel_tool_calls) = tools(&mut fields)?;
        let mut format = OutputFormat::of_template(template.source(tools.is_some()));
        match (&tools, format.tools) {
            (None, _) => format.tools = None,
            (Some(_), Some(_)) if template.source(true).contains("tools") => {}
            (Some(_), _) => {
                let hint = format!(" by {}: its chat template has no tool calls in a format that is known here", model.id);
                return Err(fields.unsupported("tools", hint));
            }
        }
        let template_kwargs = template_kwargs(&mut fields, template.source(tools.is_some()))?;
        let logprobs = logprobs(&mut fields)?;
        fields.only("add_generation_prompt", &[json!(true)])?;
        for name in ["continue_final_message", "add_special_tokens"] {
            fields.only(name, &[json!(false)])?;
        }
        fields.only("modalities", &[json!(["text"])])?;
        let generation = Generation::take(&mut fields, model, 1)?;
        fields.finish()?;
        let shape = ChatShape { logprobs: logprobs.is_some(), parallel_tool_calls };
        Ok(Self { template, messages, tools, format, template_kwargs, generation, shape, logprobs })
    }
}

/// The tools, and whether one answer may call several.
fn tools(fields: &mut Fields) -> Result<(Option<Vec<Value>>, bool), ApiError> {
    let tools = take_tools(fields)?;
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    let choice = fields.value("tool_choice").unwrap_or(json!("auto"));
    match choice.as_str() {
        Some("auto") => Ok((tools, parallel)),
        Some("none") => Ok((None, parallel)),
        _ => {
            let found = match &choice {
                Value::Object(_) => "a named function".to_owned(),
                other => shown_value(other),
            };
            Err(fields.unsupported("tool_choice", format!(" with {found} (only \"auto\" and \"none\")")))
        }
    }
}

/// None where there are none.
pub(super) fn take_tools(fields: &mut Fields) -> Result<Option<Vec<Value>>, ApiError> {
    let tools = fields.list("tools")?.filter(|tools| !tools.is_empty());
    if let Some(tools) = &tools {
        if tools.len() > TOOLS_MAX {
            return Err(out_of_range("tools", format!("a list of at most {TOOLS_MAX}"), tools.len()));
        }
        tools.iter().enumerate().try_for_each(|(i, tool)| check_tool(&format!("tools[{i}]"), tool.clone()))?;
    }
    Ok(tools)
}

pub(super) fn no_template(model: &ServedModel) -> ApiError {
    let message = format!("{} has no chat template; use /v1/completions", model.id);
    ApiError::Invalid { param: "messages".into(), message }
}

/// The model reads a tool as it was sent; only what the API itself relies on is checked.
fn check_tool(path: &str, tool: Value) -> Result<(), ApiError> {
    let mut fields = Fields::at(path, tool)?;
    fields.only("type", &[json!("function")])?;
    let inner = fields.value("function").ok_or_else(|| fields.missing("function", ""))?;
    let mut function = Fields::at(&fields.path("function"), inner)?;
    let name = function.string("name")?.ok_or_else(|| function.missing("name", ""))?;
    let good = |char: char| char.is_ascii_alphanumeric() || "_-.".contains(char);
    if name.is_empty() || name.len() > TOOL_NAME_CHARS_MAX || !name.chars().all(good) {
        let wanted = format!("1 to {TOOL_NAME_CHARS_MAX} letters, digits, `_`, `-` or `.`");
        return Err(out_of_range(&function.path("name"), wanted, format!("`{}`", shown(&name))));
    }
    function.string("description")?;
    function.object("parameters")?;
    // Needs a grammar over the tokens.
    function.only("strict", &[json!(false)])
}

/// Variables for the template; one that it does not look at would be ignored, and is refused.
pub(super) fn template_kwargs(fields: &mut Fields, source: &str) -> Result<Map<String, Value>, ApiError> {
    let kwargs = fields.object("chat_template_kwargs")?.unwrap_or_default();
    for name in kwargs.keys() {
        let param = format!("chat_template_kwargs.{}", shown(name));
        if TEMPLATE_ARGUMENTS.contains(&name.as_str()) {
            return Err(ApiError::Unsupported { param, hint: String::new() });
        }
        if !source.contains(name.as_str()) {
            return Err(ApiError::Unsupported { param, hint: ": the chat template of this model does not use it".into() });
        }
    }
    Ok(kwargs)
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0..=TOP_LOGPROBS_MAX.into())?;
    match (wanted, top) {
        (false, Some(top)) if top > 0 => {
            Err(ApiError::Invalid { param: "top_logprobs".into(), message: "it needs `logprobs`: true".into() })
        }
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
    }
}

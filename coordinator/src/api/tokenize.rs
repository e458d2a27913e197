//! `POST /tokenize`, as vLLM has it: the token ids of a text, or of messages rendered by the chat template, without an answer.

use super::{
    Api,
    body::JsonBody,
    chat::{no_template, take_tools, template_kwargs},
    error::ApiError,
    fields::Fields,
    messages::take_messages,
    prompt::check_bytes,
};
use crate::{chat::template::ChatTemplate, serving::ServedModel};
use axum::{Json, extract::State};
use serde_json::{Map, Value, json};
use std::sync::Arc;

enum Input {
    Text(String),
    Messages {
        template: ChatTemplate,
        messages: Vec<Value>,
        tools: Option<Vec<Value>>,
        template_kwargs: Map<String, Value>,
        add_generation_prompt: bool,
    },
}

/// `prompt`, or `messages` with `tools`, `chat_template_kwargs` and `add_generation_prompt` (true unless given). `add_special_tokens` adds
/// what the tokenizer adds to a text (true unless given) or to a rendered chat (false unless given). The answer has the ids (`tokens`),
/// their number (`count`), the longest sequence that is served (`max_model_len`), and the id that ends a text (`eos_token_id`, or null).
pub(super) async fn tokenize(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<Json<Value>, ApiError> {
    let model = api.model(fields.string("model")?)?;
    let input = Input::take(&mut fields, &model)?;
    let add_special_tokens = fields.bool("add_special_tokens")?.unwrap_or(matches!(input, Input::Text(_)));
    fields.only("return_token_strs", &[json!(false)])?;
    fields.finish()?;
    let its_model = Arc::clone(&model);
    let tokens = api.text.run(move || input.tokens(&its_model, add_special_tokens)).await?;
    let tokenizer = &model.tokenizer;
    let eos_token_id = tokenizer.special_tokens().get("eos_token").and_then(|token| tokenizer.token_id(token));
    Ok(Json(json!({"count": tokens.len(), "max_model_len": model.context_tokens, "tokens": tokens, "eos_token_id": eos_token_id})))
}

impl Input {
    fn take(fields: &mut Fields, model: &ServedModel) -> Result<Self, ApiError> {
        if let Some(text) = fields.string("prompt")? {
            check_bytes(text.len(), model)?;
            return Ok(Input::Text(text));
        }
        let template = model.template.clone().ok_or_else(|| no_template(model))?;
        let messages = take_messages(fields)?;
        let content = |message: &Value| message["content"].as_str().map_or(0, str::len);
        check_bytes(messages.iter().map(content).sum(), model)?;
        let tools = take_tools(fields)?;
        let template_kwargs = template_kwargs(fields, template.source(tools.is_some()))?;
        let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(true);
        fields.only("continue_final_message", &[json!(false)])?;
        Ok(Input::Messages { template, messages, tools, template_kwargs, add_generation_prompt })
    }

    fn tokens(self, model: &ServedModel, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
        let text = match self {
            Input::Text(text) => text,
            Input::Messages { template, messages, tools, template_kwargs, add_generation_prompt } => {
                let special = model.tokenizer.special_tokens();
                template.render(&messages, tools.as_deref(), add_generation_prompt, &template_kwargs, special)?
            }
        };
        check_bytes(text.len(), model)?;
        Ok(model.tokenizer.encode(&text, add_special_tokens)?)
    }
}

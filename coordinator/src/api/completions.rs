//! `POST /v1/completions`: text or token ids continued as they are.

use super::{
    Api,
    answer::{Answer, Meta, respond},
    body::JsonBody,
    choice::Choice,
    completion_answer::{CompletionAnswer, Echo},
    error::{ApiError, shown_value},
    fields::{Fields, as_token_id, wrong_type},
    generation::Generation,
    prompt::{Prompt, check_bytes},
    run::{Run, Task},
};
use crate::{chat::detokenize::Detokenizer, serving::ServedModel};
use axum::{extract::State, response::Response};
use mlx_cluster_common::sampling::TOP_LOGPROBS_MAX;
use serde_json::Value;
use std::sync::Arc;

/// Answers that one request may ask for.
const CHOICES_MAX: usize = 128;

struct CompletionRequest {
    prompts: Vec<PromptInput>,
    generation: Generation,
    logprobs: Option<u32>,
    echo: bool,
}

enum PromptInput {
    Text(String),
    Ids(Vec<u32>),
}

pub(super) async fn completions(State(api): State<Arc<Api>>, JsonBody(mut fields): JsonBody) -> Result<Response, ApiError> {
    let model = api.model(fields.string("model")?)?;
    let request = CompletionRequest::take(fields, &model)?;
    let CompletionRequest { prompts, generation, logprobs, echo } = request;
    let wants_answer = generation.max_tokens != Some(0);
    let its_model = Arc::clone(&model);
    let read = move || prompts.into_iter().map(|prompt| read(prompt, &its_model, wants_answer, echo)).collect::<Result<Vec<_>, ApiError>>();
    let read = api.text.run(read).await?;

    let mut tasks = Vec::new();
    let mut echoes = Vec::new();
    for (prompt, echo) in &read {
        for index in 0..generation.n {
            tasks.push(task(prompt, &model, &generation, index, logprobs, echo.is_some()));
            echoes.push(echo.clone());
        }
    }
    let prompts: Vec<Arc<Prompt>> = read.into_iter().map(|(prompt, _)| prompt).collect();
    let meta = Meta::new("cmpl-", "text_completion", &model, &prompts, &generation);
    let answer = CompletionAnswer::new(&model, &prompts, &generation, logprobs.is_some(), echoes);
    let run = Run::start(&api, &model, tasks).await?;
    respond(&api, run, meta, Answer::Completion(answer)).await
}

impl CompletionRequest {
    fn take(mut fields: Fields, model: &ServedModel) -> Result<Self, ApiError> {
        let prompts = prompts(&mut fields, model)?;
        let logprobs = fields.integer("logprobs", 0..=TOP_LOGPROBS_MAX.into())?.map(|count| count as u32);
        let echo = fields.bool("echo")?.unwrap_or(false);
        fields.only("add_special_tokens", &[Value::Bool(true)])?;
        let generation = Generation::take(&mut fields, model, 0)?;
        fields.finish()?;
        if generation.max_tokens == Some(0) && !echo {
            let message = "0 needs `echo`: true; else ask for at least one token".into();
            return Err(ApiError::Invalid { param: "max_tokens".into(), message });
        }
        let choices = prompts.len() * generation.n as usize;
        if choices > CHOICES_MAX {
            let message = format!("{} prompts with {} answers each are more than {CHOICES_MAX} answers", prompts.len(), generation.n);
            return Err(ApiError::Invalid { param: "prompt".into(), message });
        }
        Ok(Self { prompts, generation: Generation { max_tokens: Some(generation.max_tokens.unwrap_or(16)), ..generation }, logprobs, echo })
    }
}

/// A string, a list of strings, a list of token ids, or a list of lists of token ids.
fn prompts(fields: &mut Fields, model: &ServedModel) -> Result<Vec<PromptInput>, ApiError> {
    let items = match fields.value("prompt") {
        None => return Err(fields.missing("prompt", "; send a string or token ids")),
        Some(Value::String(text)) => return Ok(vec![PromptInput::Text(text)]),
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("prompt", "a string, a list of strings, or token ids", &other)),
    };
    let bounded = |items: &[Value]| {
        let message = || format!("it is a list of {}, more than {CHOICES_MAX} prompts", items.len());
        if items.len() > CHOICES_MAX { Err(ApiError::Invalid { param: "prompt".into(), message: message() }) } else { Ok(()) }
    };
    match items.first() {
        None => Err(ApiError::Invalid { param: "prompt".into(), message: "it is an empty list".into() }),
        Some(Value::Number(_)) => Ok(vec![PromptInput::Ids(ids("prompt", &items, model)?)]),
        Some(Value::String(_)) => {
            bounded(&items)?;
            let text = |(i, item): (usize, Value)| match item {
                Value::String(text) => Ok(PromptInput::Text(text)),
                other => Err(wrong_type(&format!("prompt[{i}]"), "a string like the first one", &other)),
            };
            items.into_iter().enumerate().map(text).collect()
        }
        Some(Value::Array(_)) => {
            bounded(&items)?;
            let list = |(i, item): (usize, &Value)| match item {
                Value::Array(inner) => Ok(PromptInput::Ids(ids(&format!("prompt[{i}]"), inner, model)?)),
                other => Err(wrong_type(&format!("prompt[{i}]"), "a list of token ids like the first one", other)),
            };
            items.iter().enumerate().map(list).collect()
        }
        Some(other) => {
            let message = format!("its first item is {}; strings, token ids or lists of token ids are possible", shown_value(other));
            Err(ApiError::Invalid { param: "prompt[0]".into(), message })
        }
    }
}

fn ids(path: &str, items: &[Value], model: &ServedModel) -> Result<Vec<u32>, ApiError> {
    items.iter().enumerate().map(|(i, item)| as_token_id(path, i, item, model.vocab_size)).collect()
}

type Read = (Arc<Prompt>, Option<Arc<Echo>>);

fn read(input: PromptInput, model: &ServedModel, wants_answer: bool, echo: bool) -> Result<Read, ApiError> {
    let (ids, text) = match input {
        PromptInput::Text(text) if text.is_empty() => (Vec::new(), None),
        PromptInput::Text(text) => {
            check_bytes(text.len(), model)?;
            (model.tokenizer.encode(&text, true)?, Some(text))
        }
        PromptInput::Ids(ids) => (ids, None),
    };
    let prompt = Prompt::new(ids, text, model, wants_answer)?;
    let echo = if echo { Some(Arc::new(Echo::of(&prompt, &model.tokenizer)?)) } else { None };
    Ok((Arc::new(prompt), echo))
}

fn task(prompt: &Arc<Prompt>, model: &ServedModel, generation: &Generation, index: u32, logprobs: Option<u32>, echo: bool) -> Task {
    let mut params = generation.params.clone();
    // As in vLLM: the first answer is that of a request for one.
    params.seed = params.seed.wrapping_add(index.into());
    params.max_tokens = prompt.max_tokens(generation.max_tokens, model);
    params.logprobs = logprobs;
    params.prompt_logprobs = logprobs.filter(|_| echo);
    let detokenizer = Detokenizer::after(Arc::clone(&model.tokenizer), &prompt.ids, true);
    let choice = Choice::new(detokenizer, generation.stop.clone(), params.stop_tokens.clone());
    Task { prompt: Arc::clone(prompt), params, choice }
}

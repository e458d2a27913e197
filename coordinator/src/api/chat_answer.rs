//! The answer of `/v1/chat/completions`: reasoning, content and tool calls, whole or in pieces.

use super::{completion_answer::finish_name, generation::Generation, logprobs::chat_entry, prompt::Prompt, run::Progress};
use crate::{
    chat::{
        output::{OutputEvent, OutputFormat, OutputParser},
        tokenizer::ChatTokenizer,
        tools::ToolCall,
    },
    serving::ServedModel,
};
use mlx_cluster_common::request::FinishReason;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// How a chat shall be answered, besides its tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChatShape {
    pub(super) logprobs: bool,
    /// Several tool calls in one answer.
    pub(super) parallel_tool_calls: bool,
}

/// All answers to a chat, as far as they are there.
pub(super) struct ChatAnswer {
    tokenizer: Arc<ChatTokenizer>,
    shape: ChatShape,
    return_token_ids: bool,
    prompt: Arc<Prompt>,
    choices: Vec<One>,
}

struct One {
    parser: OutputParser,
    /// So far.
    tool_calls: usize,
    done: bool,
    whole: Part,
}

/// A piece of an answer, or all of it.
#[derive(Default)]
struct Part {
    reasoning: String,
    content: String,
    /// With their index in the answer and their id.
    tool_calls: Vec<(usize, String, ToolCall)>,
    logprobs: Vec<Value>,
    token_ids: Vec<u32>,
    finish: Option<&'static str>,
}

impl ChatAnswer {
    /// `prompt.text` is what the template made of the messages; its end matters for what the answer begins with.
    pub(super) fn new(model: &ServedModel, prompt: &Arc<Prompt>, generation: &Generation, format: OutputFormat, shape: ChatShape) -> Self {
        let rendered = prompt.text.as_deref().unwrap_or_default();
        let one = |_| One { parser: OutputParser::new(format, rendered), tool_calls: 0, done: false, whole: Part::default() };
        Self {
            tokenizer: Arc::clone(&model.tokenizer),
            shape,
            return_token_ids: generation.return_token_ids,
            prompt: Arc::clone(prompt),
            choices: (0..generation.n).map(one).collect(),
        }
    }

    pub(super) fn prompt_token_ids(&self) -> Option<Value> {
        self.return_token_ids.then(|| json!(self.prompt.ids))
    }

    /// One tool call was wanted, and there it is.
    pub(super) fn is_done(&self, index: usize) -> bool {
        self.choices.get(index).is_some_and(|one| one.done)
    }

    /// Keeps what happened for the whole answer.
    pub(super) fn absorb(&mut self, index: usize, progress: Progress) {
        let Some(part) = self.part(index, progress) else { return };
        let Some(one) = self.choices.get_mut(index) else { return };
        one.whole.reasoning.push_str(&part.reasoning);
        one.whole.content.push_str(&part.content);
        one.whole.tool_calls.extend(part.tool_calls);
        one.whole.logprobs.extend(part.logprobs);
        one.whole.token_ids.extend(part.token_ids);
        one.whole.finish = part.finish.or(one.whole.finish);
    }

    /// The whole answers, as they stand in `choices`.
    pub(super) fn whole(mut self) -> Vec<Value> {
        let parts: Vec<Part> = self.choices.iter_mut().map(|one| std::mem::take(&mut one.whole)).collect();
        parts.into_iter().enumerate().map(|(index, part)| self.whole_json(index, part)).collect()
    }

    fn whole_json(&self, index: usize, part: Part) -> Value {
        let only_calls = part.content.is_empty() && !part.tool_calls.is_empty();
        let content = if only_calls { Value::Null } else { part.content.into() };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !part.reasoning.is_empty() {
            message["reasoning_content"] = part.reasoning.into();
        }
        if !part.tool_calls.is_empty() {
            message["tool_calls"] = part.tool_calls.iter().map(|(_, id, call)| tool_call(id, call)).collect();
        }
        let logprobs = if self.shape.logprobs { json!({"content": part.logprobs, "refusal": null}) } else { Value::Null };
        let mut choice = json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": part.finish});
        if self.return_token_ids {
            choice["token_ids"] = json!(part.token_ids);
        }
        choice
    }

    /// What each answer of a stream begins with.
    pub(super) fn opening(&self) -> Vec<Value> {
        let delta = || json!({"role": "assistant", "content": ""});
        let choice = |index| json!({"index": index, "delta": delta(), "logprobs": null, "finish_reason": null});
        (0..self.choices.len()).map(choice).collect()
    }

    /// What a stream sends of an event, as an entry of `choices`.
    pub(super) fn chunk(&mut self, index: usize, progress: Progress) -> Option<Value> {
        let part = self.part(index, progress)?;
        let mut delta = Map::new();
        if !part.reasoning.is_empty() {
            delta.insert("reasoning_content".into(), part.reasoning.into());
        }
        if !part.content.is_empty() {
            delta.insert("content".into(), part.content.into());
        }
        if !part.tool_calls.is_empty() {
            let call = |(index, id, call): &(usize, String, ToolCall)| {
                let mut call = tool_call(id, call);
                call["index"] = json!(index);
                call
            };
            delta.insert("tool_calls".into(), part.tool_calls.iter().map(call).collect());
        }
        let tokens = self.return_token_ids && !part.token_ids.is_empty();
        if delta.is_empty() && part.logprobs.is_empty() && part.finish.is_none() && !tokens {
            return None;
        }
        let logprobs = if part.logprobs.is_empty() { Value::Null } else { json!({"content": part.logprobs, "refusal": null}) };
        let mut choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": part.finish});
        if self.return_token_ids {
            choice["token_ids"] = json!(part.token_ids);
        }
        Some(choice)
    }

    fn part(&mut self, index: usize, progress: Progress) -> Option<Part> {
        let Progress::Piece(piece) = progress else { return None };
        let one = self.choices.get_mut(index).filter(|one| !one.done)?;
        let mut part = Part::default();
        for placed in &piece.tokens {
            part.token_ids.push(placed.token.id);
            // The token that ends the answer is no part of the message.
            if self.shape.logprobs && !placed.is_stop {
                part.logprobs.push(chat_entry(&self.tokenizer, &placed.token));
            }
        }
        let mut events = one.parser.push(&piece.text);
        if piece.finish.is_some() {
            events.extend(one.parser.finish());
        }
        for event in events {
            one.take(event, &mut part);
            if one.tool_calls > 0 && !self.shape.parallel_tool_calls {
                one.done = true;
                part.finish = Some("tool_calls");
                return Some(part);
            }
        }
        part.finish = piece.finish.map(|reason| match reason {
            FinishReason::Stop if one.tool_calls > 0 => "tool_calls",
            reason => finish_name(reason),
        });
        Some(part)
    }
}

impl One {
    fn take(&mut self, event: OutputEvent, part: &mut Part) {
        match event {
            OutputEvent::Reasoning(text) => part.reasoning.push_str(&text),
            OutputEvent::Text(text) => part.content.push_str(&text),
            OutputEvent::ToolCall(call) => {
                part.tool_calls.push((self.tool_calls, format!("call_{}", uuid::Uuid::new_v4().simple()), call));
                self.tool_calls += 1;
            }
        }
    }
}

fn tool_call(id: &str, call: &ToolCall) -> Value {
    json!({"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}})
}

//! The fields that chat and plain completions share: how tokens are chosen, when to stop, and how to answer.

use super::{
    error::ApiError,
    fields::{Fields, as_f32, as_token_id, out_of_range, wrong_type},
};
use crate::serving::ServedModel;
use mlx_cluster_common::sampling::SamplingParams;
use serde_json::{Value, json};
use std::collections::BTreeSet;

const CHOICES_PER_PROMPT_MAX: i64 = 8;
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
const STOP_TOKENS_MAX: usize = 64;
const LOGIT_BIASES_MAX: usize = 1024;
const MAX_TOKENS_MAX: i64 = i32::MAX as i64;

/// What a request asks for besides its prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Generation {
    /// Complete but for `max_tokens`, which depends on the prompt's length.
    pub(super) params: SamplingParams,
    /// Answers to each prompt.
    pub(super) n: u32,
    /// None: up to the caller.
    pub(super) max_tokens: Option<u32>,
    pub(super) stop: Vec<String>,
    pub(super) return_token_ids: bool,
    pub(super) stream: Option<Streamed>,
    /// The client's label for its logs and ours.
    pub(super) user: Option<String>,
}

/// The answer is sent in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Streamed {
    pub(super) include_usage: bool,
}

impl Generation {
    /// Takes all shared fields. `max_tokens` may be as low as `max_tokens_min`.
    pub(super) fn take(fields: &mut Fields, model: &ServedModel, max_tokens_min: i64) -> Result<Self, ApiError> {
        let params = sampling(fields, model)?;
        params.check(model.vocab_size)?;
        let n = fields.integer("n", 1..=CHOICES_PER_PROMPT_MAX)?.unwrap_or(1) as u32;
        let max_tokens = max_tokens(fields, max_tokens_min)?;
        let stop = stop_strings(fields)?;
        let return_token_ids = fields.bool("return_token_ids")?.unwrap_or(false);
        let stream = streamed(fields)?;
        let user = fields.string("user")?;
        take_harmless(fields)?;
        Ok(Self { params, n, max_tokens, stop, return_token_ids, stream, user })
    }
}

fn sampling(fields: &mut Fields, model: &ServedModel) -> Result<SamplingParams, ApiError> {
    let none = SamplingParams::default();
    // vLLM writes "all" as -1.
    let top_k = fields.integer("top_k", -1..=u32::MAX.into())?.unwrap_or(0).max(0) as u32;
    let seed = match fields.integer("seed", i64::MIN..=i64::MAX)? {
        Some(seed) => seed as u64,
        None => uuid::Uuid::new_v4().as_u64_pair().0,
    };
    Ok(SamplingParams {
        temperature: fields.number("temperature")?.unwrap_or(1.0),
        top_p: fields.number("top_p")?.unwrap_or(none.top_p),
        min_p: fields.number("min_p")?.unwrap_or(none.min_p),
        top_k,
        repetition_penalty: fields.number("repetition_penalty")?.unwrap_or(none.repetition_penalty),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(none.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(none.frequency_penalty),
        logit_bias: logit_bias(fields, model.vocab_size)?,
        seed,
        stop_tokens: stop_tokens(fields, model)?,
        ..none
    })
}

fn logit_bias(fields: &mut Fields, vocab_size: u32) -> Result<Vec<(u32, f32)>, ApiError> {
    let entries = fields.object("logit_bias")?.unwrap_or_default();
    if entries.len() > LOGIT_BIASES_MAX {
        return Err(out_of_range("logit_bias", format!("an object with at most {LOGIT_BIASES_MAX} entries"), entries.len()));
    }
    let mut biases = std::collections::BTreeMap::new();
    for (key, value) in entries {
        let param = format!("logit_bias.{}", super::error::shown(&key));
        let id = key.parse::<u32>().ok().filter(|id| *id < vocab_size);
        let wanted = || format!("for a token id from 0 to {}", vocab_size.saturating_sub(1));
        let id = id.ok_or_else(|| out_of_range("logit_bias", wanted(), super::error::shown(&key)))?;
        if biases.insert(id, as_f32(&param, &value)?).is_some() {
            return Err(ApiError::Invalid { param, message: "the same token id is there twice".into() });
        }
    }
    Ok(biases.into_iter().collect())
}

/// The model's end tokens, unless they shall be ignored, and those of the request.
fn stop_tokens(fields: &mut Fields, model: &ServedModel) -> Result<Vec<u32>, ApiError> {
    let ignore_eos = fields.bool("ignore_eos")?.unwrap_or(false);
    let mut ids = if ignore_eos { BTreeSet::new() } else { model.tokenizer.eos_ids().clone() };
    let own = fields.list("stop_token_ids")?.unwrap_or_default();
    if own.len() > STOP_TOKENS_MAX {
        return Err(out_of_range("stop_token_ids", format!("a list of at most {STOP_TOKENS_MAX}"), own.len()));
    }
    for (i, value) in own.iter().enumerate() {
        ids.insert(as_token_id("stop_token_ids", i, value, model.vocab_size)?);
    }
    Ok(ids.into_iter().filter(|id| *id < model.vocab_size).collect())
}

fn max_tokens(fields: &mut Fields, min: i64) -> Result<Option<u32>, ApiError> {
    let old = fields.integer("max_tokens", min..=MAX_TOKENS_MAX)?;
    let new = fields.integer("max_completion_tokens", min..=MAX_TOKENS_MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::Invalid {
            param: "max_completion_tokens".into(),
            message: format!("{new} contradicts max_tokens {old}; send one of them"),
        }),
        _ => Ok(new.or(old).map(|count| count as u32)),
    }
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let items = match fields.value("stop") {
        None => return Ok(Vec::new()),
        Some(text @ Value::String(_)) => vec![text],
        Some(Value::Array(items)) => items,
        Some(other) => return Err(wrong_type("stop", "a string or a list of strings", &other)),
    };
    if items.len() > STOPS_MAX {
        return Err(out_of_range("stop", format!("at most {STOPS_MAX} strings"), items.len()));
    }
    let check = |(i, item): (usize, Value)| {
        let param = format!("stop[{i}]");
        let Value::String(text) = item else { return Err(wrong_type(&param, "a string", &item)) };
        if text.is_empty() || text.len() > STOP_BYTES_MAX {
            return Err(out_of_range(&param, format!("a string of 1 to {STOP_BYTES_MAX} bytes"), format!("one of {}", text.len())));
        }
        Ok(text)
    };
    items.into_iter().enumerate().map(check).collect()
}

fn streamed(fields: &mut Fields) -> Result<Option<Streamed>, ApiError> {
    let stream = fields.bool("stream")?.unwrap_or(false);
    let options = fields.value("stream_options");
    if !stream && options.is_some() {
        return Err(ApiError::Invalid { param: "stream_options".into(), message: "it needs `stream`: true".into() });
    }
    let mut include_usage = false;
    if let Some(options) = options {
        let mut options = Fields::at("stream_options", options)?;
        include_usage = options.bool("include_usage")?.unwrap_or(false);
        options.only("include_obfuscation", &[json!(false)])?;
        options.only("continuous_usage_stats", &[json!(false)])?;
        options.finish()?;
    }
    Ok(stream.then_some(Streamed { include_usage }))
}

/// Labels that are for the client's own books, and fields of other servers as long as they ask for what happens anyway.
fn take_harmless(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["metadata", "safety_identifier", "prompt_cache_key"] {
        fields.label(name);
    }
    let no = [json!(false)];
    let yes = [json!(true)];
    let zero = [json!(0), json!(0.0)];
    let one = [json!(1), json!(1.0)];
    let harmless: [(&str, &[Value]); 14] = [
        ("store", &no),
        ("service_tier", &[json!("auto"), json!("default")]),
        ("best_of", &one),
        ("suffix", &[json!("")]),
        ("use_beam_search", &no),
        ("length_penalty", &one),
        ("min_tokens", &zero),
        ("skip_special_tokens", &yes),
        ("spaces_between_special_tokens", &yes),
        ("include_stop_str_in_output", &no),
        ("xtc_probability", &zero),
        ("repetition_context_size", &[json!(mlx_cluster_common::sampling::REPETITION_WINDOW)]),
        ("response_format", &[json!({"type": "text"})]),
        ("echo", &no),
    ];
    harmless.into_iter().try_for_each(|(name, values)| fields.only(name, values))
}

//! What of two configs makes other numbers, for the resumption of a job.

use super::{DataSource, Features, TrainingConfig, error::shown};
use crate::training::{Decay, Schedule};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A sentence for each key of `now` whose value would make other numbers than that of `before`.
pub(super) fn between(now: &TrainingConfig, before: &TrainingConfig) -> Vec<String> {
    // Arguments of two optimizers are not comparable, and what is trained in full has no ranks.
    let one_optimizer = now.optimizer.name() == before.optimizer.name();
    let both_low_rank = now.fine_tune.lora().is_some() && before.fine_tune.lora().is_some();
    let comparable = |key: &str| match key.split('.').next() {
        Some("optimizer_config") => one_optimizer,
        Some("lora_parameters") => both_low_rank,
        _ => true,
    };
    let (now, before) = (leaves(now), leaves(before));
    let keys: BTreeSet<&String> = now.keys().chain(before.keys()).filter(|key| comparable(key)).collect();
    let text = |value: Option<&Value>| value.map_or_else(|| "not set".to_owned(), shown);
    keys.into_iter()
        .map(|key| (key, now.get(key), before.get(key)))
        .filter(|(_, now, before)| now != before)
        .map(|(key, now, before)| format!("`{key}` is {}, the checkpoint was made with {}", text(now), text(before)))
        .collect()
}

/// What numbers depend on, with defaults filled in, by the path of each value.
fn leaves(config: &TrainingConfig) -> BTreeMap<String, Value> {
    let mut leaves = BTreeMap::new();
    flatten("", effective(config), &mut leaves);
    leaves
}

fn effective(config: &TrainingConfig) -> Value {
    let mut all = Map::from_iter([
        ("model".to_owned(), json!(config.model)),
        ("mask_prompt".to_owned(), json!(config.mask_prompt)),
        ("packing".to_owned(), json!(config.packing)),
        ("max_seq_length".to_owned(), json!(config.max_seq_length)),
        ("seed".to_owned(), json!(config.seed)),
        ("fine_tune_type".to_owned(), json!(config.fine_tune.name())),
        ("lora_parameters".to_owned(), decimal(json!(config.fine_tune.lora()))),
        ("num_layers".to_owned(), json!(config.num_layers.map_or(-1, i64::from))),
        ("optimizer".to_owned(), json!(config.optimizer.name())),
        ("optimizer_config".to_owned(), decimal(json!(config.optimizer))),
        ("batch_size".to_owned(), json!(config.batch_size)),
        ("grad_accumulation_steps".to_owned(), json!(config.grad_accumulation_steps)),
        // Each evaluation draws from the random numbers that order the batches of training.
        ("steps_per_eval".to_owned(), json!(config.steps_per_eval)),
        ("resume_adapter_file".to_owned(), json!(config.resume_adapter_file)),
    ]);
    all.extend(schedule(&config.schedule));
    match &config.data {
        DataSource::Named { name, features } => {
            all.insert("data".into(), json!(name));
            all.extend(named(features));
        }
        DataSource::Hub(sets) => {
            all.insert("hf_dataset".into(), json!(sets));
        }
    }
    Value::Object(all)
}

/// By the keys of a config.
fn schedule(schedule: &Schedule) -> Map<String, Value> {
    let (name, arguments) = match schedule.decay {
        Decay::Constant { rate } => return Map::from_iter([("learning_rate".to_owned(), json!(rate))]),
        Decay::Cosine { init, steps, end } => ("cosine_decay", json!([init, steps, end])),
        Decay::Exponential { init, rate } => ("exponential_decay", json!([init, rate])),
        Decay::Step { init, rate, size } => ("step_decay", json!([init, rate, size])),
        Decay::Linear { init, end, steps } => ("linear_schedule", json!([init, end, steps])),
    };
    let (steps, init) = schedule.warmup.map_or((0, None), |warmup| (warmup.steps, Some(warmup.init)));
    Map::from_iter([("lr_schedule".to_owned(), json!({"name": name, "arguments": arguments, "warmup": steps, "warmup_init": init}))])
}

fn named(features: &Features) -> Map<String, Value> {
    let Features { prompt, completion, text, chat } = features;
    [("prompt_feature", prompt), ("completion_feature", completion), ("text_feature", text), ("chat_feature", chat)]
        .into_iter()
        .map(|(key, name)| (key.to_owned(), json!(name)))
        .collect()
}

/// An f32 as it was written: 0.9, and not the f64 0.8999999761581421.
fn decimal(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            let short = number.as_f64().and_then(|number| (number as f32).to_string().parse::<f64>().ok());
            short.map_or(Value::Number(number), Value::from)
        }
        Value::Array(items) => items.into_iter().map(decimal).collect(),
        Value::Object(map) => map.into_iter().map(|(key, value)| (key, decimal(value))).collect(),
        other => other,
    }
}

fn flatten(path: &str, value: Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Null => {}
        Value::Object(map) => {
            let inner = |key: String| if path.is_empty() { key } else { format!("{path}.{key}") };
            for (key, value) in map {
                flatten(&inner(key), value, leaves);
            }
        }
        leaf => {
            leaves.insert(path.to_owned(), leaf);
        }
    }
}

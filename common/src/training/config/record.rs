//! A config as mlx-lm writes it down: every key with its value as given, else its default.

use super::Settings;
use crate::training::{Decay, FineTune};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(super) const MODEL: &str = "Qwen/Qwen3-0.6b";
pub(super) const DATA: &str = "mlx-community/WikiSQL";
pub(super) const ADAPTER_PATH: &str = "adapters";

/// mlx-lm's CONFIG_DEFAULTS.
fn defaults() -> [(&'static str, Value); 30] {
    [
        ("model", json!(MODEL)),
        ("train", json!(false)),
        ("fine_tune_type", json!("lora")),
        ("optimizer", json!("adam")),
        ("optimizer_config", json!({"adam": {}, "adamw": {}, "muon": {}, "sgd": {}, "adafactor": {}})),
        ("data", json!(DATA)),
        ("seed", json!(0)),
        ("num_layers", json!(16)),
        ("batch_size", json!(4)),
        ("iters", json!(1000)),
        ("val_batches", json!(25)),
        ("learning_rate", json!(1e-5)),
        ("steps_per_report", json!(10)),
        ("steps_per_eval", json!(200)),
        ("resume_adapter_file", Value::Null),
        ("adapter_path", json!(ADAPTER_PATH)),
        ("save_every", json!(100)),
        ("test", json!(false)),
        ("test_batches", json!(500)),
        ("max_seq_length", json!(2048)),
        ("config", Value::Null),
        ("grad_checkpoint", json!(false)),
        ("grad_accumulation_steps", json!(1)),
        ("clear_cache_threshold", json!(0)),
        ("lr_schedule", Value::Null),
        ("lora_parameters", json!({"rank": 8, "dropout": 0.0, "scale": 20.0})),
        ("mask_prompt", json!(false)),
        ("report_to", Value::Null),
        ("project_name", Value::Null),
        ("trust_remote_code", json!(false)),
    ]
}

/// Where whole numbers stand, by key and by JSON pointer within its value.
const WHOLE: [(&str, &str); 14] = [
    ("batch_size", ""),
    ("grad_accumulation_steps", ""),
    ("iters", ""),
    ("lora_parameters", "/rank"),
    ("lr_schedule", "/warmup"),
    ("max_seq_length", ""),
    ("num_layers", ""),
    ("optimizer_config", "/muon/ns_steps"),
    ("save_every", ""),
    ("seed", ""),
    ("steps_per_eval", ""),
    ("steps_per_report", ""),
    ("test_batches", ""),
    ("val_batches", ""),
];

pub(super) fn of(given: &Map<String, Value>, settings: &Settings) -> Map<String, Value> {
    let mut keys: BTreeMap<String, Value> = defaults().into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    keys.extend(given.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.clone(), value.clone())));
    keys.insert("clear_cache_threshold".into(), json!(settings.clear_cache_threshold.0));
    keys.insert("report_to".into(), if settings.tensorboard { json!("tensorboard") } else { Value::Null });
    if settings.fine_tune == FineTune::Full {
        keys.insert("lora_parameters".into(), Value::Null);
    }
    let steps = match settings.schedule.decay {
        Decay::Cosine { .. } => Some(("lr_schedule", "/arguments/1")),
        Decay::Step { .. } | Decay::Linear { .. } => Some(("lr_schedule", "/arguments/2")),
        Decay::Constant { .. } | Decay::Exponential { .. } => None,
    };
    for (key, place) in WHOLE.into_iter().chain(steps) {
        if let Some(number) = keys.get_mut(key).and_then(|value| value.pointer_mut(place)) {
            make_whole(number);
        }
    }
    keys.into_iter().collect()
}

/// Where 8.0 was accepted as 8: a float is no rank and no number of layers to whoever loads the adapter.
fn make_whole(number: &mut Value) {
    if let Some(float) = number.as_f64().filter(|_| number.is_f64()) {
        *number = json!(float as i64);
    }
}

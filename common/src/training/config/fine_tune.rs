//! `fine_tune_type` and `lora_parameters`.

use super::{
    error::TrainingConfigError as Error,
    table::{Numbers, Table},
};
use crate::training::{FineTune, LoraParameters};
use serde_json::Value;
use std::collections::BTreeSet;

pub const FINE_TUNE_TYPES: [&str; 3] = ["lora", "dora", "full"];

/// No adapter of a higher rank is a low-rank one.
const HIGHEST_RANK: i64 = 4096;

/// mlx-lm's default.
pub(super) fn default_parameters() -> LoraParameters {
    LoraParameters { rank: 8, scale: 20.0, dropout: 0.0, keys: None }
}

pub(super) fn read(config: &Table) -> Result<FineTune, Error> {
    let parameters = match config.get("lora_parameters") {
        Some(value) => parameters("lora_parameters", value)?,
        None => default_parameters(),
    };
    of_type(config, parameters)
}

/// `fine_tune_type` (lora unless given) with these parameters.
pub(super) fn of_type(config: &Table, parameters: LoraParameters) -> Result<FineTune, Error> {
    match config.name("fine_tune_type")?.unwrap_or("lora") {
        "lora" => Ok(FineTune::Lora(parameters)),
        "dora" => Ok(FineTune::Dora(parameters)),
        "full" => Ok(FineTune::Full),
        other => Err(Error::unknown_choice(config.path("fine_tune_type"), other, &FINE_TUNE_TYPES)),
    }
}

/// As in mlx-lm there are no defaults inside of `lora_parameters`.
pub(super) fn parameters(key: &str, value: &Value) -> Result<LoraParameters, Error> {
    let table = Table::of(key, value)?;
    table.only(&["keys", "rank", "scale", "dropout"], |key| match key {
        "alpha" => Some("mlx-lm's LoRA has `scale`, which is alpha / rank of other frameworks; write `scale` instead"),
        _ => None,
    })?;
    for (key, example) in [("rank", "8"), ("scale", "20.0"), ("dropout", "0.0")] {
        if table.get(key).is_none() {
            return Err(Error::missing(
                table.path(key),
                format!(": `lora_parameters` replaces all defaults, add for example `{key}: {example}`"),
            ));
        }
    }
    Ok(LoraParameters {
        rank: table.whole("rank", 0, 1..=HIGHEST_RANK)?,
        scale: table.number_f32("scale", 0.0, Numbers::Any)?,
        dropout: table.number_f32("dropout", 0.0, Numbers::Fraction)?,
        keys: keys(&table)?,
    })
}

fn keys(table: &Table) -> Result<Option<BTreeSet<String>>, Error> {
    let Some(value) = table.get("keys") else { return Ok(None) };
    let refused =
        || Error::invalid(table.path("keys"), value, "a list of module paths such as [\"self_attn.q_proj\"], or left out for all");
    let items = value.as_array().filter(|items| !items.is_empty()).ok_or_else(refused)?;
    let paths: Option<BTreeSet<String>> =
        items.iter().map(|item| item.as_str().filter(|path| !path.is_empty()).map(str::to_owned)).collect();
    paths.map(Some).ok_or_else(refused)
}

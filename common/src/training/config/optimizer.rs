//! `optimizer` and `optimizer_config`: the arguments of the constructors in mlx.optimizers, with their defaults.

use super::{
    error::TrainingConfigError as Error,
    table::{Numbers, Table},
};
use crate::training::{Optimizer, optimizer::Adafactor};
use serde_json::{Map, Value};

/// As mlx-lm calls them.
pub const OPTIMIZERS: [&str; 5] = ["adam", "adamw", "muon", "sgd", "adafactor"];

/// Checks the arguments of all optimizers, and returns the one that is asked for.
pub(super) fn read(config: &Table) -> Result<Optimizer, Error> {
    let given = config.name("optimizer")?.unwrap_or("adam");
    let name = given.to_lowercase();
    if !OPTIMIZERS.contains(&name.as_str()) {
        return Err(Error::unknown_choice(config.path("optimizer"), given, &OPTIMIZERS));
    }
    let empty = Value::Object(Map::new());
    let arguments = Table::of("optimizer_config", config.get("optimizer_config").unwrap_or(&empty))?;
    arguments.only(&OPTIMIZERS, |_| None)?;
    for (other, _) in arguments.entries() {
        arguments_of(other, &arguments, &empty)?;
    }
    arguments_of(&name, &arguments, &empty)
}

fn arguments_of<'a>(name: &str, all: &Table<'a>, empty: &'a Value) -> Result<Optimizer, Error> {
    let table = Table::of(&all.path(name), all.get(name).unwrap_or(empty))?;
    match name {
        "adamw" => adamw(&table),
        "muon" => muon(&table),
        "sgd" => sgd(&table),
        "adafactor" => adafactor(&table).map(Optimizer::Adafactor),
        _ => adam(&table),
    }
}

fn adam(table: &Table) -> Result<Optimizer, Error> {
    table.only(&["betas", "eps", "bias_correction"], hint)?;
    Ok(Optimizer::Adam {
        betas: table.pair("betas", [0.9, 0.999], Numbers::Fraction)?,
        eps: table.number("eps", 1e-8, Numbers::NotNegative)?,
        bias_correction: table.flag("bias_correction", false)?,
    })
}

fn adamw(table: &Table) -> Result<Optimizer, Error> {
    table.only(&["betas", "eps", "weight_decay", "bias_correction"], hint)?;
    Ok(Optimizer::AdamW {
        betas: table.pair("betas", [0.9, 0.999], Numbers::Fraction)?,
        eps: table.number("eps", 1e-8, Numbers::NotNegative)?,
        weight_decay: table.number("weight_decay", 0.01, Numbers::NotNegative)?,
        bias_correction: table.flag("bias_correction", false)?,
    })
}

fn muon(table: &Table) -> Result<Optimizer, Error> {
    table.only(&["momentum", "weight_decay", "nesterov", "ns_steps"], hint)?;
    Ok(Optimizer::Muon {
        momentum: table.number("momentum", 0.95, Numbers::Fraction)?,
        weight_decay: table.number("weight_decay", 0.01, Numbers::NotNegative)?,
        nesterov: table.flag("nesterov", true)?,
        ns_steps: table.whole("ns_steps", 5, 1..=100)?,
    })
}

fn sgd(table: &Table) -> Result<Optimizer, Error> {
    table.only(&["momentum", "weight_decay", "dampening", "nesterov"], hint)?;
    let momentum = table.number("momentum", 0.0, Numbers::NotNegative)?;
    let dampening = table.number("dampening", 0.0, Numbers::NotNegative)?;
    let nesterov = table.flag("nesterov", false)?;
    if nesterov && (momentum == 0.0 || dampening != 0.0) {
        let key = table.path("nesterov");
        return Err(Error::invalid(key, &Value::Bool(true), "false unless `momentum` is above 0 and `dampening` is 0"));
    }
    Ok(Optimizer::Sgd { momentum, weight_decay: table.number("weight_decay", 0.0, Numbers::NotNegative)?, dampening, nesterov })
}

fn adafactor(table: &Table) -> Result<Adafactor, Error> {
    table.only(
        &["eps", "clip_threshold", "decay_rate", "beta_1", "weight_decay", "scale_parameter", "relative_step", "warmup_init"],
        hint,
    )?;
    Ok(Adafactor {
        eps: table.pair("eps", [1e-30, 1e-3], Numbers::NotNegative)?,
        clip_threshold: table.number("clip_threshold", 1.0, Numbers::Positive)?,
        decay_rate: table.number("decay_rate", -0.8, Numbers::Any)?,
        beta_1: match table.get("beta_1") {
            Some(_) => Some(table.number("beta_1", 0.0, Numbers::Fraction)?),
            None => None,
        },
        weight_decay: table.number("weight_decay", 0.0, Numbers::NotNegative)?,
        scale_parameter: table.flag("scale_parameter", true)?,
        relative_step: table.flag("relative_step", true)?,
        warmup_init: table.flag("warmup_init", false)?,
    })
}

fn hint(key: &str) -> Option<&'static str> {
    match key {
        "learning_rate" => Some("`learning_rate` and `lr_schedule` stand at the top of the config"),
        _ => None,
    }
}

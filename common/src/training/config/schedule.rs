//! `lr_schedule`: a function of mlx/optimizers/schedulers.py by name, with its positional arguments, after a warm-up.

use super::{
    error::TrainingConfigError as Error,
    table::{MOST, Numbers, Table, number, whole},
};
use crate::training::{Decay, Schedule, Warmup};
use serde_json::Value;

pub const SCHEDULES: [&str; 4] = ["cosine_decay", "exponential_decay", "step_decay", "linear_schedule"];

/// From `lr_schedule`, else a constant `learning_rate`.
pub(super) fn read(config: &Table) -> Result<Schedule, Error> {
    let rate = config.number("learning_rate", 1e-5, Numbers::NotNegative)?;
    let Some(value) = config.get("lr_schedule") else { return Ok(Schedule::constant(rate)) };
    let table = Table::of("lr_schedule", value)?;
    table.only(&["name", "warmup", "warmup_init", "arguments"], |_| None)?;
    let name = table.name("name")?.ok_or_else(|| Error::missing(table.path("name"), format!(": one of {}", SCHEDULES.join(", "))))?;
    if !SCHEDULES.contains(&name) {
        return Err(Error::unknown_choice(table.path("name"), name, &SCHEDULES));
    }
    let decay = decay(name, &table)?;
    let init = table.number("warmup_init", 0.0, Numbers::NotNegative)?;
    let steps = table.whole("warmup", 0, 0..=MOST)?;
    Ok(Schedule { warmup: (steps > 0).then_some(Warmup { init, steps }), decay })
}

fn decay(name: &str, table: &Table) -> Result<Decay, Error> {
    let key = table.path("arguments");
    let wanted = match name {
        "cosine_decay" => "a list [init, decay_steps] or [init, decay_steps, end]",
        "exponential_decay" => "a list [init, decay_rate]",
        "step_decay" => "a list [init, decay_rate, step_size]",
        _ => "a list [init, end, steps]",
    };
    let given = table.get("arguments").ok_or_else(|| Error::missing(key.clone(), format!(": {name} takes {wanted}")))?;
    let items = given.as_array().map(Vec::as_slice).unwrap_or_default();
    let argument = |i: usize| format!("{key}[{i}]");
    let rate = |i: usize, value: &Value| number(argument(i), value, Numbers::NotNegative);
    let factor = |i: usize, value: &Value| number(argument(i), value, Numbers::Positive);
    let steps = |i: usize, value: &Value| whole(argument(i), value, 1..=MOST);
    match (name, items) {
        ("cosine_decay", [init, n]) => Ok(Decay::Cosine { init: rate(0, init)?, steps: steps(1, n)?, end: 0.0 }),
        ("cosine_decay", [init, n, end]) => Ok(Decay::Cosine { init: rate(0, init)?, steps: steps(1, n)?, end: rate(2, end)? }),
        ("exponential_decay", [init, by]) => Ok(Decay::Exponential { init: rate(0, init)?, rate: factor(1, by)? }),
        ("step_decay", [init, by, size]) => Ok(Decay::Step { init: rate(0, init)?, rate: factor(1, by)?, size: steps(2, size)? }),
        ("linear_schedule", [init, end, n]) => Ok(Decay::Linear { init: rate(0, init)?, end: rate(1, end)?, steps: steps(2, n)? }),
        _ => Err(Error::invalid(key, given, format!("what {name} takes: {wanted}"))),
    }
}

//! The configuration of a training job: mlx-lm's keys (`lora.py`, CONFIG_DEFAULTS) with their defaults and meanings, each value checked.

mod data_set;
mod differences;
mod error;
mod fine_tune;
mod optimizer;
mod record;
mod schedule;
mod table;

pub use data_set::{DataSource, Features, HubDataSet};
pub use error::TrainingConfigError;
pub use fine_tune::FINE_TUNE_TYPES;
pub use optimizer::OPTIMIZERS;
pub use schedule::SCHEDULES;

use super::{FineTune, Optimizer, Parallel, Schedule, TrainingRole};
use crate::units::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{ops::Deref, path::PathBuf};
use table::{MOST, Table};

/// What a job is told, by mlx-lm's keys. It is made from such keys alone ([`TrainingConfig::parse`], serde) and cannot be changed
/// piecemeal, so that its [`Settings`] and the record written beside the adapter never differ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct TrainingConfig {
    settings: Settings,
    /// All keys, as given or defaulted, sorted.
    record: Map<String, Value>,
}

/// What the keys of a config say.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// A folder or a repository on the hub.
    pub model: String,
    pub train: bool,
    /// Evaluate on the test split, after training where there is some.
    pub test: bool,
    pub data: DataSource,
    /// Only the answer counts in the loss.
    pub mask_prompt: bool,
    /// Short examples share rows of up to `max_seq_length` tokens. Not mlx-lm's.
    pub packing: bool,
    /// In tokens; longer examples are cut.
    pub max_seq_length: u32,
    /// Of the order of batches, of new adapters and of dropout.
    pub seed: u32,
    pub fine_tune: FineTune,
    /// Of the model's last layers; None: all.
    pub num_layers: Option<u32>,
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    /// Examples in a batch, over all replicas.
    pub batch_size: u32,
    /// In batches.
    pub iters: u64,
    /// Batches for each update of the parameters.
    pub grad_accumulation_steps: u32,
    /// None: all.
    pub val_batches: Option<u64>,
    /// None: all.
    pub test_batches: Option<u64>,
    /// In batches, as the next two.
    pub steps_per_report: u64,
    pub steps_per_eval: u64,
    pub save_every: u64,
    /// A folder; empty when a model is tested without an adapter.
    pub adapter_path: PathBuf,
    /// Weights to start from.
    pub resume_adapter_file: Option<PathBuf>,
    /// Keeps the input of each layer alone and computes the rest again on the way back.
    pub grad_checkpoint: bool,
    /// MLX's spare buffers are freed after a step when they hold more than this.
    pub clear_cache_threshold: Bytes,
    /// TensorBoard event files are written (`report_to`).
    pub tensorboard: bool,
    /// How the run is called in reports.
    pub project_name: Option<String>,
}

/// All keys of a config. Each is one of mlx-lm's except `packing`.
pub const KEYS: [&str; 36] = [
    "adapter_path",
    "batch_size",
    "chat_feature",
    "clear_cache_threshold",
    "completion_feature",
    "config",
    "data",
    "fine_tune_type",
    "grad_accumulation_steps",
    "grad_checkpoint",
    "hf_dataset",
    "iters",
    "learning_rate",
    "lora_parameters",
    "lr_schedule",
    "mask_prompt",
    "max_seq_length",
    "model",
    "num_layers",
    "optimizer",
    "optimizer_config",
    "packing",
    "project_name",
    "prompt_feature",
    "report_to",
    "resume_adapter_file",
    "save_every",
    "seed",
    "steps_per_eval",
    "steps_per_report",
    "test",
    "test_batches",
    "text_feature",
    "train",
    "trust_remote_code",
    "val_batches",
];

impl TrainingConfig {
    /// As mlx-lm merges: a key that is not there, or null, has its default; a mapping that is there replaces the default's whole.
    pub fn parse(given: &Map<String, Value>) -> Result<Self, TrainingConfigError> {
        let table = Table::root(given);
        table.only(&KEYS, |key| match key {
            "strategy" => Some("how a job is spread is told by `--strategy`"),
            "lr" => Some("mlx-lm calls it `learning_rate`"),
            "lora_layers" => Some("mlx-lm calls it `num_layers` now"),
            "rank" | "scale" | "dropout" | "alpha" | "keys" => Some("it belongs into `lora_parameters`"),
            "warmup" | "warmup_init" | "arguments" => Some("it belongs into `lr_schedule`"),
            "weight_decay" | "betas" | "eps" | "momentum" => Some("it belongs into `optimizer_config`, under the name of the optimizer"),
            _ => None,
        })?;
        let settings = Settings::read(&table)?;
        Ok(Self { record: record::of(given, &settings), settings })
    }

    /// What mlx-lm writes as `adapter_config.json`, and reads back to load the adapter: all keys, sorted.
    pub fn adapter_config(&self) -> Map<String, Value> {
        self.record.clone()
    }

    /// The same for an adapter that was trained otherwise: `config` is its `adapter_config.json`.
    pub fn for_adapter(&self, config: &Map<String, Value>) -> Result<Self, TrainingConfigError> {
        let mut keys = self.record.clone();
        for key in ["fine_tune_type", "num_layers", "lora_parameters"] {
            // mlx-lm takes all layers for any number below 1.
            let value = config.get(key).cloned().unwrap_or(Value::Null);
            let is_all = key == "num_layers" && value.as_i64().is_some_and(|number| number < 1);
            keys.insert(key.to_owned(), if is_all { Value::from(-1) } else { value });
        }
        Self::parse(&keys)
    }

    pub fn role(&self, parallel: Parallel) -> TrainingRole {
        TrainingRole {
            fine_tune: self.fine_tune.clone(),
            num_layers: self.num_layers,
            optimizer: self.optimizer.clone(),
            schedule: self.schedule.clone(),
            seed: u64::from(self.seed),
            grad_checkpoint: self.grad_checkpoint,
            clear_cache_threshold: self.clear_cache_threshold,
            parallel,
        }
    }

    /// What of this config would make other numbers than `made_with`, the config of a checkpoint: a sentence each.
    pub fn differences(&self, made_with: &TrainingConfig) -> Vec<String> {
        differences::between(self, made_with)
    }
}

impl Deref for TrainingConfig {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.settings
    }
}

impl TryFrom<Map<String, Value>> for TrainingConfig {
    type Error = TrainingConfigError;

    fn try_from(given: Map<String, Value>) -> Result<Self, TrainingConfigError> {
        Self::parse(&given)
    }
}

impl From<TrainingConfig> for Map<String, Value> {
    fn from(config: TrainingConfig) -> Self {
        config.record
    }
}

impl Settings {
    fn read(table: &Table) -> Result<Self, TrainingConfigError> {
        refuse_remote_code(table)?;
        table.text("config")?;
        let (train, test) = (table.flag("train", false)?, table.flag("test", false)?);
        if !train && !test {
            return Err(TrainingConfigError::Contradiction(
                "neither `train` nor `test` is true: set one of them, or pass --train or --test".into(),
            ));
        }
        let data = data_set::read(table, record::DATA)?;
        if let (true, DataSource::Hub(sets)) = (test, &data)
            && let Some(set) = sets.iter().find(|set| set.test_split.is_none())
        {
            return Err(TrainingConfigError::missing(format!("hf_dataset `{}`: test_split", set.path), ", and `test` is true"));
        }
        let count = |key: &str, default: u64| table.whole(key, default, 1..=MOST);
        Ok(Self {
            model: table.name("model")?.unwrap_or(record::MODEL).to_owned(),
            train,
            test,
            data,
            mask_prompt: table.flag("mask_prompt", false)?,
            packing: table.flag("packing", false)?,
            max_seq_length: table.whole("max_seq_length", 2048, 2..=LONGEST)?,
            seed: table.whole("seed", 0, 0..=MOST)?,
            fine_tune: fine_tune::read(table)?,
            num_layers: table.whole_or_all("num_layers", 16)?,
            optimizer: optimizer::read(table)?,
            schedule: schedule::read(table)?,
            batch_size: table.whole("batch_size", 4, 1..=LARGEST_BATCH)?,
            iters: count("iters", 1000)?,
            grad_accumulation_steps: table.whole("grad_accumulation_steps", 1, 1..=MOST)?,
            val_batches: table.whole_or_all("val_batches", 25)?,
            test_batches: table.whole_or_all("test_batches", 500)?,
            steps_per_report: count("steps_per_report", 10)?,
            steps_per_eval: count("steps_per_eval", 200)?,
            save_every: count("save_every", 100)?,
            adapter_path: adapter_path(table, train)?,
            resume_adapter_file: table.name("resume_adapter_file")?.map(PathBuf::from),
            grad_checkpoint: table.flag("grad_checkpoint", false)?,
            clear_cache_threshold: size(table, "clear_cache_threshold")?,
            tensorboard: reports_to_tensorboard(table)?,
            project_name: project_name(table)?,
        })
    }
}

/// In tokens.
const LONGEST: i64 = 1 << 24;
const LARGEST_BATCH: i64 = 1 << 20;

fn refuse_remote_code(table: &Table) -> Result<(), TrainingConfigError> {
    match table.flag("trust_remote_code", false)? {
        true => Err(TrainingConfigError::Refused {
            key: "trust_remote_code".into(),
            value: "true".into(),
            reason: "mlx-cluster never runs code that comes with a model; leave the key out",
        }),
        false => Ok(()),
    }
}

fn adapter_path(table: &Table, train: bool) -> Result<PathBuf, TrainingConfigError> {
    match table.text("adapter_path")? {
        Some("") if train => {
            Err(TrainingConfigError::invalid(table.path("adapter_path"), &Value::from(""), "a folder when `train` is true"))
        }
        path => Ok(path.unwrap_or(record::ADAPTER_PATH).into()),
    }
}

/// Bytes, or a text such as `2GB`.
fn size(table: &Table, key: &str) -> Result<Bytes, TrainingConfigError> {
    let refused =
        |value: &Value| TrainingConfigError::invalid(table.path(key), value, "a number of bytes from 0, or a text such as \"2GB\"");
    match table.get(key) {
        None => Ok(Bytes(0)),
        Some(Value::String(text)) => text.parse().map_err(|_| refused(&Value::from(text.as_str()))),
        Some(value) => value.as_u64().map(Bytes).ok_or_else(|| refused(value)),
    }
}

/// The name of a folder.
fn project_name(table: &Table) -> Result<Option<String>, TrainingConfigError> {
    let Some(name) = table.name("project_name")? else { return Ok(None) };
    match name.contains(['/', '\\']) || name.chars().any(char::is_control) || matches!(name, "." | "..") {
        true => Err(TrainingConfigError::invalid(table.path("project_name"), &Value::from(name), "a name without slashes")),
        false => Ok(Some(name.to_owned())),
    }
}

/// `report_to` as mlx-lm takes it (names with commas between), or a list.
fn reports_to_tensorboard(table: &Table) -> Result<bool, TrainingConfigError> {
    let refused = |value: &Value| TrainingConfigError::invalid(table.path("report_to"), value, "\"tensorboard\" or left out");
    let names: Vec<&str> = match table.get("report_to") {
        None => Vec::new(),
        Some(Value::String(names)) => names.split(',').collect(),
        Some(list @ Value::Array(items)) => items.iter().map(Value::as_str).collect::<Option<_>>().ok_or_else(|| refused(list))?,
        Some(other) => return Err(refused(other)),
    };
    let mut found = false;
    for name in names.into_iter().map(str::trim).filter(|name| !name.is_empty()) {
        match name.to_lowercase().as_str() {
            "tensorboard" => found = true,
            "wandb" | "swanlab" => {
                return Err(TrainingConfigError::Refused {
                    key: table.path("report_to"),
                    value: error::shown(&Value::from(name)),
                    reason: "mlx-cluster reports to no service; metrics.jsonl is always written, and `report_to: tensorboard` writes event files",
                });
            }
            _ => return Err(TrainingConfigError::unknown_choice(table.path("report_to"), name, &["tensorboard"])),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;

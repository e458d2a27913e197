//! An `adapter_config.json` read back, ours or mlx-lm's.

use super::{error::TrainingConfigError as Error, fine_tune, table::Table};
use crate::training::FineTune;
use serde_json::{Map, Value};

/// What of an `adapter_config.json` says how to put the adapter on its model. All else there is the record of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    pub fine_tune: FineTune,
    /// Of the model's last layers; None: all.
    pub num_layers: Option<u32>,
    /// The model that it was made for, as the run called it.
    pub model: Option<String>,
}

impl AdapterConfig {
    pub fn parse(config: &Map<String, Value>) -> Result<Self, Error> {
        let table = Table::root(config);
        let needed =
            |key: &str| table.get(key).ok_or_else(|| Error::missing(key.to_owned(), ": this is not an adapter_config.json of mlx-lm"));
        let fine_tune = match table.name("fine_tune_type")? {
            Some("full") => FineTune::Full,
            _ => fine_tune::of_type(&table, fine_tune::parameters("lora_parameters", needed("lora_parameters")?)?)?,
        };
        Ok(Self { fine_tune, num_layers: num_layers(&table)?, model: table.name("model")?.map(str::to_owned) })
    }
}

/// mlx-lm takes `layers[-max(num_layers, 0):]`: all of them for 0 and below.
fn num_layers(table: &Table) -> Result<Option<u32>, Error> {
    let value =
        table.get("num_layers").ok_or_else(|| Error::missing("num_layers".into(), ": this is not an adapter_config.json of mlx-lm"))?;
    match value.as_i64() {
        Some(..=0) => Ok(None),
        Some(number) if let Ok(number) = u32::try_from(number) => Ok(Some(number)),
        _ => Err(Error::invalid("num_layers".into(), value, "a whole number")),
    }
}

//! `data`, `hf_dataset` and the names of a row's features.

use super::{error::TrainingConfigError as Error, table::Table};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where the examples come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataSource {
    /// A folder with `{train,valid,test}.jsonl`, or a data set on the Hugging Face hub.
    Named { name: String, features: Features },
    /// mlx-lm's `hf_dataset`: one after the other.
    Hub(Vec<HubDataSet>),
}

/// The keys of a row under which its parts stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    pub prompt: String,
    pub completion: String,
    pub text: String,
    pub chat: String,
}

/// An entry of `hf_dataset`. Splits are written as the `datasets` library takes them: `train[:80%]`, `train[-100:]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubDataSet {
    pub path: String,
    /// Which configuration of the data set, where it has several.
    pub config_name: Option<String>,
    /// A branch, tag or commit.
    pub revision: Option<String>,
    pub train_split: String,
    pub valid_split: String,
    pub test_split: Option<String>,
    pub features: Features,
}

const FEATURES: [&str; 4] = ["prompt_feature", "completion_feature", "text_feature", "chat_feature"];

pub(super) fn read(config: &Table, default: &str) -> Result<DataSource, Error> {
    let Some(value) = config.get("hf_dataset") else {
        let name = config.name("data")?.unwrap_or(default).to_owned();
        return Ok(DataSource::Named { name, features: features(config)? });
    };
    if let Some(key) = FEATURES.into_iter().find(|key| config.get(key).is_some()) {
        return Err(Error::Contradiction(format!(
            "`{key}` names a feature of `data`: with `hf_dataset` write it into the entry of the data set"
        )));
    }
    let entries = match value {
        Value::Array(entries) => entries.iter().enumerate().map(|(i, entry)| hub(&format!("hf_dataset[{i}]"), entry)).collect(),
        entry => hub("hf_dataset", entry).map(|set| vec![set]),
    }?;
    if entries.is_empty() {
        return Err(Error::invalid("hf_dataset".into(), value, "a mapping with `path`, or a list of at least one"));
    }
    Ok(DataSource::Hub(entries))
}

fn hub(key: &str, value: &Value) -> Result<HubDataSet, Error> {
    let table = Table::of(key, value)?;
    let [prompt, completion, text, chat] = FEATURES;
    table.only(&["path", "config", "train_split", "valid_split", "test_split", prompt, completion, text, chat], |key| match key {
        "mask_prompt" => Some("`mask_prompt` stands at the top of the config"),
        "name" => Some("the name of a configuration goes to `config: {name: …}`"),
        _ => None,
    })?;
    let text = |key: &str, default: &str| table.name(key).map(|given| given.unwrap_or(default).to_owned());
    let (config_name, revision) = match table.get("config") {
        None => (None, None),
        Some(value) => {
            let config = Table::of(&table.path("config"), value)?;
            config.only(&["name", "revision"], |_| None)?;
            (config.name("name")?.map(str::to_owned), config.name("revision")?.map(str::to_owned))
        }
    };
    Ok(HubDataSet {
        path: table
            .name("path")?
            .map(str::to_owned)
            .ok_or_else(|| Error::missing(table.path("path"), ": the name of a data set on the hub"))?,
        config_name,
        revision,
        train_split: text("train_split", "train[:80%]")?,
        valid_split: text("valid_split", "train[-10%:]")?,
        test_split: table.name("test_split")?.map(str::to_owned),
        features: features(&table)?,
    })
}

fn features(table: &Table) -> Result<Features, Error> {
    let [prompt, completion, text, chat] = FEATURES;
    let name = |key: &str, default: &str| table.name(key).map(|given| given.unwrap_or(default).to_owned());
    Ok(Features {
        prompt: name(prompt, "prompt")?,
        completion: name(completion, "completion")?,
        text: name(text, "text")?,
        chat: name(chat, "messages")?,
    })
}

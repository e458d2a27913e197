//! Why there is no data set, each with the place and the next step.

use super::split::SplitError;
use crate::chat::{template::TemplateError, tokenizer::TokenizerError};
use mlx_cluster_common::units::Bytes;
use mlx_cluster_hub::{HubError, HubErrorKind, ModelRefError};
use std::{io, path::PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("`data` is empty: give a folder with train.jsonl, or a data set on the hub as owner/name")]
    NoSource,
    #[error("{} is a file: give the folder that holds train.jsonl, valid.jsonl and test.jsonl", path.display())]
    NotAFolder { path: PathBuf },
    #[error(transparent)]
    Name(#[from] ModelRefError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is {} long; at most {} are accepted: split it", path.display(), Bytes(*bytes), Bytes(*limit))]
    FileTooLarge { path: PathBuf, bytes: u64, limit: u64 },
    #[error("{name} has no rows: add examples, or remove it")]
    Empty { name: String },
    #[error("{place} has no {file}: training needs one example a line in it")]
    NoTrainingSet { place: String, file: String },
    #[error("{place} has no {file}: the test needs one example a line in it")]
    NoTestSet { place: String, file: String },
    #[error(
        "`hf_dataset.config.name` is `{name}`, but of {path} only JSON lines at the top are read, which no configuration chooses from: leave \
         it out and name splits (train_split, valid_split, test_split), or save that configuration as JSON lines and give the folder"
    )]
    NoConfigurations { path: String, name: String },
    #[error("`hf_dataset.config.revision` is `{revision}`, but {path} is a folder, which has no revisions: leave it out")]
    FolderRevision { path: String, revision: String },
    #[error("the data set {path} has no test_split: name one, such as `test_split: test`")]
    NoTestSplit { path: String },
    #[error(
        "{place} has no JSON lines for the split `{split}` (looked for {split}.jsonl and {split}-00000-of-00001.jsonl at the top; it holds \
         {holds}): name another split, or convert or copy the data to such a file and give its folder"
    )]
    NoSplit { place: String, split: String, holds: String },
    #[error(
        "{place} holds its data as parquet ({example}), which is not read: convert it to JSON lines, in Python with \
         `datasets.load_dataset(\"{place}\", split=\"train\").to_json(\"train.jsonl\")`, and give the folder"
    )]
    Parquet { place: String, example: String },
    #[error(transparent)]
    Split(#[from] SplitError),
    #[error("{}, line {line}{fault}{}", path.display(), more(*bad_lines))]
    Rows { path: PathBuf, line: u64, fault: RowFault, bad_lines: u64 },
    #[error("{}: mask_prompt is not supported for text data, which has no prompt: unset it, or give prompts and completions", path.display())]
    TextHasNoPrompt { path: PathBuf },
    #[error("{}: the model has no chat template, which {form} data needs: take an instruction-tuned model, or give text data", path.display())]
    NoTemplate { path: PathBuf, form: &'static str },
    #[error("{} names no eos_token that its tokenizer knows, which ends each text: correct tokenizer_config.json", folder.display())]
    NoEos { folder: PathBuf },
    #[error("max_seq_length is {given}: give at least 2, an input and its target")]
    SequenceTooShort { given: usize },
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("reading the data set was cancelled")]
    Cancelled,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum RowFault {
    #[error(", column {column}: not JSON ({detail}): give one JSON object a line")]
    NotJson { column: usize, detail: String },
    #[error(": empty: remove the line")]
    Blank,
    #[error(": {} long; at most {} are accepted: split the example", Bytes(*bytes), Bytes(*limit))]
    TooLong { bytes: u64, limit: u64 },
    #[error(": {found} instead of an object: give one JSON object a line")]
    NotAnObject { found: &'static str },
    #[error(
        ": the row has neither {wanted}; its fields are {found}: name the fields of your data with prompt_feature and completion_feature, \
         chat_feature or text_feature"
    )]
    UnknownForm { wanted: String, found: String },
    #[error(": no `{key}`, which the first row has: give all rows the same form")]
    Missing { key: String },
    #[error(": `{key}` is {found} instead of a text")]
    NotText { key: String, found: &'static str },
    #[error(": `{key}` is {found} instead of a list of messages, each an object with a text as its `role`")]
    NotMessages { key: String, found: &'static str },
    #[error(": `tools` is {found} instead of a list of objects")]
    NotTools { found: &'static str },
    #[error(
        ": no message of the assistant in `{key}`, so that with mask_prompt nothing would be learned: add the answer, or unset mask_prompt"
    )]
    NoAssistant { key: String },
    #[error(": it gives no token: remove the row")]
    NoTokens,
    #[error(": {0}")]
    Template(TemplateError),
    #[error(": {0}")]
    Tokenizer(TokenizerError),
}

impl DataError {
    /// The coarse cause.
    pub fn kind(&self) -> HubErrorKind {
        match self {
            DataError::Hub(error) => error.kind(),
            DataError::NoSource
            | DataError::Name(_)
            | DataError::NoTrainingSet { .. }
            | DataError::NoTestSet { .. }
            | DataError::NoSplit { .. } => HubErrorKind::NotFound,
            DataError::Cancelled => HubErrorKind::Resources,
            _ => HubErrorKind::BadFile,
        }
    }
}

fn more(bad_lines: u64) -> String {
    if bad_lines > 1 { format!(" ({bad_lines} lines are bad in all)") } else { String::new() }
}

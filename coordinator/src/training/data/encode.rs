//! From a row to tokens, as mlx-lm's `TextDataset`, `CompletionsDataset` and `ChatDataset` do it with a Hugging Face tokenizer.

use super::{
    error::{DataError, RowFault},
    form::{Content, is_assistant},
};
use crate::chat::{
    template::ChatTemplate,
    tokenizer::{ChatTokenizer, SpecialTokens},
};
use mlx_cluster_hub::{JsonFileError, read_config};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Pairs of tokens by which mlx-lm knows that a model thinks (`_infer_thinking` of `mlx_lm/tokenizer_utils.py`).
const THINKING: [&[&str]; 5] = [
    &["<think>", "</think>"],
    &["<longcat_think>", "</longcat_think>"],
    &["<|think:start|>", "<|think:end|>"],
    &["<|channel>", "<channel|>"],
    &["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"],
];

/// The text side of a model folder, for training. Usable from many threads.
#[derive(Debug)]
pub struct Encoder {
    folder: PathBuf,
    tokenizer: ChatTokenizer,
    template: Option<ChatTemplate>,
    special: SpecialTokens,
    eos: Option<u32>,
    variables: Map<String, Value>,
}

impl Encoder {
    /// Loads tokenizer and chat template of a model folder. Blocks.
    ///
    /// # Errors
    /// Files that are missing or malformed. A model without a chat template is no error before a chat is to be encoded.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let tokenizer = ChatTokenizer::load(folder)?;
        let template = ChatTemplate::load(folder)?;
        let config = config(folder, "tokenizer_config.json")?;
        let mut special = tokenizer.special_tokens().clone();
        if config.get("added_tokens_decoder").is_none() {
            // The older way to write them down; transformers lets it win then.
            let map = self::config(folder, "special_tokens_map.json")?;
            let newer = SpecialTokens::from_config(&map);
            special = special.iter().chain(newer.iter()).collect();
        }
        let id = |name: &str| tokenizer.token_id(special.get(name)?);
        let eos = id("eos_token");
        let thinks = THINKING.iter().any(|tokens| tokens.iter().all(|token| tokenizer.token_id(token).is_some()));
        let variables = Map::from_iter([("enable_thinking".to_owned(), thinks.into())]);
        Ok(Self { folder: folder.to_owned(), tokenizer, template, special, eos, variables })
    }

    pub(super) fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The token that ends a text.
    pub(super) fn eos(&self) -> Result<u32, DataError> {
        self.eos.ok_or_else(|| DataError::NoEos { folder: self.folder.clone() })
    }

    /// The tokens of a row, and how many of them are its prompt: 0 without `mask_prompt`.
    pub(super) fn encode(&self, content: &Content, mask_prompt: bool) -> Result<(Vec<u32>, u32), RowFault> {
        let (tokens, offset) = match content {
            Content::Text(text) => (self.text(text)?, 0),
            Content::Chat { messages, tools } => {
                let tokens = self.chat(messages, tools.as_deref(), false)?;
                let offset = if mask_prompt { self.prompt_len(messages, tools.as_deref())? } else { 0 };
                (tokens, offset)
            }
        };
        if tokens.is_empty() { Err(RowFault::NoTokens) } else { Ok((tokens, offset)) }
    }

    fn text(&self, text: &str) -> Result<Vec<u32>, RowFault> {
        // transformers passes over add_bos_token and add_eos_token where there is a tokenizer.json, which says what comes around.
        let mut tokens = self.tokenizer.encode_verbatim(text, true).map_err(RowFault::Tokenizer)?;
        if let Some(eos) = self.eos
            && !tokens.is_empty()
            && tokens.last() != Some(&eos)
        {
            tokens.push(eos);
        }
        Ok(tokens)
    }

    fn chat(&self, messages: &[Value], tools: Option<&[Value]>, add_generation_prompt: bool) -> Result<Vec<u32>, RowFault> {
        // Whoever reads a set says before the first row that there is no template.
        let Some(template) = &self.template else { return Ok(Vec::new()) };
        let text = template.render(messages, tools, add_generation_prompt, &self.variables, &self.special).map_err(RowFault::Template)?;
        self.tokenizer.encode_verbatim(&text, false).map_err(RowFault::Tokenizer)
    }

    /// As mlx-lm has it, the last message is what is learned, whoever says it. A chat of one message has no prompt.
    fn prompt_len(&self, messages: &[Value], tools: Option<&[Value]>) -> Result<u32, RowFault> {
        match messages {
            [] | [_] => Ok(0),
            [prompt @ .., last] => Ok(self.chat(prompt, tools, is_assistant(last))?.len() as u32),
        }
    }
}

/// A configuration file of the model, or null when it has none of that name.
fn config(folder: &Path, name: &str) -> Result<Value, DataError> {
    match read_config(&folder.join(name)) {
        Ok(config) => Ok(config),
        Err(JsonFileError::Missing { .. }) => Ok(Value::Null),
        Err(error) => Err(DataError::Hub(error.into())),
    }
}

#[cfg(test)]
mod tests;

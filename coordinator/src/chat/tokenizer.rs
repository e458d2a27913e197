//! The tokenizer of a model folder: text to token ids and back, special tokens, end-of-sequence ids, and the bytes of single tokens.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use mlx_cluster_common::config::parse_json;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::read_small_file;

/// Largest accepted `tokenizer.json`; the largest in use are about 35 MB.
pub const MAX_TOKENIZER_BYTES: u64 = 64 << 20;

/// Why a tokenizer cannot be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The folder has no `tokenizer.json`.
    #[error(
        "{} has no tokenizer.json; download the model again, or take a version of it that has one \
         (tokenizer.model alone is not enough)", folder.display()
    )]
    Missing {
        /// The model folder.
        folder: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// `tokenizer.json` is larger than any real one.
    #[error("{} is {bytes} bytes long; at most {MAX_TOKENIZER_BYTES} are accepted", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// A file does not hold what it should.
    #[error("{} is not usable: {detail}; download the model again", path.display())]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A text or ids that the loaded tokenizer cannot handle.
    #[error("the tokenizer failed: {detail}")]
    Failed {
        /// What it says.
        detail: String,
    },
}

/// The special tokens of a model by their name in `tokenizer_config.json` (`bos_token`, `eos_token`, ...).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<String, String>);

impl SpecialTokens {
    const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

    /// Takes them from a parsed `tokenizer_config.json`, where each is a text or an object with `content`; null is absent.
    pub fn from_config(config: &Value) -> Self {
        let text = |name: &str| {
            let entry = config.get(name)?;
            entry.as_str().or_else(|| entry.get("content")?.as_str())
        };
        Self(Self::NAMES.iter().filter_map(|name| Some(((*name).to_owned(), text(name)?.to_owned()))).collect())
    }

    /// The text of one, by its name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All that the model has, as (name, text).
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }
}

impl<N: Into<String>, T: Into<String>> FromIterator<(N, T)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (N, T)>>(tokens: I) -> Self {
        Self(tokens.into_iter().map(|(name, text)| (name.into(), text.into())).collect())
    }
}

/// How a vocabulary writes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ByteStyle {
    /// GPT-2's alphabet: each byte is one printable character, a space is `Ġ`.
    ByteLevel,
    /// SentencePiece: a space is `▁`, and bytes without a token of their own are `<0xNN>`.
    SentencePiece,
    /// The token is its text.
    Plain,
}

/// One token as the `logprobs` of the API show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenText {
    /// The text; parts that are not UTF-8 on their own are U+FFFD.
    pub text: String,
    /// The exact bytes.
    pub bytes: Vec<u8>,
}

/// A loaded tokenizer. Usable from many threads.
#[derive(Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    special: SpecialTokens,
    special_ids: BTreeSet<u32>,
    bos: Option<u32>,
    eos: BTreeSet<u32>,
    vocab_size: u32,
    style: ByteStyle,
    /// The decoder is GPT-2's alone, so text can be put together from bytes without it.
    pub(super) bytes_decode: bool,
}

impl ChatTokenizer {
    /// Loads `tokenizer.json`, and `tokenizer_config.json`, `generation_config.json` and `config.json` where they exist.
    ///
    /// # Errors
    /// Everything in [`TokenizerError`]; a tokenizer that panics on a short text is refused here and not later.
    pub fn load(folder: &Path) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let bytes = read_tokenizer(folder, &path)?;
        let invalid = |detail: String| TokenizerError::Invalid { path: path.clone(), detail };
        let mut tokenizer = caught(|| Tokenizer::from_bytes(&bytes)).map_err(invalid)?;
        // A prompt must arrive whole: lengths are the scheduler's business.
        caught(|| tokenizer.with_truncation(None).map(drop)).map_err(invalid)?;
        tokenizer.with_padding(None);
        let (style, bytes_decode) = byte_style(&bytes);

        let special = SpecialTokens::from_config(&read_config(folder, "tokenizer_config.json")?);
        let special_ids = tokenizer.get_added_tokens_decoder().into_iter().filter_map(|(id, token)| token.special.then_some(id)).collect();
        let highest = caught(|| Ok(tokenizer.get_vocab(true).into_values().max())).map_err(invalid)?;
        let id = |name: &str| tokenizer.token_to_id(special.get(name)?);
        let eos = match eos_ids(folder)? {
            Some(ids) => ids,
            None => id("eos_token").into_iter().collect(),
        };
        let loaded = Self {
            bos: id("bos_token"),
            eos,
            special_ids,
            vocab_size: highest.map_or(0, |highest| highest + 1),
            style,
            bytes_decode,
            special,
            tokenizer,
        };
        loaded.probe().map_err(|error| invalid(error.to_string()))?;
        Ok(loaded)
    }

    /// Malformed parts show only when they are used.
    fn probe(&self) -> Result<(), TokenizerError> {
        for text in ["", "a", " Hello, wörld!\n\n1234 "] {
            let ids = self.encode(text, true)?;
            self.decode(&ids, false)?;
        }
        let ids: Vec<u32> = (0..self.vocab_size.min(64)).collect();
        self.decode(&ids, false)?;
        ids.iter().try_for_each(|id| self.decode(&[*id], true).map(drop))
    }

    /// The ids of `text`. Special tokens written in the text become themselves.
    ///
    /// With `add_special_tokens` the tokenizer adds what it always adds, such as BOS; that is for plain completions. A
    /// rendered chat template has written all of it already. BOS is never put before a text that starts with it.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_verbatim(text, add_special_tokens)?;
        let doubled = match (self.bos, ids.as_slice()) {
            (Some(bos), [first, second, ..]) => add_special_tokens && *first == bos && *second == bos,
            _ => false,
        };
        if doubled {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// As [`encode`](Self::encode), but BOS is put also before a text that starts with it, as Hugging Face's `encode` does.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn encode_verbatim(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = caught(|| self.tokenizer.encode_fast(text, add_special_tokens)).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; ids that the vocabulary does not have are left out.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        caught(|| self.tokenizer.decode(ids, skip_special_tokens)).map_err(failed)
    }

    /// The text and the bytes of a single token, or `None` for an id outside the vocabulary.
    pub fn token_text(&self, id: u32) -> Option<TokenText> {
        let bytes = self.token_bytes(id)?;
        Some(TokenText { text: String::from_utf8_lossy(&bytes).into_owned(), bytes })
    }

    /// The id of a token by its exact entry in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    pub(super) fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let token = self.tokenizer.id_to_token(id)?;
        Some(match self.style {
            ByteStyle::ByteLevel => byte_level_bytes(&token).unwrap_or_else(|| token.into_bytes()),
            ByteStyle::SentencePiece => match fallback_byte(&token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            ByteStyle::Plain => token.into_bytes(),
        })
    }

    /// Whether the token stands for one byte of a character that other tokens complete (`<0xNN>`).
    pub(super) fn is_fallback_byte(&self, id: u32) -> bool {
        self.style == ByteStyle::SentencePiece && self.tokenizer.id_to_token(id).is_some_and(|token| fallback_byte(&token).is_some())
    }

    /// Whether the token is a control token, left out of what users see.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    /// The ids that end an answer.
    pub fn eos_ids(&self) -> &BTreeSet<u32> {
        &self.eos
    }

    /// The id that starts a text, if the model has one.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The special tokens by name, for the chat template.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// One more than the highest id; the embedding must have at least as many rows.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }
}

/// Calls into the tokenizers crate, which panics on some inputs (huggingface/tokenizers#2151).
fn caught<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    // A tokenizer is only read after loading, so a panic cannot leave it half changed.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(format!("the tokenizers library panicked: {}", panic_text(panic.as_ref()))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("?")
}

fn failed(detail: String) -> TokenizerError {
    TokenizerError::Failed { detail }
}

fn read_tokenizer(folder: &Path, path: &Path) -> Result<Vec<u8>, TokenizerError> {
    let read = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => TokenizerError::Missing { folder: folder.to_owned() },
        _ => TokenizerError::Read { path: path.to_owned(), source },
    };
    let file = std::fs::File::open(path).map_err(read)?;
    let bytes = file.metadata().map_err(read)?.len();
    if bytes > MAX_TOKENIZER_BYTES {
        return Err(TokenizerError::TooLarge { path: path.to_owned(), bytes });
    }
    let mut text = Vec::with_capacity(bytes as usize);
    // The length of a pipe or of a growing file is not what metadata says.
    file.take(MAX_TOKENIZER_BYTES).read_to_end(&mut text).map_err(read)?;
    Ok(text)
}

/// A parsed configuration file, or null when the folder does not have it.
fn read_config(folder: &Path, name: &str) -> Result<Value, TokenizerError> {
    let path = folder.join(name);
    let text = match read_small_file(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Value::Null),
        Err(source) => return Err(TokenizerError::Read { path, source }),
    };
    parse_json(text.as_bytes()).map_err(|error| TokenizerError::Invalid { path, detail: error.to_string() })
}

/// The end-of-sequence ids of `generation_config.json`, else of `config.json`.
fn eos_ids(folder: &Path) -> Result<Option<BTreeSet<u32>>, TokenizerError> {
    for name in ["generation_config.json", "config.json"] {
        let config = read_config(folder, name)?;
        let entry = [config.get("eos_token_id"), config.get("text_config").and_then(|text| text.get("eos_token_id"))];
        let Some(entry) = entry.into_iter().flatten().find(|entry| !entry.is_null()) else { continue };
        let ids = match entry {
            Value::Array(ids) => ids.iter().map(as_id).collect(),
            single => as_id(single).map(|id| BTreeSet::from([id])),
        };
        let detail = || format!("eos_token_id is {entry}, which is neither a token id nor a list of them");
        return ids.map(Some).ok_or_else(|| TokenizerError::Invalid { path: folder.join(name), detail: detail() });
    }
    Ok(None)
}

fn as_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// How the vocabulary writes bytes, from the decoder in `tokenizer.json`, and whether that decoder is `ByteLevel` alone.
fn byte_style(tokenizer_json: &[u8]) -> (ByteStyle, bool) {
    #[derive(serde::Deserialize)]
    struct Parts {
        decoder: Option<Value>,
        pre_tokenizer: Option<Value>,
    }
    let Ok(parts) = serde_json::from_slice::<Parts>(tokenizer_json) else { return (ByteStyle::Plain, false) };
    let decoder = parts.decoder.unwrap_or_default();
    let alone = decoder.get("type").and_then(Value::as_str) == Some("ByteLevel");
    let mut types = Vec::new();
    collect_types(&decoder, &mut types);
    collect_types(&parts.pre_tokenizer.unwrap_or_default(), &mut types);
    let style = if types.iter().any(|name| name == "ByteLevel") {
        ByteStyle::ByteLevel
    } else if types.iter().any(|name| name == "ByteFallback" || name == "Metaspace") {
        ByteStyle::SentencePiece
    } else {
        ByteStyle::Plain
    };
    (style, alone)
}

fn collect_types(part: &Value, types: &mut Vec<String>) {
    types.extend(part.get("type").and_then(Value::as_str).map(str::to_owned));
    for list in ["decoders", "pretokenizers"] {
        for inner in part.get(list).and_then(Value::as_array).into_iter().flatten() {
            collect_types(inner, types);
        }
    }
}

/// The bytes of a token in GPT-2's alphabet, or `None` when it has a character outside it (an added token).
///
/// The alphabet (`bytes_to_unicode` of OpenAI's gpt-2 `encoder.py`): printable Latin-1 stands for itself, and the other
/// 68 bytes, in order, for U+0100 and on.
fn byte_level_bytes(token: &str) -> Option<Vec<u8>> {
    token
        .chars()
        .map(|char| match u32::from(char) {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
            code @ 0x100..=0x120 => Some((code - 0x100) as u8),
            code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
            0x143 => Some(0xad),
            _ => None,
        })
        .collect()
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

#[cfg(test)]
mod tests;

//! Chat templates: which of a model's sources holds the template, and rendering messages into a prompt as Hugging Face does.

mod engine;
mod json;
mod meter;
mod python;
mod scan;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::mpsc;

use serde_json::{Map, Value};

use super::tokenizer::SpecialTokens;

/// Longest accepted template source.
pub const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Address space for a rendering thread, of which only what is used becomes memory. The compiler recurses once for
/// every operator of the longest expression and for every `elif`; both are bounded by the source's length.
const STACK_BYTES: usize = 256 << 20;
const MAX_OVERDUE: usize = 2;

/// Why there is no prompt.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file of the model folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{file} holds no usable chat template: {detail}")]
    BadSource {
        /// Which of the sources.
        file: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// The template is longer than any real one.
    #[error("the chat template is {bytes} bytes long; at most {MAX_SOURCE_BYTES} are accepted")]
    SourceTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The template is not valid Jinja.
    #[error("the chat template cannot be compiled: {message}")]
    Syntax {
        /// Cause and line.
        message: String,
    },
    /// The template refuses these messages with `raise_exception`; the caller of the API should see the message.
    #[error("{message}")]
    Raised {
        /// The template's own words.
        message: String,
    },
    /// The template failed on these messages.
    #[error("the chat template failed: {message}")]
    Failed {
        /// Cause and line.
        message: String,
    },
    /// The template needs too much time, memory or nesting.
    #[error("the chat template exceeded its budget: {limit}")]
    Budget {
        /// Which limit.
        limit: &'static str,
    },
}

/// The texts of a model folder in which a chat template may be, in order of precedence.
#[derive(Debug, Clone, Default)]
pub struct TemplateSources {
    /// `chat_template.jinja`: the template itself.
    pub jinja: Option<String>,
    /// `chat_template.json`: an object with `chat_template`.
    pub json: Option<String>,
    /// `tokenizer_config.json`: an object that may have `chat_template`, a text or a list of named texts.
    pub tokenizer_config: Option<String>,
}

impl TemplateSources {
    /// Reads those of the files that `folder` has.
    ///
    /// # Errors
    /// When a file is there and cannot be read, or is absurdly large.
    pub fn read(folder: &Path) -> Result<Self, TemplateError> {
        let read = |name: &str| -> Result<Option<String>, TemplateError> {
            let path = folder.join(name);
            match super::read_small_file(&path) {
                Ok(text) => Ok(Some(text)),
                Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(TemplateError::Read { path, source }),
            }
        };
        Ok(Self {
            jinja: read("chat_template.jinja")?,
            json: read("chat_template.json")?,
            tokenizer_config: read("tokenizer_config.json")?,
        })
    }
}

/// A compiled-and-checked chat template; cheap to clone, usable from many threads.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    default: Option<Arc<str>>,
    tool_use: Option<Arc<str>>,
    overdue: Arc<AtomicUsize>,
}

impl ChatTemplate {
    /// The template of a model folder, or `None` when it has none (a base model).
    ///
    /// # Errors
    /// See [`TemplateSources::read`] and [`ChatTemplate::from_sources`].
    pub fn load(folder: &Path) -> Result<Option<Self>, TemplateError> {
        Self::from_sources(&TemplateSources::read(folder)?)
    }

    /// The template of the first source that has one.
    ///
    /// # Errors
    /// When that source is malformed, too long, not valid Jinja, or names templates of which none is `default` or `tool_use`.
    pub fn from_sources(sources: &TemplateSources) -> Result<Option<Self>, TemplateError> {
        if let Some(source) = &sources.jinja {
            return Self::new(source).map(Some);
        }
        let files = [("chat_template.json", &sources.json), ("tokenizer_config.json", &sources.tokenizer_config)];
        for (file, text) in files {
            let Some(text) = text else { continue };
            let bad = |detail: String| TemplateError::BadSource { file, detail };
            let config: Value = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
            match config.get("chat_template") {
                None | Some(Value::Null) => {}
                Some(Value::String(source)) => return Self::new(source).map(Some),
                Some(Value::Array(named)) => return Self::from_named(named, file).map(Some),
                Some(_) => return Err(bad("chat_template is neither a text nor a list".to_owned())),
            }
        }
        Ok(None)
    }

    /// A template used with and without tools.
    ///
    /// # Errors
    /// When it is too long or not valid Jinja.
    pub fn new(source: &str) -> Result<Self, TemplateError> {
        Ok(Self { default: Some(prepare(source)?), tool_use: None, overdue: Arc::default() })
    }

    fn from_named(named: &[Value], file: &'static str) -> Result<Self, TemplateError> {
        let source = |wanted: &str| {
            let entry = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(wanted))?;
            entry.get("template").and_then(Value::as_str)
        };
        let prepared = |wanted: &str| source(wanted).map(prepare).transpose();
        let template = Self { default: prepared("default")?, tool_use: prepared("tool_use")?, overdue: Arc::default() };
        if template.default.is_none() && template.tool_use.is_none() {
            let detail = "the list has neither `default` nor `tool_use`".to_owned();
            return Err(TemplateError::BadSource { file, detail });
        }
        Ok(template)
    }

    /// The source that [`ChatTemplate::render`] uses with, or without, tools: what it contains tells how the model marks
    /// its reasoning and its tool calls.
    pub fn source(&self, with_tools: bool) -> &str {
        self.chosen(with_tools).map(AsRef::as_ref).unwrap_or_default()
    }

    fn chosen(&self, with_tools: bool) -> Option<&Arc<str>> {
        let (first, second) = if with_tools { (&self.tool_use, &self.default) } else { (&self.default, &self.tool_use) };
        first.as_ref().or(second.as_ref())
    }

    /// The prompt for `messages`.
    ///
    /// `extra` are further template variables (`enable_thinking` and the like); they cannot replace the arguments.
    /// Special tokens that the model does not have stay undefined. Blocks for at most a little over 2 seconds.
    ///
    /// # Errors
    /// [`TemplateError::Raised`], [`TemplateError::Failed`] or [`TemplateError::Budget`].
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
        special: &SpecialTokens,
    ) -> Result<String, TemplateError> {
        let mut context: BTreeMap<String, minijinja::Value> = BTreeMap::new();
        context.insert("documents".to_owned(), ().into());
        context.extend(special.iter().map(|(name, text)| (name.to_owned(), text.into())));
        context.extend(extra.iter().map(|(name, value)| (name.clone(), json::to_value(value))));
        context.insert("messages".to_owned(), messages.iter().map(json::to_message).collect());
        // Python passes None, so `tools is defined` holds also without tools.
        let tools_value = tools.map_or_else(|| ().into(), |tools| tools.iter().map(json::to_value).collect());
        context.insert("tools".to_owned(), tools_value);
        context.insert("add_generation_prompt".to_owned(), add_generation_prompt.into());
        let source = self.chosen(tools.is_some_and(|tools| !tools.is_empty())).cloned().unwrap_or_default();
        bounded(&self.overdue, move || engine::run(&source, minijinja::Value::from_pairs(context)))
    }
}

fn prepare(source: &str) -> Result<Arc<str>, TemplateError> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(TemplateError::SourceTooLong { bytes: source.len() });
    }
    let source: Arc<str> = scan::without_generation_tags(source)?.into();
    let checked = Arc::clone(&source);
    bounded(&Arc::default(), move || engine::check(&checked))?;
    Ok(source)
}

const RUNNING: u8 = 0;
const GIVEN_UP: u8 = 1;
const FINISHED: u8 = 2;

/// Runs `work` on a thread with a deep stack and stops waiting after the time limit.
///
/// A thread cannot be ended from outside. The meter ends nearly everything by itself; should one single operation still
/// take longer, its thread is left behind and counted in `overdue`, and nothing new is started while too many run.
fn bounded<T: Send + 'static>(
    overdue: &Arc<AtomicUsize>,
    work: impl FnOnce() -> Result<T, TemplateError> + Send + 'static,
) -> Result<T, TemplateError> {
    if overdue.load(Ordering::Relaxed) >= MAX_OVERDUE {
        return Err(TemplateError::Budget { limit: "earlier renderings of it have not ended yet" });
    }
    let (sender, receiver) = mpsc::sync_channel(1);
    let state = Arc::new(AtomicU8::new(RUNNING));
    let (its_state, its_overdue) = (Arc::clone(&state), Arc::clone(overdue));
    let started = std::thread::Builder::new().name("chat-template".to_owned()).stack_size(STACK_BYTES).spawn(move || {
        // The receiver is gone when it has given up.
        let _ = sender.send(work());
        if its_state.swap(FINISHED, Ordering::AcqRel) == GIVEN_UP {
            its_overdue.fetch_sub(1, Ordering::Relaxed);
        }
    });
    if let Err(error) = started {
        return Err(TemplateError::Failed { message: format!("no thread for rendering: {error}") });
    }
    match receiver.recv_timeout(meter::TIME_LIMIT) {
        Ok(done) => done,
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(TemplateError::Failed { message: "the template engine panicked".to_owned() }),
        Err(mpsc::RecvTimeoutError::Timeout) => {
            // Counted first, so that the thread never takes off what was not yet added.
            overdue.fetch_add(1, Ordering::Relaxed);
            if state.swap(GIVEN_UP, Ordering::AcqRel) == FINISHED {
                overdue.fetch_sub(1, Ordering::Relaxed);
            }
            Err(TemplateError::Budget { limit: "more than 2 seconds" })
        }
    }
}

#[cfg(test)]
mod tests;

//! The model's text, as it arrives, taken apart into reasoning, answer and tool calls.

use super::reasoning::{ReasoningFormat, reasoning_format};
use super::stop::start_of_partial_match;
use super::tools::{ToolCall, ToolFormat, tool_format};

/// The marks a model uses; see [`OutputFormat::of_template`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OutputFormat {
    /// Around its reasoning.
    pub reasoning: Option<ReasoningFormat>,
    /// Around its tool calls. A request without tools sets this to `None`: then the marks are ordinary text.
    pub tools: Option<ToolFormat>,
}

impl OutputFormat {
    /// What a model with this chat template uses.
    pub fn of_template(source: &str) -> Self {
        Self { reasoning: reasoning_format(source), tools: tool_format(source) }
    }
}

/// A part of what the model says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputEvent {
    /// The next piece of reasoning.
    Reasoning(String),
    /// The next piece of the answer.
    Text(String),
    /// A whole tool call.
    ToolCall(ToolCall),
}

/// Takes text piece by piece; how it is cut into pieces makes no difference to the joined events.
///
/// White space next to the marks belongs to nothing and is dropped; all other text comes out, also when it is inside marks
/// and malformed.
#[derive(Debug)]
pub struct OutputParser {
    format: OutputFormat,
    place: Place,
    /// Text that is not decided on: it may be part of a mark, or of a tool call.
    held: String,
    /// White space that goes out with the text that follows it, unless a mark follows.
    gap: String,
    events: Vec<OutputEvent>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing but white space so far: reasoning may begin.
    Start,
    /// In the reasoning. Here and in the answer, white space directly after a mark is dropped.
    Reasoning { after_mark: bool },
    /// In the answer.
    Text { after_mark: bool },
    /// Inside a tool call, of which `searched` bytes have no closing mark.
    Tool { searched: usize },
}

impl OutputParser {
    /// For the answer to a rendered prompt, of which the end matters: it may have opened the reasoning already.
    pub fn new(format: OutputFormat, rendered_prompt: &str) -> Self {
        let place = match format.reasoning {
            Some(reasoning) if reasoning.opened_by(rendered_prompt) => Place::Reasoning { after_mark: true },
            _ => Place::Start,
        };
        Self { format, place, held: String::new(), gap: String::new(), events: Vec::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Vec<OutputEvent> {
        self.held.push_str(text);
        while self.step() {}
        std::mem::take(&mut self.events)
    }

    /// Ends the text. A tool call without its closing mark counts if it is complete otherwise.
    pub fn finish(&mut self) -> Vec<OutputEvent> {
        while let (Place::Tool { .. }, Some(format)) = (self.place, self.format.tools) {
            match format.parse(&self.held) {
                Some(call) => {
                    self.held.clear();
                    self.tool_call(call);
                }
                None => self.not_a_call(format),
            }
            while self.step() {}
        }
        let rest = std::mem::take(&mut self.held);
        self.say(&rest);
        let gap = std::mem::take(&mut self.gap);
        self.emit(gap);
        std::mem::take(&mut self.events)
    }

    /// Decides on a part of what is held; false when more text is needed.
    fn step(&mut self) -> bool {
        match self.place {
            Place::Reasoning { .. } => match self.format.reasoning {
                Some(format) => self.step_to_mark(&[format.close()]),
                None => false,
            },
            Place::Tool { searched } => match self.format.tools {
                Some(format) => self.step_tool(format, searched),
                None => false,
            },
            Place::Start | Place::Text { .. } => {
                let think = self.format.reasoning.filter(|_| self.place == Place::Start).map(ReasoningFormat::open);
                let tool = self.format.tools.map(ToolFormat::open);
                let marks: Vec<&str> = think.into_iter().chain(tool).collect();
                self.step_to_mark(&marks)
            }
        }
    }

    /// Hands on the text up to the first of `marks`, then what the mark means; without one, all that cannot be its start.
    fn step_to_mark(&mut self, marks: &[&'static str]) -> bool {
        let found = marks.iter().filter_map(|mark| Some((self.held.find(mark)?, *mark))).min();
        let end = found.map_or_else(|| start_of_partial_match(&self.held, marks), |(at, _)| at);
        let rest = self.held.split_off(end);
        let text = std::mem::replace(&mut self.held, rest);
        self.say(&text);
        let Some((_, mark)) = found else { return false };
        // Reasoning can begin only before any text, and the text before this mark may have been some.
        let opens_reasoning = self.format.reasoning.is_some_and(|format| format.open() == mark);
        if opens_reasoning && self.place != Place::Start {
            return true;
        }
        self.held.drain(..mark.len());
        if opens_reasoning {
            self.gap.clear();
            self.place = Place::Reasoning { after_mark: true };
        } else if matches!(self.place, Place::Reasoning { .. }) {
            self.gap.clear();
            self.place = Place::Text { after_mark: true };
        } else {
            // The gap stays until it is certain that this is a call.
            self.place = Place::Tool { searched: 0 };
        }
        true
    }

    fn step_tool(&mut self, format: ToolFormat, searched: usize) -> bool {
        if !format.may_start(&self.held) {
            self.not_a_call(format);
            return true;
        }
        let close = format.close();
        let Some(at) = self.held.get(searched..).and_then(|rest| rest.find(close)).map(|at| searched + at) else {
            self.place = Place::Tool { searched: start_of_partial_match(&self.held, &[close]) };
            return false;
        };
        let body = self.held.get(..at).unwrap_or_default();
        if format.ends_in_string(body) {
            self.place = Place::Tool { searched: at + close.len() };
            return true;
        }
        match format.parse(body) {
            Some(call) => {
                self.held.drain(..at + close.len());
                self.tool_call(call);
            }
            None => self.not_a_call(format),
        }
        true
    }

    fn tool_call(&mut self, call: ToolCall) {
        self.gap.clear();
        self.events.push(OutputEvent::ToolCall(call));
        self.place = Place::Text { after_mark: true };
    }

    /// The opening mark was text; what follows it is looked at again, it may hold a call of its own.
    fn not_a_call(&mut self, format: ToolFormat) {
        self.place = Place::Text { after_mark: false };
        self.say(format.open());
    }

    /// Hands on `text` of the current place and keeps the white space at its end back.
    fn say(&mut self, text: &str) {
        if self.format == OutputFormat::default() {
            return self.emit(text.to_owned());
        }
        let after_mark = matches!(self.place, Place::Reasoning { after_mark: true } | Place::Text { after_mark: true });
        let text = if after_mark { text.trim_start() } else { text };
        let content = text.trim_end();
        let gap = text.get(content.len()..).unwrap_or_default();
        if !content.is_empty() {
            let before = std::mem::take(&mut self.gap);
            self.emit(before + content);
            self.place = match self.place {
                Place::Reasoning { .. } => Place::Reasoning { after_mark: false },
                _ => Place::Text { after_mark: false },
            };
        }
        self.gap.push_str(gap);
    }

    fn emit(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        let reasoning = matches!(self.place, Place::Reasoning { .. });
        match self.events.last_mut() {
            Some(OutputEvent::Reasoning(last)) if reasoning => last.push_str(&text),
            Some(OutputEvent::Text(last)) if !reasoning => last.push_str(&text),
            _ if reasoning => self.events.push(OutputEvent::Reasoning(text)),
            _ => self.events.push(OutputEvent::Text(text)),
        }
    }
}

#[cfg(test)]
mod tests;

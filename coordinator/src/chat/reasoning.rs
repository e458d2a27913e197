//! How a model marks its reasoning, told from its chat template.

/// The marks around reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// `<think>` .. `</think>` before the answer (Qwen3, QwQ, DeepSeek-R1 and many more).
    ThinkTags,
}

/// The format of a model whose chat template is `template_source`, or `None` when it does not reason.
pub fn reasoning_format(template_source: &str) -> Option<ReasoningFormat> {
    let marked = template_source.contains("<think>") || template_source.contains("</think>");
    marked.then_some(ReasoningFormat::ThinkTags)
}

impl ReasoningFormat {
    pub(super) fn open(self) -> &'static str {
        match self {
            Self::ThinkTags => "<think>",
        }
    }

    pub(super) fn close(self) -> &'static str {
        match self {
            Self::ThinkTags => "</think>",
        }
    }

    /// Whether a rendered prompt ends inside reasoning, so that the model's first word is part of it. Only the very end
    /// counts: the mark may also be in what a user wrote.
    pub fn opened_by(self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open())
    }
}

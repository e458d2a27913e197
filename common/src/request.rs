//! What passes between the coordinator and the lead engine: sequences in, tokens out.

use crate::{
    ids::{AdapterId, SequenceId},
    sampling::SamplingParams,
};

/// A sequence handed to the lead engine.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    pub sequence: SequenceId,
    /// At least one token.
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    /// One that the lead has loaded; None for the model itself.
    pub adapter: Option<AdapterId>,
}

/// From the coordinator to the lead engine.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionCommand {
    Submit(Submission),
    /// Stop working on it; nothing more is delivered for it.
    Cancel(SequenceId),
}

/// One token with what was asked about its probability.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOut {
    pub id: u32,
    /// Natural logarithm of the token's probability before temperature and filters; None unless asked for, and for a prompt's first token.
    pub logprob: Option<f32>,
    /// The most likely tokens at this position with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_tokens` were generated, or the context is full.
    Length,
}

/// From the lead engine to the coordinator.
#[derive(Debug, Clone, PartialEq)]
pub enum Delivery {
    /// The prompt's tokens from `start` on with their log-probabilities; only when asked for.
    Prompt {
        sequence: SequenceId,
        start: u32,
        tokens: Vec<TokenOut>,
    },
    /// A generated token.
    Token {
        sequence: SequenceId,
        token: TokenOut,
    },
    Finished {
        sequence: SequenceId,
        reason: FinishReason,
    },
    /// The sequence was refused or given up; the rest of the instance works on.
    Refused {
        sequence: SequenceId,
        message: String,
    },
    Load(EngineLoad),
}

/// What the lead engine is doing, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineLoad {
    pub running: u32,
    pub waiting: u32,
    pub cache_tokens_used: u64,
    pub cache_tokens_max: u64,
    /// Median time of a hop from one engine to the next at decode, in nanoseconds, without the computing; 0 while none was measured.
    pub hop_ns: u64,
    /// The same for the largest parts of prompts so far, which carry `prompt_hop_bytes` of activations.
    pub prompt_hop_ns: u64,
    pub prompt_hop_bytes: u64,
}

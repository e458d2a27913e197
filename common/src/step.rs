//! One forward pass of one batch through all stages, as data: what every stage needs to apply it to its own caches.

use crate::{
    ids::{AdapterId, Epoch, SequenceId},
    sampling::SamplingParams,
};

/// A new sequence; every stage makes caches for it, the last one also remembers how to sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Admission {
    pub sequence: SequenceId,
    pub params: SamplingParams,
    /// Loaded on every engine before; None for the model itself.
    pub adapter: Option<AdapterId>,
}

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    pub sequence: SequenceId,
    /// Position of the first token, counted from 0; equals what the caches hold before the step.
    pub start: u32,
    pub tokens: Vec<Token>,
    pub output: Output,
}

/// An input token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    Id(u32),
    /// The token that the step before this one sampled for the sequence: not known on the host yet, only where it was sampled.
    Previous,
}

/// What the last stage makes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// Draw the token after the segment's last one: it is the generated token of this index (from 0).
    pub sample: Option<u32>,
    /// Log-probabilities of the segment's tokens themselves, each given those before it. The first one's comes from the segment before.
    pub prompt_logprobs: bool,
}

/// A step: which sequences come, go and move on. The lead numbers steps from 1 within an epoch; every stage applies them in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    pub epoch: Epoch,
    pub number: u64,
    pub admissions: Vec<Admission>,
    /// Sequences whose caches are dropped before the segments run.
    pub releases: Vec<SequenceId>,
    pub segments: Vec<Segment>,
}

impl Step {
    /// Tokens that the step carries.
    pub fn tokens(&self) -> usize {
        self.segments.iter().map(|segment| segment.tokens.len()).sum()
    }
}

/// What the last stage says of a step: one entry for each segment that sampled or asked for log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct StepResult {
    pub epoch: Epoch,
    pub number: u64,
    pub sequences: Vec<SegmentResult>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SegmentResult {
    pub sequence: SequenceId,
    pub sampled: Option<crate::request::TokenOut>,
    /// With the position of the first one.
    pub prompt: Option<(u32, Vec<crate::request::TokenOut>)>,
}

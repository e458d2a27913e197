//! Decides what the next step carries. Pure: no clock, no tensors, no threads; the lead engine feeds it and applies what it says.
//!
//! Steps are either decode steps (one token of each sequence of a group) or prefill steps (parts of prompts under a token budget), in
//! turn when both are due: so a long prompt never stops a running answer for longer than one part of it takes. Sequences are dealt
//! into as many groups as there are stages, and a group has one decode step under way at most: so all stages work at the same time.
//! With one stage there is one group and its next step is scheduled while the step before it runs, on tokens that are not known yet.

use mlx_cluster_common::{
    cache::CacheReservation,
    ids::{AdapterId, Epoch, SequenceId},
    request::{Delivery, EngineLoad, FinishReason, Submission},
    step::{Admission, Output, Segment, Step, StepResult, Token},
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Sequences that work at the same time, at most; more wait.
pub(super) const SEQUENCES_MAX: usize = 64;
/// Submissions that wait, at most; more are refused. The coordinator holds its own queue in front of this one.
pub(super) const WAITING_MAX: usize = 1024;

/// With so many parts a stage, a lone prompt leaves the stages idle for about an eighth of the time, while the pipeline fills and drains.
const PARTS_PER_STAGE: u32 = 4;
/// But not smaller than this: a part has costs of its own.
const PIPELINED_TOKENS_MIN: u32 = 64;

/// What an instance can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) n_stages: u32,
    /// Longest sequence, prompt and answer together.
    pub(super) context_tokens: u32,
    /// Tokens that all caches together may hold.
    pub(super) cache_tokens: u64,
    /// What each sequence counts for against them.
    pub(super) reservation: CacheReservation,
    /// That the plan has room for.
    pub(super) sequences: usize,
    /// Prompt tokens of a step, at most.
    pub(super) prefill_tokens: u32,
    /// The same for prompts whose log-probabilities are wanted: each of their tokens costs a row of logits.
    pub(super) scored_tokens: u32,
    /// Parts of prompts end at multiples of this, and none but a whole prompt is a single token: what some mixers compute is the same to the
    /// last bit only then, however a prompt is cut. 1 where it does not matter.
    pub(super) part_multiple: u32,
}

#[derive(Debug)]
pub(super) struct BatchScheduler {
    limits: Limits,
    epoch: Epoch,
    next_number: u64,
    waiting: VecDeque<Submission>,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Sequences whose prompts are not read yet, in the order of their admission.
    prefilling: VecDeque<SequenceId>,
    releases: Vec<SequenceId>,
    under_way: BTreeMap<u64, UnderWay>,
    cache_tokens_reserved: u64,
    last_group: usize,
    last_was_prefill: bool,
    shared_prefill_tokens: u32,
    oldest_first: bool,
}

#[derive(Debug)]
struct Sequence {
    submission: Submission,
    /// Prompt tokens that were put into steps.
    read: u32,
    /// Tokens whose drawing was put into steps.
    drawn: u32,
    /// Tokens that came back.
    generated: u32,
    last: Option<u32>,
    group: usize,
    tokens_max: u32,
    admitted: bool,
}

#[derive(Debug)]
struct UnderWay {
    /// The group, for a decode step.
    group: Option<usize>,
    /// Sequences whose prompt ends with this step and that want no token.
    ends: Vec<SequenceId>,
    adapters: BTreeSet<AdapterId>,
}

impl Sequence {
    fn prompt_tokens(&self) -> u32 {
        self.submission.prompt.len() as u32
    }

    fn unread(&self) -> u32 {
        self.prompt_tokens() - self.read
    }

    /// Tokens that may be drawn at all.
    fn draws_max(&self) -> u32 {
        self.tokens_max - self.prompt_tokens()
    }

    fn is_decoding(&self) -> bool {
        self.read == self.prompt_tokens() && self.drawn > 0
    }
}

impl BatchScheduler {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            epoch: Epoch(0),
            next_number: 1,
            waiting: VecDeque::new(),
            sequences: BTreeMap::new(),
            prefilling: VecDeque::new(),
            releases: Vec::new(),
            under_way: BTreeMap::new(),
            cache_tokens_reserved: 0,
            last_group: 0,
            last_was_prefill: false,
            shared_prefill_tokens: limits.prefill_tokens,
            oldest_first: true,
        }
    }

    /// Forgets everything and starts an epoch.
    pub(super) fn reset(&mut self, epoch: Epoch) {
        *self = Self { epoch, shared_prefill_tokens: self.shared_prefill_tokens, ..Self::new(self.limits) };
    }

    pub(super) fn load(&self) -> EngineLoad {
        EngineLoad {
            running: self.sequences.len() as u32,
            waiting: self.waiting.len() as u32,
            cache_tokens_used: self.cache_tokens_reserved,
            cache_tokens_max: self.limits.cache_tokens,
            ..Default::default()
        }
    }

    /// Steps whose results have not come back.
    pub(super) fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Whether a sequence has this adapter, or had it in a step that is under way.
    pub(super) fn uses(&self, adapter: AdapterId) -> bool {
        let submissions = self.waiting.iter().chain(self.sequences.values().map(|sequence| &sequence.submission));
        let mut adapters = submissions.filter_map(|submission| submission.adapter);
        adapters.any(|other| other == adapter) || self.under_way.values().any(|step| step.adapters.contains(&adapter))
    }

    /// Whether nothing is left to do or to release.
    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.sequences.is_empty() && self.waiting.is_empty() && self.releases.is_empty()
    }

    /// Queues a sequence, or says why it cannot be served.
    pub(super) fn submit(&mut self, submission: Submission) -> Option<Delivery> {
        let (sequence, prompt, context) = (submission.sequence, submission.prompt.len() as u64, u64::from(self.limits.context_tokens));
        let room = context.saturating_sub(prompt);
        let message = if prompt == 0 {
            "the prompt is empty".to_owned()
        } else if prompt > context || (room == 0 && submission.params.max_tokens > 0) {
            format!("the prompt has {prompt} tokens, the context is {context}: there is no room for an answer")
        } else if self.waiting.len() >= WAITING_MAX {
            format!("{WAITING_MAX} sequences wait already")
        } else if self.sequences.contains_key(&sequence) || self.waiting.iter().any(|other| other.sequence == sequence) {
            format!("sequence {sequence} is there already")
        } else {
            self.waiting.push_back(submission);
            return None;
        };
        Some(Delivery::Refused { sequence, message })
    }

    /// Gives a sequence up; nothing more is delivered for it.
    pub(super) fn cancel(&mut self, sequence: SequenceId) {
        self.waiting.retain(|submission| submission.sequence != sequence);
        self.remove(sequence);
    }

    /// Gives up every sequence, as when nobody listens any more.
    pub(super) fn cancel_all(&mut self) {
        self.waiting.clear();
        for sequence in self.sequences.keys().copied().collect::<Vec<_>>() {
            self.remove(sequence);
        }
    }

    fn remove(&mut self, sequence: SequenceId) {
        if let Some(removed) = self.sequences.remove(&sequence) {
            self.cache_tokens_reserved -= self.limits.reservation.of(removed.tokens_max);
            self.prefilling.retain(|other| *other != sequence);
            if removed.admitted {
                self.releases.push(sequence);
            }
        }
    }

    /// Whether [`Self::next_step`] would give one now.
    pub(super) fn has_step(&mut self) -> bool {
        if self.under_way.len() > self.limits.n_stages as usize {
            return false;
        }
        self.admit();
        !self.releases.is_empty() || !self.prefilling.is_empty() || self.find_group().is_some()
    }

    /// Prompt tokens of a step, at most, while more than one sequence is there.
    pub(super) fn pace(&mut self, tokens: u32) {
        self.shared_prefill_tokens = tokens.clamp(1, self.limits.prefill_tokens);
    }

    /// The next step, if one is due and not too many are under way.
    pub(super) fn next_step(&mut self) -> Option<Step> {
        // Two steps keep one stage busy; n stages need n steps, and one more so that the first never waits for the way back.
        if self.under_way.len() > self.limits.n_stages as usize {
            return None;
        }
        self.admit();
        let decode_group = self.find_group();
        let (segments, group) = match (decode_group, self.prefilling.is_empty()) {
            (Some(group), true) => (self.decode(group), Some(group)),
            (Some(group), false) if self.last_was_prefill => (self.decode(group), Some(group)),
            (_, false) => (self.prefill(), None),
            (None, true) => (Vec::new(), None),
        };
        if segments.is_empty() && self.releases.is_empty() {
            return None;
        }
        self.last_was_prefill = group.is_none();
        self.last_group = group.unwrap_or(self.last_group);
        Some(self.seal(segments, group))
    }

    /// Takes waiting sequences in, in their order, as long as the caches have room for all that they may become.
    fn admit(&mut self) {
        while let Some(submission) = self.waiting.front() {
            let prompt = submission.prompt.len() as u64;
            let tokens_max = (prompt + u64::from(submission.params.max_tokens)).min(u64::from(self.limits.context_tokens)) as u32;
            let reserved = self.limits.reservation.of(tokens_max);
            let fits = self.cache_tokens_reserved + reserved <= self.limits.cache_tokens;
            if !fits || self.sequences.len() >= self.limits.sequences.min(SEQUENCES_MAX) {
                return;
            }
            let Some(submission) = self.waiting.pop_front() else { return };
            let sequence = submission.sequence;
            self.cache_tokens_reserved += reserved;
            self.prefilling.push_back(sequence);
            let state = Sequence { submission, read: 0, drawn: 0, generated: 0, last: None, group: 0, tokens_max, admitted: false };
            self.sequences.insert(sequence, state);
        }
    }

    fn n_groups(&self) -> usize {
        self.limits.n_stages.max(1) as usize
    }

    /// The next group in turn that has something to decode.
    fn find_group(&self) -> Option<usize> {
        let n = self.n_groups();
        let busy = |group: usize| n > 1 && self.under_way.values().any(|step| step.group == Some(group));
        let due = |group: usize| self.sequences.values().any(|sequence| self.can_decode(sequence, group));
        (1..=n).map(|i| (self.last_group + i) % n).find(|group| !busy(*group) && due(*group))
    }

    fn can_decode(&self, sequence: &Sequence, group: usize) -> bool {
        // With one stage the token before may still be on its way; with more it has to be known to be sent.
        let unknown_max = if self.limits.n_stages <= 1 { 1 } else { 0 };
        sequence.group == group
            && sequence.is_decoding()
            && sequence.drawn < sequence.draws_max()
            && sequence.drawn - sequence.generated <= unknown_max
    }

    fn decode(&mut self, group: usize) -> Vec<Segment> {
        let due: Vec<_> = self.sequences.iter().filter(|(_, sequence)| self.can_decode(sequence, group)).map(|(id, _)| *id).collect();
        let mut segments = Vec::with_capacity(due.len());
        for id in due {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let token = match (sequence.drawn == sequence.generated, sequence.last) {
                (true, Some(last)) => Token::Id(last),
                _ => Token::Previous,
            };
            let start = sequence.prompt_tokens() + sequence.drawn - 1;
            let output = Output { sample: Some(sequence.drawn), prompt_logprobs: false };
            segments.push(Segment { sequence: id, start, tokens: vec![token], output });
            sequence.drawn += 1;
        }
        segments
    }

    /// Parts of prompts up to the budget, one prompt after the other: reading all of them a little would make everybody wait for all.
    fn prefill(&mut self) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::new();
        let mut left = self.prefill_budget();
        for id in self.prefill_order() {
            let Some(sequence) = self.sequences.get_mut(&id).filter(|_| left > 0) else { continue };
            let scored = sequence.submission.params.prompt_logprobs.is_some();
            let most = left.min(if scored { self.limits.scored_tokens } else { u32::MAX });
            let length = part_length(sequence.read, sequence.prompt_tokens(), most, self.limits.part_multiple);
            if length > left && !segments.is_empty() {
                break;
            }
            left = left.saturating_sub(length);
            segments.push(sequence.read_part(id, length, scored));
            if sequence.unread() > 0 {
                continue;
            }
            self.prefilling.retain(|other| *other != id);
            let group = self.smallest_group();
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.group = group;
            }
        }
        segments
    }

    /// A prompt that has the instance to itself is read in large parts; behind each other in a pipeline, in parts that are small
    /// against the whole, so that all stages are at work most of the time.
    fn prefill_budget(&self) -> u32 {
        let mut sequences = self.sequences.values();
        match (sequences.next(), sequences.next(), self.waiting.is_empty(), self.limits.n_stages) {
            (Some(_), None, true, 1) => self.limits.prefill_tokens,
            (Some(alone), None, true, n_stages) => {
                let part = alone.prompt_tokens() / (PARTS_PER_STAGE * n_stages);
                part.clamp(PIPELINED_TOKENS_MIN, self.limits.prefill_tokens.max(PIPELINED_TOKENS_MIN))
            }
            _ => self.shared_prefill_tokens,
        }
    }

    /// In turn: those with the least left first, so that short prompts pass long ones; the oldest first, so that long ones get through.
    fn prefill_order(&mut self) -> Vec<SequenceId> {
        if self.prefilling.len() > 1 {
            self.oldest_first = !self.oldest_first;
        }
        let mut order: Vec<SequenceId> = self.prefilling.iter().copied().collect();
        if !self.oldest_first {
            order.sort_by_key(|id| self.sequences.get(id).map_or(0, Sequence::unread));
        }
        order
    }

    fn smallest_group(&self) -> usize {
        let count = |group: usize| self.sequences.values().filter(|sequence| sequence.is_decoding() && sequence.group == group).count();
        (0..self.n_groups()).min_by_key(|group| count(*group)).unwrap_or(0)
    }

    fn seal(&mut self, segments: Vec<Segment>, group: Option<usize>) -> Step {
        let mut admissions = Vec::new();
        let (mut ends, mut adapters) = (Vec::new(), BTreeSet::new());
        for segment in &segments {
            let Some(sequence) = self.sequences.get_mut(&segment.sequence) else { continue };
            adapters.extend(sequence.submission.adapter);
            if !sequence.admitted {
                sequence.admitted = true;
                let params = sequence.submission.params.clone();
                admissions.push(Admission { sequence: segment.sequence, params, adapter: sequence.submission.adapter });
            }
            if sequence.read == sequence.prompt_tokens() && sequence.drawn == 0 {
                ends.push(segment.sequence);
            }
        }
        let step = Step { epoch: self.epoch, number: self.next_number, admissions, releases: std::mem::take(&mut self.releases), segments };
        self.next_number += 1;
        self.under_way.insert(step.number, UnderWay { group, ends, adapters });
        step
    }

    /// What a step brought: deliveries for those who still wait for it.
    pub(super) fn on_result(&mut self, result: StepResult) -> Vec<Delivery> {
        if result.epoch != self.epoch {
            return Vec::new();
        }
        let Some(under_way) = self.under_way.remove(&result.number) else {
            return Vec::new();
        };
        let mut deliveries = Vec::new();
        for entry in result.sequences {
            let id = entry.sequence;
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            if let Some((start, tokens)) = entry.prompt {
                deliveries.push(Delivery::Prompt { sequence: id, start, tokens });
            }
            let Some(token) = entry.sampled else { continue };
            sequence.generated += 1;
            sequence.last = Some(token.id);
            let stops = sequence.submission.params.stop_tokens.contains(&token.id);
            let full = sequence.generated == sequence.draws_max();
            deliveries.push(Delivery::Token { sequence: id, token });
            if stops || full {
                let reason = if stops { FinishReason::Stop } else { FinishReason::Length };
                deliveries.push(Delivery::Finished { sequence: id, reason });
                self.remove(id);
            }
        }
        for id in under_way.ends {
            if self.sequences.contains_key(&id) {
                deliveries.push(Delivery::Finished { sequence: id, reason: FinishReason::Length });
                self.remove(id);
            }
        }
        deliveries
    }
}

/// Tokens of the next part of a prompt of which `read` are read, about `most`; more only where the multiple leaves no choice.
fn part_length(read: u32, prompt: u32, most: u32, multiple: u32) -> u32 {
    let unread = prompt - read;
    if multiple == 1 {
        return unread.min(most);
    }
    if unread <= most.max(multiple) {
        return unread;
    }
    let end = (read + most) / multiple * multiple;
    let end = if end > read { end } else { read + multiple };
    match prompt - end {
        1 if end - read > multiple => end - multiple - read,
        1 => unread,
        _ => end - read,
    }
}

impl Sequence {
    fn read_part(&mut self, id: SequenceId, length: u32, scored: bool) -> Segment {
        let (start, end) = (self.read, self.read + length);
        self.read = end;
        let is_end = end == self.prompt_tokens();
        let sample = (is_end && self.draws_max() > 0).then_some(0);
        if sample.is_some() {
            self.drawn = 1;
        }
        let tokens = self.submission.prompt[start as usize..end as usize].iter().map(|token| Token::Id(*token)).collect();
        Segment { sequence: id, start, tokens, output: Output { sample, prompt_logprobs: scored } }
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;

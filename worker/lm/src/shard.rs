//! Consecutive layers of a model with the caches of all sequences: applies steps in order.

mod ends_only;

use crate::{
    activations::Activations,
    compiled::{Pieces, ROWS_MAX},
    error::LmError,
    ffi,
    group::{Group, in_order},
    packing::{Packing, Span},
    sample::{Draw, PromptProbabilities, Sampled, Sampler},
    sequences::Sequences,
    served::{
        Adapters,
        rows::{self, Rows},
    },
    stack::{Run, Stack},
    weights::Weights,
};
use ends_only::ends_only;
use mlx_cluster_common::{
    cache::CacheOptions,
    ids::{AdapterId, Epoch, SequenceId},
    sampling::SamplingParams,
    spec::ModelSpec,
    step::{Admission, Output, Segment, SegmentResult, Step, StepResult, Token},
};
use mlx_rs::{Array, Dtype, ops, transforms};
use std::{collections::BTreeMap, ops::Range};

pub use crate::served::AdapterWeights;

/// A stage's part of the model.
pub struct Shard {
    stack: Stack,
    pieces: Option<Pieces>,
    /// For steps with rows that have adapters; None when none is loaded.
    adapted_pieces: Option<Pieces>,
    adapters: Adapters,
    sequences: Sequences,
    sampler: Sampler,
    /// When the stage has several ranks.
    group: Option<Group>,
}

/// What a step leaves.
pub enum StepOutput {
    /// For the next stage, still lazy.
    Activations(Activations),
    /// On the last stage.
    Result(PendingResult),
}

/// Results of a step that the device may still be working on.
pub struct PendingResult {
    step: (Epoch, u64),
    sampled: Option<Sampled>,
    prompts: Vec<(SequenceId, u32, PromptProbabilities)>,
    /// Caches that were written, for steps that end without a token.
    written: Vec<Array>,
}

impl Shard {
    /// Builds the blocks for `layers` from weights that hold exactly their parts; `caches` say how keys and values are kept.
    pub fn new(spec: &ModelSpec, layers: Range<u32>, weights: Weights, caches: &CacheOptions) -> Result<Self, LmError> {
        let group = weights.group();
        let stack = Stack::load(spec, layers, weights, caches)?;
        let (sequences, sampler) = (Sequences::default(), Sampler::of_group(group.clone()));
        let mut shard = Self { stack, pieces: None, adapted_pieces: None, adapters: Adapters::default(), sequences, sampler, group };
        shard.pieces = Some(shard.compile(false));
        Ok(shard)
    }

    fn compile(&self, has_adapters: bool) -> Pieces {
        let Stack { spec, range, layers, ends, .. } = &self.stack;
        Pieces::new(layers, ends, range.start > 0 && spec.layer_inputs.is_some(), has_adapters)
    }

    /// Puts an adapter beside the matrices: sequences that are admitted from now on may have it. Gives the bytes that its factors take here.
    /// Nothing is reckoned together with other ranks, so each rank may do it when it likes.
    pub fn load_adapter(&mut self, id: AdapterId, weights: AdapterWeights) -> Result<u64, LmError> {
        let bytes = self.adapters.load(id, weights, &mut self.stack)?;
        self.adapters_changed();
        Ok(bytes)
    }

    pub fn has_adapter(&self, id: AdapterId) -> bool {
        self.adapters.has(id)
    }

    /// Takes an adapter away, at once or, when sequences still have it, with the last of them. One that is not there is no error.
    pub fn drop_adapter(&mut self, id: AdapterId) -> Result<(), LmError> {
        if self.adapters.drop(id, &mut self.stack)? {
            self.adapters_changed();
        }
        Ok(())
    }

    /// The pieces hold the factors as they were.
    fn adapters_changed(&mut self) {
        let is_wanted = self.pieces.is_some() && !self.adapters.is_empty();
        self.adapted_pieces = is_wanted.then(|| self.compile(true));
    }

    /// Runs decode steps uncompiled from now on: for machines where MLX cannot compile, and for comparing.
    pub fn disable_compilation(&mut self) {
        (self.pieces, self.adapted_pieces) = (None, None);
    }

    /// Runs a prefill step and decode steps of one and of two made-up sequences, so that kernels are compiled and weights are touched
    /// before the first request. An error most likely means that decode steps cannot be compiled here.
    pub fn warm_up(&mut self) -> Result<(), LmError> {
        let sequences = [SequenceId(u64::MAX), SequenceId(u64::MAX - 1)];
        let segment = |sequence, start, length: u32| Segment {
            sequence,
            start,
            tokens: vec![Token::Id(0); length as usize],
            output: Output { sample: Some(0), prompt_logprobs: false },
        };
        let steps = [
            vec![segment(sequences[0], 0, 2)],
            vec![segment(sequences[0], 2, 1)],
            vec![segment(sequences[0], 3, 1), segment(sequences[1], 0, 1)],
        ];
        let admission = |sequence| Admission { sequence, params: SamplingParams::default(), adapter: None };
        for (number, segments) in steps.into_iter().enumerate() {
            let admissions = if number == 0 { sequences.map(admission).to_vec() } else { Vec::new() };
            let step = Step { epoch: Epoch(0), number: number as u64, admissions, releases: Vec::new(), segments };
            let input = match self.stack.ends.entry {
                Some(_) => None,
                None => Some(self.stack.made_up_input(step.tokens() as i32)?),
            };
            match self.apply(&step, input)? {
                StepOutput::Activations(activations) => transforms::eval(activations.tensors.values())?,
                StepOutput::Result(pending) => drop(pending.read()?),
            }
        }
        self.clear();
        Ok(())
    }

    /// Forgets all sequences and adapters.
    pub fn clear(&mut self) {
        if !self.adapters.is_empty() {
            self.adapters.clear(&mut self.stack);
            self.adapted_pieces = None;
        }
        self.sequences.clear();
        self.sampler.clear();
    }

    /// Applies a step. `input` is what the stage before made of it; None on the first stage. The output is lazy, and has to be evaluated on
    /// all ranks of a group.
    pub fn apply(&mut self, step: &Step, input: Option<Activations>) -> Result<StepOutput, LmError> {
        match self.group {
            Some(_) => in_order(|| self.apply_alone(step, input)),
            None => self.apply_alone(step, input),
        }
    }

    fn apply_alone(&mut self, step: &Step, input: Option<Activations>) -> Result<StepOutput, LmError> {
        self.admit_and_release(step)?;
        let is_last = self.stack.is_last();
        if step.segments.is_empty() {
            return match is_last {
                true => Ok(StepOutput::Result(self.nothing(step))),
                false => Ok(StepOutput::Activations(self.stack.zeros(self.stack.range.end, 0, Dtype::Float32)?)),
            };
        }
        let packing = Packing::of(step);
        let slots = self.slots(step, &packing)?;
        let adapters = slots.as_ref().map(|slots| Rows::new(&Array::from_slice(slots, &[slots.len() as i32]))).transpose()?;
        rows::with(adapters, || self.run(step, input, &packing))
    }

    /// By row of the packing, the slot of its adapter; None when no row has one.
    fn slots(&mut self, step: &Step, packing: &Packing) -> Result<Option<Vec<u32>>, LmError> {
        let Some(slots) = self.adapters.slots(step) else { return Ok(None) };
        if self.adapters.settle(&slots, &mut self.stack)? {
            self.adapters_changed();
        }
        if packing.spans.len() == 1 {
            return Ok(Some(slots));
        }
        let of_span = |(span, slot): (&Span, u32)| std::iter::repeat_n(slot, span.length as usize);
        Ok(Some(packing.spans.iter().zip(slots).flat_map(of_span).collect()))
    }

    fn run(&mut self, step: &Step, input: Option<Activations>, packing: &Packing) -> Result<StepOutput, LmError> {
        let is_last = self.stack.is_last();
        let ids = self.stack.ends.entry.as_ref().map(|_| self.token_ids(step)).transpose()?;
        let (x, layer_inputs) = self.stack.stream(ids.as_ref(), packing, input.as_ref())?;
        let rows = output_rows(step, packing);
        let all_rows = rows.len() as i32 == packing.tokens();
        let mut run = Run::new(packing, self.sequences.check_out(step)?);
        if let Some(input) = &input {
            self.stack.append_copies(input, &mut run)?;
        }
        let pieces = if rows::current().is_some() { &self.adapted_pieces } else { &self.pieces };
        let compiled = pieces.as_ref().filter(|_| packing.is_decode() && packing.batch <= ROWS_MAX && (all_rows || !is_last));
        let is_compiled = compiled.is_some();
        let output = match compiled {
            Some(pieces) => Some(
                pieces.run(&x, layer_inputs, &packing.offsets, |layer, flow, compiled| self.stack.mix(&mut run, layer, flow, compiled))?,
            ),
            None if is_last && !all_rows && ends_only(step) => {
                self.stack.forward_to_ends(&x, layer_inputs, step, &mut run)?.map(|x| (x, None))
            }
            None => Some(self.stack.forward(&x, layer_inputs, &mut run)?),
        };
        let Run { caches, passed_on, .. } = run;
        let written = self.sequences.check_in(caches, is_last && rows.is_empty());
        if !is_last {
            return Ok(StepOutput::Activations(self.stack.activations(output, input, passed_on, packing)?));
        }
        let flat = output.map(|(x, _)| x.reshape(&[-1, x.dim(-1)])).transpose()?;
        let logits = match flat {
            Some(flat) if is_compiled => Some(flat),
            // The last layer may have been run for the rows that are read alone.
            Some(flat) if !rows.is_empty() => {
                let picked = Array::from_slice(&rows, &[rows.len() as i32]);
                let all = flat.dim(0) == rows.len() as i32;
                Some(rows::with_picked(&picked, || self.stack.logits(&flat, &rows, all))?)
            }
            _ => None,
        };
        Ok(StepOutput::Result(self.outputs(step, logits, written)?))
    }

    fn admit_and_release(&mut self, step: &Step) -> Result<(), LmError> {
        for sequence in &step.releases {
            self.sequences.release(*sequence);
            if self.adapters.release(*sequence, &mut self.stack)? {
                self.adapters_changed();
            }
            self.sampler.release(*sequence);
        }
        for admission in &step.admissions {
            self.sequences.admit(admission.sequence, &self.stack.slots);
            self.adapters.admit(admission.sequence, admission.adapter)?;
            if self.stack.is_last() {
                self.sampler.admit(admission.sequence, admission.params.clone(), self.stack.spec.vocab_size)?;
            }
        }
        Ok(())
    }

    fn nothing(&self, step: &Step) -> PendingResult {
        PendingResult { step: (step.epoch, step.number), sampled: None, prompts: Vec::new(), written: Vec::new() }
    }

    /// `[tokens]`: ids that the host knows, and those that the step before this one is still drawing.
    fn token_ids(&self, step: &Step) -> Result<Array, LmError> {
        let mut known = Vec::new();
        let mut parts: Vec<Array> = Vec::new();
        let flush = |known: &mut Vec<u32>, parts: &mut Vec<Array>| {
            if !known.is_empty() {
                parts.push(Array::from_slice(known, &[known.len() as i32]));
                known.clear();
            }
        };
        for segment in &step.segments {
            for token in &segment.tokens {
                match token {
                    Token::Id(id) => known.push(*id),
                    Token::Previous => {
                        flush(&mut known, &mut parts);
                        let unknown = LmError::UnknownSequence { sequence: segment.sequence };
                        parts.push(self.sampler.last(segment.sequence).ok_or(unknown)?.clone());
                    }
                }
            }
        }
        flush(&mut known, &mut parts);
        match parts.len() {
            1 => Ok(parts.swap_remove(0)),
            _ => Ok(ops::concatenate(&parts, 0)?),
        }
    }

    fn outputs(&mut self, step: &Step, logits: Option<Array>, written: Vec<Array>) -> Result<PendingResult, LmError> {
        let mut result = PendingResult { written, ..self.nothing(step) };
        for segment in &step.segments {
            let known: Vec<u32> =
                segment.tokens.iter().filter_map(|token| if let Token::Id(id) = token { Some(*id) } else { None }).collect();
            // Generated tokens were remembered when they were drawn.
            if segment.output.sample.is_none_or(|index| index == 0) {
                self.sampler.observe(segment.sequence, &known)?;
            }
        }
        let Some(logits) = logits else {
            return Ok(result);
        };
        let (mut draws, mut draw_rows, mut row) = (Vec::new(), Vec::new(), 0);
        for segment in &step.segments {
            let length = output_length(segment);
            if segment.output.prompt_logprobs {
                let tokens: Vec<u32> =
                    segment.tokens.iter().filter_map(|token| if let Token::Id(id) = token { Some(*id) } else { None }).collect();
                let own = ffi::slice(&logits, &[row, 0], &[row + length, self.stack.spec.vocab_size as i32])?;
                result.prompts.push((segment.sequence, segment.start, self.sampler.prompt(segment.sequence, &tokens, &own)?));
            }
            row += length;
            if let Some(index) = segment.output.sample {
                draws.push(Draw { sequence: segment.sequence, index });
                draw_rows.push(row - 1);
            }
        }
        if !draws.is_empty() {
            let logits = match draws.len() as i32 == row {
                true => logits,
                false => logits.take_axis(Array::from_slice(&draw_rows, &[draw_rows.len() as i32]), 0)?,
            };
            result.sampled = Some(self.sampler.sample(&logits, &draws)?);
        }
        Ok(result)
    }
}

/// Rows of the logits that a segment needs.
fn output_length(segment: &Segment) -> i32 {
    match (segment.output.prompt_logprobs, segment.output.sample) {
        (true, _) => segment.tokens.len() as i32,
        (false, Some(_)) => 1,
        (false, None) => 0,
    }
}

/// The tokens of a step whose logits are needed, as rows among all of them.
fn output_rows(step: &Step, packing: &Packing) -> Vec<i32> {
    let rows = |(segment, span): (&Segment, &Span)| {
        let end = span.row + span.length;
        end - output_length(segment)..end
    };
    step.segments.iter().zip(&packing.spans).flat_map(rows).collect()
}

impl PendingResult {
    /// Starts the device on the step without waiting for it.
    pub fn start(&self) -> Result<(), LmError> {
        let sampled = self.sampled.iter().flat_map(Sampled::arrays);
        let prompts = self.prompts.iter().flat_map(|(_, _, prompt)| prompt.arrays());
        Ok(transforms::async_eval(sampled.chain(prompts).chain(&self.written))?)
    }

    /// Waits for the device and reads what came out.
    pub fn read(self) -> Result<StepResult, LmError> {
        transforms::eval(&self.written)?;
        let mut results: BTreeMap<SequenceId, SegmentResult> = BTreeMap::new();
        let empty = |sequence| SegmentResult { sequence, sampled: None, prompt: None };
        if let Some(sampled) = &self.sampled {
            for (sequence, token) in sampled.read()? {
                results.entry(sequence).or_insert_with(|| empty(sequence)).sampled = Some(token);
            }
        }
        for (sequence, start, prompt) in &self.prompts {
            results.entry(*sequence).or_insert_with(|| empty(*sequence)).prompt = Some((*start, prompt.read()?));
        }
        let (epoch, number) = self.step;
        Ok(StepResult { epoch, number, sequences: results.into_values().collect() })
    }
}

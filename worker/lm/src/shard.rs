//! Consecutive layers of a model with the caches of all sequences: applies steps in order.

use crate::{
    blocks::{Heads, Layer, Norm},
    cache::KvCache,
    compiled::{Ends, Head, Pieces, ROWS_MAX},
    error::LmError,
    ffi,
    linear::{Embedding, Linear},
    packing::{Packing, Span},
    sample::{Draw, PromptProbabilities, Sampled, Sampler},
    weights::Weights,
};
use mlx_cluster_common::{
    ids::{Epoch, SequenceId},
    sampling::SamplingParams,
    spec::{HeadSpec, ModelSpec},
    step::{Admission, Output, Segment, SegmentResult, Step, StepResult, Token},
};
use mlx_rs::{Array, ops, transforms};
use std::{collections::BTreeMap, ops::Range};

/// A stage's part of the model.
pub struct Shard {
    hidden_size: i32,
    vocab_size: u32,
    layers: Vec<Layer>,
    ends: Ends,
    pieces: Option<Pieces>,
    sequences: BTreeMap<SequenceId, Vec<KvCache>>,
    sampler: Sampler,
}

/// What a step leaves.
pub enum StepOutput {
    /// The residual stream for the next stage, `[tokens, D]`, still lazy.
    Hidden(Array),
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
    /// Builds the blocks for `layers` from weights that hold exactly their parts.
    pub fn new(spec: &ModelSpec, layers: Range<u32>, mut weights: Weights) -> Result<Self, LmError> {
        let quantization = &spec.quantization;
        let (first, last) = (layers.start == 0, layers.end == spec.n_layers());
        let tied = spec.head == HeadSpec::Tied;
        let embedding = (first || (last && tied)).then(|| Embedding::load(&mut weights, &spec.embedding, quantization)).transpose()?;
        let specs = spec.layers.get(layers.start as usize..layers.end as usize).unwrap_or_default();
        let blocks = specs.iter().map(|layer| Layer::load(&mut weights, layer, quantization)).collect::<Result<Vec<_>, _>>()?;
        let head = match (&spec.head, last, &embedding) {
            (_, false, _) => None,
            (HeadSpec::Linear(linear), true, _) => Some(Head::Linear(Linear::load(&mut weights, linear, quantization)?)),
            (HeadSpec::Tied, true, Some(embedding)) => Some(Head::Tied(embedding.clone())),
            (HeadSpec::Tied, true, None) => return Err(LmError::NotLoaded { name: spec.embedding.path.clone() }),
        };
        let head = match head {
            Some(head) => Some((Norm::load(&mut weights, &spec.final_norm)?, head)),
            None => None,
        };
        weights.finish()?;
        let ends = Ends { embedding: embedding.filter(|_| first), head };
        let pieces = Pieces::new(&blocks, &ends);
        Ok(Self {
            hidden_size: spec.hidden_size as i32,
            vocab_size: spec.vocab_size,
            layers: blocks,
            ends,
            pieces,
            sequences: BTreeMap::new(),
            sampler: Sampler::default(),
        })
    }

    /// Runs decode steps uncompiled from now on: for machines where MLX cannot compile, and for comparing.
    pub fn disable_compilation(&mut self) {
        self.pieces = None;
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
        let admission = |sequence| Admission { sequence, params: SamplingParams::default() };
        for (number, segments) in steps.into_iter().enumerate() {
            let admissions = if number == 0 { sequences.map(admission).to_vec() } else { Vec::new() };
            let step = Step { epoch: Epoch(0), number: number as u64, admissions, releases: Vec::new(), segments };
            let hidden = match self.ends.embedding {
                Some(_) => None,
                None => Some(ops::zeros_dtype(&[step.tokens() as i32, self.hidden_size], mlx_rs::Dtype::Float32)?),
            };
            match self.apply(&step, hidden)? {
                StepOutput::Hidden(hidden) => hidden.eval()?,
                StepOutput::Result(pending) => drop(pending.read()?),
            }
        }
        self.clear();
        Ok(())
    }

    /// Forgets all sequences.
    pub fn clear(&mut self) {
        self.sequences.clear();
        self.sampler.clear();
    }

    /// Applies a step. `hidden` `[tokens, D]` is what the stage before made of it; None on the first stage. The output is lazy.
    pub fn apply(&mut self, step: &Step, hidden: Option<Array>) -> Result<StepOutput, LmError> {
        self.admit_and_release(step)?;
        let is_last = self.ends.head.is_some();
        if step.segments.is_empty() {
            return match is_last {
                true => Ok(StepOutput::Result(self.nothing(step))),
                false => Ok(StepOutput::Hidden(ops::zeros_dtype(&[0, self.hidden_size], mlx_rs::Dtype::Float32)?)),
            };
        }
        let packing = Packing::of(step);
        let input = self.input(step, &packing, hidden)?;
        let rows = output_rows(step, &packing);
        let all_rows = rows.len() as i32 == packing.tokens();
        let mut caches = Caches::check_out(&mut self.sequences, step)?;
        let compiled = self.pieces.as_ref().filter(|_| packing.is_decode() && packing.batch <= ROWS_MAX && (all_rows || !is_last));
        let output = match compiled {
            Some(pieces) => Some(pieces.run(&input, &packing.offsets, |layer, heads| caches.attend(&self.layers, layer, heads, &packing))?),
            None if is_last && !all_rows && ends_only(step) => self.forward_to_ends(&input, step, &packing, &mut caches)?,
            None => Some(self.forward(&input, &packing, &mut caches)?),
        };
        let written = caches.check_in(&mut self.sequences, is_last && rows.is_empty());
        // The last layer may have been run for the rows that are read alone.
        let flat = output.map(|output| output.reshape(&[-1, output.dim(-1)])).transpose()?;
        let logits = match flat {
            Some(flat) if !is_last => return Ok(StepOutput::Hidden(flat)),
            Some(flat) if compiled.is_some() => Some(flat),
            Some(flat) if !rows.is_empty() => {
                let is_chosen = flat.dim(0) == rows.len() as i32;
                Some(self.logits(&flat, &rows, is_chosen)?)
            }
            _ => None,
        };
        Ok(StepOutput::Result(self.outputs(step, logits, written)?))
    }

    fn admit_and_release(&mut self, step: &Step) -> Result<(), LmError> {
        for sequence in &step.releases {
            self.sequences.remove(sequence);
            self.sampler.release(*sequence);
        }
        for admission in &step.admissions {
            self.sequences.insert(admission.sequence, vec![KvCache::default(); self.layers.len()]);
            if self.ends.head.is_some() {
                self.sampler.admit(admission.sequence, admission.params.clone(), self.vocab_size)?;
            }
        }
        Ok(())
    }

    fn nothing(&self, step: &Step) -> PendingResult {
        PendingResult { step: (step.epoch, step.number), sampled: None, prompts: Vec::new(), written: Vec::new() }
    }

    /// Token ids `[B, L]` on the first stage, the hidden states as `[B, L, D]` on others.
    fn input(&self, step: &Step, packing: &Packing, hidden: Option<Array>) -> Result<Array, LmError> {
        match (&self.ends.embedding, hidden) {
            (Some(_), None) => Ok(self.token_ids(step)?.reshape(&[packing.batch, packing.length])?),
            (None, Some(hidden)) => {
                let wanted = [packing.tokens(), self.hidden_size];
                if hidden.shape() != wanted {
                    return Err(LmError::WrongInput { wanted: format!("{wanted:?}"), found: format!("{:?}", hidden.shape()) });
                }
                Ok(hidden.reshape(&[packing.batch, packing.length, self.hidden_size])?)
            }
            (Some(_), Some(_)) => Err(LmError::WrongInput { wanted: "token ids".into(), found: "activations".into() }),
            (None, None) => Err(LmError::WrongInput { wanted: "activations".into(), found: "none".into() }),
        }
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

    /// The layers one by one, for prefill and mixed steps: `[B, L, D]`.
    fn forward(&self, input: &Array, packing: &Packing, caches: &mut Caches) -> Result<Array, LmError> {
        self.forward_layers(input, packing, caches, self.layers.len())
    }

    fn forward_layers(&self, input: &Array, packing: &Packing, caches: &mut Caches, n_layers: usize) -> Result<Array, LmError> {
        let mut x = match &self.ends.embedding {
            Some(embedding) => embedding.forward(input)?,
            None => input.clone(),
        };
        for (i, layer) in self.layers.iter().take(n_layers).enumerate() {
            let heads = layer.before.forward(&x, &packing.offsets)?;
            let attended = caches.attend(&self.layers, i, &heads, packing)?;
            x = layer.after.forward(&attended, &x)?;
        }
        Ok(x)
    }

    /// The same for a step that reads the last token of some segments at most: the last layer fills its caches for all tokens, and goes on
    /// with those that are read. `[wanted, 1, D]`, or None when none is. What is not read stays lazy, so it is never computed.
    fn forward_to_ends(&self, input: &Array, step: &Step, packing: &Packing, caches: &mut Caches) -> Result<Option<Array>, LmError> {
        let last = self.layers.len() - 1;
        let x = self.forward_layers(input, packing, caches, last)?;
        let layer = &self.layers[last];
        let heads = layer.before.forward(&x, &packing.offsets)?;
        let wanted: Vec<bool> = step.segments.iter().map(|segment| output_length(segment) > 0).collect();
        let rows = output_rows(step, packing);
        if rows.is_empty() {
            caches.attend_ends(layer, last, &heads, None, &wanted, packing)?;
            return Ok(None);
        }
        let n = rows.len() as i32;
        let read = x.reshape(&[packing.tokens(), self.hidden_size])?.take_axis(Array::from_slice(&rows, &[n]), 0)?;
        let read = read.reshape(&[n, 1, self.hidden_size])?;
        let ends = step.segments.iter().filter(|segment| output_length(segment) > 0);
        let offsets: Vec<i32> = ends.map(|segment| segment.start as i32 + segment.tokens.len() as i32 - 1).collect();
        let queries = layer.before.forward(&read, &Array::from_slice(&offsets, &[n]))?.queries;
        let attended = caches.attend_ends(layer, last, &heads, Some(&queries), &wanted, packing)?;
        attended.map(|attended| layer.after.forward(&attended, &read)).transpose()
    }

    /// Logits of some rows of the hidden states `[tokens, D]`: `[rows, V]`.
    fn logits(&self, hidden: &Array, rows: &[i32], all_rows: bool) -> Result<Array, LmError> {
        let Some((norm, head)) = &self.ends.head else {
            return Err(LmError::NotLoaded { name: "head".into() });
        };
        let chosen = match (all_rows, rows) {
            (true, _) => hidden.clone(),
            (false, [row]) => ffi::slice(hidden, &[*row, 0], &[row + 1, self.hidden_size])?,
            (false, rows) => hidden.take_axis(Array::from_slice(rows, &[rows.len() as i32]), 0)?,
        };
        head.forward(&norm.forward(&chosen)?)
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
                let own = ffi::slice(&logits, &[row, 0], &[row + length, self.vocab_size as i32])?;
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

/// Whether no segment needs more than the logits after its last token.
fn ends_only(step: &Step) -> bool {
    step.segments.iter().all(|segment| output_length(segment) <= 1 && !segment.output.prompt_logprobs)
}

/// The tokens of a step whose logits are needed, as rows among all of them.
fn output_rows(step: &Step, packing: &Packing) -> Vec<i32> {
    let rows = |(segment, span): (&Segment, &Span)| {
        let end = span.row + span.length;
        end - output_length(segment)..end
    };
    step.segments.iter().zip(&packing.spans).flat_map(rows).collect()
}

/// The caches of a step's sequences, taken out of the shard while it runs. Order: segment, then layer.
struct Caches {
    taken: Vec<(SequenceId, Vec<KvCache>)>,
}

impl Caches {
    fn check_out(sequences: &mut BTreeMap<SequenceId, Vec<KvCache>>, step: &Step) -> Result<Self, LmError> {
        let mut taken = Vec::with_capacity(step.segments.len());
        for segment in &step.segments {
            let caches = sequences.remove(&segment.sequence).ok_or(LmError::UnknownSequence { sequence: segment.sequence })?;
            let held = caches.first().map_or(0, KvCache::length) as u32;
            if held != segment.start {
                return Err(LmError::OutOfStep { sequence: segment.sequence, start: segment.start, held });
            }
            taken.push((segment.sequence, caches));
        }
        Ok(Self { taken })
    }

    fn attend(&mut self, layers: &[Layer], layer: usize, heads: &Heads, packing: &Packing) -> Result<Array, LmError> {
        let mut caches: Vec<&mut KvCache> = self.taken.iter_mut().map(|(_, caches)| &mut caches[layer]).collect();
        layers[layer].attend(heads, packing, &mut caches)
    }

    fn attend_ends(
        &mut self,
        layer: &Layer,
        index: usize,
        heads: &Heads,
        queries: Option<&Array>,
        wanted: &[bool],
        packing: &Packing,
    ) -> Result<Option<Array>, LmError> {
        let mut caches: Vec<&mut KvCache> = self.taken.iter_mut().map(|(_, caches)| &mut caches[index]).collect();
        layer.attend_ends(heads, queries, wanted, packing, &mut caches)
    }

    /// Puts the caches back; gives their arrays when somebody has to see to it that they are evaluated.
    fn check_in(self, sequences: &mut BTreeMap<SequenceId, Vec<KvCache>>, collect: bool) -> Vec<Array> {
        let mut arrays = Vec::new();
        for (sequence, caches) in self.taken {
            if collect {
                arrays.extend(caches.iter().flat_map(KvCache::arrays).cloned());
            }
            sequences.insert(sequence, caches);
        }
        arrays
    }
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

//! Consecutive layers of a model with the caches of all sequences: applies steps in order.

mod ends_only;

use crate::{
    activations::{Activations, heads_to_rows, rows_to_heads},
    blocks::{Entry, Exit, Flow, Layer, over_spans},
    compiled::{CompiledMix, Ends, Pieces, ROWS_MAX},
    error::LmError,
    ffi,
    group::{Group, in_order},
    linear::Embedding,
    packing::{Packing, Span},
    parameters::Parameters,
    sample::{Draw, PromptProbabilities, Sampled, Sampler},
    sequences::{CacheSlots, Sequences, StepCaches},
    weights::Weights,
};
use ends_only::ends_only;
use mlx_cluster_common::{
    cache::CacheOptions,
    ids::{Epoch, SequenceId},
    sampling::SamplingParams,
    spec::{CutTensor, ModelSpec},
    step::{Admission, Output, Segment, SegmentResult, Step, StepResult, Token},
};
use mlx_rs::{Array, Dtype, ops, transforms};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// What activations can be.
const FLOATS: [Dtype; 3] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];

/// A stage's part of the model.
pub struct Shard {
    spec: ModelSpec,
    /// Of the model's layers.
    range: Range<u32>,
    layers: Vec<Layer>,
    ends: Ends,
    pieces: Option<Pieces>,
    slots: CacheSlots,
    /// Layers whose keys and values later stages read too.
    passed_on: BTreeSet<u32>,
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
    pub fn new(spec: &ModelSpec, layers: Range<u32>, mut weights: Weights, caches: &CacheOptions) -> Result<Self, LmError> {
        caches.check(spec)?;
        let (first, last) = (layers.start == 0, layers.end == spec.n_layers());
        let needed = first || (last && spec.head.may_be_tied());
        let embedding = needed.then(|| Embedding::load(&mut weights, &spec.embedding, &spec.quantization)).transpose()?;
        let mut blocks = Vec::new();
        for (number, layer) in (layers.start..).zip(spec.layers_of(layers.clone())) {
            blocks.push(Layer::load(&mut weights, &spec.quantization, layer, number, number - layers.start)?);
        }
        let exit = last.then(|| Exit::load(&mut weights, spec, embedding.as_ref())).transpose()?;
        let entry = embedding.filter(|_| first).map(|embedding| Entry::load(&mut weights, spec, embedding)).transpose()?;
        let group = weights.group();
        weights.finish()?;
        let ends = Ends { entry, exit };
        let pieces = Pieces::new(&blocks, &ends, !first && spec.layer_inputs.is_some());
        Ok(Self {
            slots: CacheSlots::new(spec, layers.clone(), caches)?,
            passed_on: spec.shared_across(layers.end),
            spec: spec.clone(),
            range: layers,
            layers: blocks,
            ends,
            pieces: Some(pieces),
            sequences: Sequences::default(),
            sampler: Sampler::of_group(group.clone()),
            group,
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
            let input = match self.ends.entry {
                Some(_) => None,
                None => Some(self.made_up_input(step.tokens() as i32)?),
            };
            match self.apply(&step, input)? {
                StepOutput::Activations(activations) => transforms::eval(activations.tensors.values())?,
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

    fn made_up_input(&self, tokens: i32) -> Result<Activations, LmError> {
        // Pieces are compiled for the type that they are given: that of activations, which norms have.
        let mut dtype = None;
        for layer in &self.layers {
            layer.before.each(&mut |array| dtype = dtype.or(Some(array.dtype()).filter(|dtype| FLOATS.contains(dtype))));
        }
        let dtype = dtype.unwrap_or(Dtype::Float32);
        self.zeros(self.range.start, tokens, dtype)
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
        let is_last = self.ends.exit.is_some();
        if step.segments.is_empty() {
            return match is_last {
                true => Ok(StepOutput::Result(self.nothing(step))),
                false => Ok(StepOutput::Activations(self.zeros(self.range.end, 0, Dtype::Float32)?)),
            };
        }
        let packing = Packing::of(step);
        let (x, layer_inputs) = self.stream(step, &packing, input.as_ref())?;
        let rows = output_rows(step, &packing);
        let all_rows = rows.len() as i32 == packing.tokens();
        let mut run = Run { packing: &packing, caches: self.sequences.check_out(step)?, passed_on: BTreeMap::new() };
        if let Some(input) = &input {
            self.append_copies(input, &mut run)?;
        }
        let compiled = self.pieces.as_ref().filter(|_| packing.is_decode() && packing.batch <= ROWS_MAX && (all_rows || !is_last));
        let is_compiled = compiled.is_some();
        let output = match compiled {
            Some(pieces) => {
                Some(pieces.run(&x, layer_inputs, &packing.offsets, |layer, flow, compiled| self.mix(&mut run, layer, flow, compiled))?)
            }
            None if is_last && !all_rows && ends_only(step) => self.forward_to_ends(&x, layer_inputs, step, &mut run)?.map(|x| (x, None)),
            None => Some(self.forward(&x, layer_inputs, &mut run)?),
        };
        let Run { caches, passed_on, .. } = run;
        let written = self.sequences.check_in(caches, is_last && rows.is_empty());
        if !is_last {
            return Ok(StepOutput::Activations(self.activations(output, input, passed_on, &packing)?));
        }
        let flat = output.map(|(x, _)| x.reshape(&[-1, x.dim(-1)])).transpose()?;
        let logits = match flat {
            Some(flat) if is_compiled => Some(flat),
            // The last layer may have been run for the rows that are read alone.
            Some(flat) if !rows.is_empty() => Some(self.logits(&flat, &rows, flat.dim(0) == rows.len() as i32)?),
            _ => None,
        };
        Ok(StepOutput::Result(self.outputs(step, logits, written)?))
    }

    fn admit_and_release(&mut self, step: &Step) -> Result<(), LmError> {
        for sequence in &step.releases {
            self.sequences.release(*sequence);
            self.sampler.release(*sequence);
        }
        for admission in &step.admissions {
            self.sequences.admit(admission.sequence, &self.slots);
            if self.ends.exit.is_some() {
                self.sampler.admit(admission.sequence, admission.params.clone(), self.spec.vocab_size)?;
            }
        }
        Ok(())
    }

    /// What crosses the cut before layer `cut`, as zeros.
    fn zeros(&self, cut: u32, tokens: i32, dtype: Dtype) -> Result<Activations, LmError> {
        let zeros = |(tensor, width): (CutTensor, u32)| Ok::<_, LmError>((tensor, ops::zeros_dtype(&[tokens, width as i32], dtype)?));
        Ok(Activations { tensors: self.spec.cut_tensors(cut).into_iter().map(zeros).collect::<Result<_, _>>()? })
    }

    fn nothing(&self, step: &Step) -> PendingResult {
        PendingResult { step: (step.epoch, step.number), sampled: None, prompts: Vec::new(), written: Vec::new() }
    }

    /// Token ids `[B, L]` on the first stage; on others the hidden states as `[B, L, D]`, and the per-layer inputs `[B, L, layers, dims]`.
    fn stream(&self, step: &Step, packing: &Packing, input: Option<&Activations>) -> Result<(Array, Option<Array>), LmError> {
        match (&self.ends.entry, input) {
            (Some(_), None) => Ok((self.token_ids(step)?.reshape(&[packing.batch, packing.length])?, None)),
            (None, Some(input)) => {
                input.check(&self.spec, self.range.start, packing.tokens())?;
                let x = input.get(CutTensor::Hidden)?.reshape(&[packing.batch, packing.length, -1])?;
                let layer_inputs = self.spec.layer_inputs.as_ref().map(|inputs| {
                    let rows = input.get(CutTensor::LayerInputs)?;
                    Ok::<_, LmError>(rows.reshape(&[packing.batch, packing.length, -1, inputs.dims as i32])?)
                });
                Ok((x, layer_inputs.transpose()?))
            }
            (Some(_), Some(_)) => Err(LmError::WrongInput { wanted: "token ids".into(), found: "activations".into() }),
            (None, None) => Err(LmError::WrongInput { wanted: "activations".into(), found: "none".into() }),
        }
    }

    /// Takes in what layers of earlier stages have put into caches that layers here read.
    fn append_copies(&self, input: &Activations, run: &mut Run) -> Result<(), LmError> {
        for source in self.slots.copied_layers() {
            let heads = self.spec.kv_heads(source).ok_or_else(|| LmError::Mlx(format!("layer {source} has no keys")))? as i32;
            let keys = rows_to_heads(input.get(CutTensor::Keys(source))?, heads, run.packing)?;
            let values = rows_to_heads(input.get(CutTensor::Values(source))?, heads, run.packing)?;
            run.caches.append_copy(&self.slots, source, &keys, &values, run.packing)?;
        }
        Ok(())
    }

    /// What the next stage needs.
    fn activations(
        &self,
        output: Option<(Array, Option<Array>)>,
        input: Option<Activations>,
        mut passed_on: BTreeMap<CutTensor, Array>,
        packing: &Packing,
    ) -> Result<Activations, LmError> {
        let (x, layer_inputs) = output.ok_or_else(|| LmError::Mlx("a stage gave nothing".into()))?;
        let mut tensors = BTreeMap::from([(CutTensor::Hidden, x.reshape(&[packing.tokens(), -1])?)]);
        if let Some(inputs) = layer_inputs {
            let own = self.layers.len() as i32;
            let rest = ffi::slice(&inputs, &[0, 0, own, 0], inputs.shape())?;
            tensors.insert(CutTensor::LayerInputs, rest.reshape(&[packing.tokens(), -1])?);
        }
        for source in &self.passed_on {
            for tensor in [CutTensor::Keys(*source), CutTensor::Values(*source)] {
                let own = passed_on.remove(&tensor);
                let array = own.or_else(|| input.as_ref().and_then(|input| input.tensors.get(&tensor).cloned()));
                tensors.insert(tensor, array.ok_or_else(|| LmError::Mlx(format!("`{}` was not made", tensor.name())))?);
            }
        }
        Ok(Activations { tensors })
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

    /// Runs a layer's mixer over the caches of a step, and keeps what later stages need of it.
    fn mix(&self, run: &mut Run, layer: usize, flow: &Flow, compiled: Option<&CompiledMix>) -> Result<Vec<Array>, LmError> {
        let number = self.range.start + layer as u32;
        if let (true, [_, keys, values, ..]) = (self.passed_on.contains(&number), flow.mixed.as_slice()) {
            run.passed_on.insert(CutTensor::Keys(number), heads_to_rows(keys)?);
            run.passed_on.insert(CutTensor::Values(number), heads_to_rows(values)?);
        }
        let mut caches = run.caches.of_layer(&self.slots, layer);
        match compiled {
            Some(mix) => over_spans(&flow.mixed, run.packing, &mut caches, |rows, cache| mix.run(rows, cache)),
            None => self.layers[layer].mix(flow, run.packing, &mut caches),
        }
    }

    /// The layers one by one, for prefill and mixed steps: `[B, L, D]`.
    fn forward(&self, input: &Array, layer_inputs: Option<Array>, run: &mut Run) -> Result<(Array, Option<Array>), LmError> {
        self.forward_layers(input, layer_inputs, run, self.layers.len())
    }

    fn forward_layers(
        &self,
        input: &Array,
        layer_inputs: Option<Array>,
        run: &mut Run,
        n_layers: usize,
    ) -> Result<(Array, Option<Array>), LmError> {
        let (mut x, layer_inputs) = match &self.ends.entry {
            Some(entry) => entry.forward(input)?,
            None => (input.clone(), layer_inputs),
        };
        for (i, layer) in self.layers.iter().take(n_layers).enumerate() {
            let flow = layer.before.forward(&x, &run.packing.offsets)?;
            let mixed = self.mix(run, i, &flow, None)?;
            x = layer.after.forward(&mixed, &flow.beside, &x, layer_inputs.as_ref())?;
        }
        Ok((x, layer_inputs))
    }

    /// Logits of some rows of the hidden states `[tokens, D]`: `[rows, V]`.
    fn logits(&self, hidden: &Array, rows: &[i32], all_rows: bool) -> Result<Array, LmError> {
        let Some(exit) = &self.ends.exit else {
            return Err(LmError::NotLoaded { name: "head".into() });
        };
        let chosen = match (all_rows, rows) {
            (true, _) => hidden.clone(),
            (false, [row]) => ffi::slice(hidden, &[*row, 0], &[row + 1, hidden.dim(1)])?,
            (false, rows) => hidden.take_axis(Array::from_slice(rows, &[rows.len() as i32]), 0)?,
        };
        exit.forward(&chosen)
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
                let own = ffi::slice(&logits, &[row, 0], &[row + length, self.spec.vocab_size as i32])?;
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

/// A step while it runs.
struct Run<'a> {
    packing: &'a Packing,
    caches: StepCaches,
    /// Keys and values that later stages read too.
    passed_on: BTreeMap<CutTensor, Array>,
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

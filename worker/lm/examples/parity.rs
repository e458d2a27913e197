//! Scores and continues prompts with a model, whole and cut into stages inside one process: what the table of architectures is checked with.
//!
//! `parity MODEL_FOLDER` reads one line of JSON on stdin, `{"prompts": [[ids]], "new_tokens": n, "chunks": n, "layouts": [[first layers]]}`, and
//! prints a line for each layout: each prompt alone, the first one in chunks, all of them in one batch, and all of them in one batch and in
//! chunks whose prompts are not scored. `"kv_bits"`, `"kv_group_size"`, `"quantized_kv_start"` and `"max_kv_size"` may say how keys and values
//! are kept. `"shares": [[2, 1]]` adds tensor-parallel groups, each of so many processes of this program with these shares.

mod support;

use mlx_cluster_common::{
    cache::{CacheError, CacheOptions, KvQuantization},
    ids::{Epoch, SequenceId},
    plan::Collective,
    sampling::SamplingParams,
    step::{Admission, Output, Segment, SegmentResult, Step, Token},
    tensor::{TensorPlace, check_cover, rank_model},
};
use mlx_cluster_lm::{
    group::Group,
    shard::{Shard, StepOutput},
    weights::Weights,
};
use serde::{Deserialize, Serialize};
use std::{error::Error, io::BufRead, path::Path};
use support::{Model, run_ranks};

#[derive(Deserialize)]
struct Request {
    prompts: Vec<Vec<u32>>,
    new_tokens: u32,
    chunks: usize,
    /// For each layout the first layers of its stages but the first.
    layouts: Vec<Vec<u32>>,
    #[serde(default)]
    shares: Vec<Vec<u32>>,
    kv_bits: Option<u32>,
    kv_group_size: Option<u32>,
    quantized_kv_start: Option<u32>,
    max_kv_size: Option<u32>,
}

impl Request {
    fn caches(&self) -> Result<CacheOptions, CacheError> {
        let quantization = self.kv_bits.map(|bits| KvQuantization::new(bits, self.kv_group_size, self.quantized_kv_start));
        CacheOptions::new(quantization.transpose()?, self.max_kv_size)
    }
}

/// What became of a prompt.
#[derive(Serialize, Default, Clone)]
struct Answer {
    /// Of each prompt token given those before it; the first one's is null.
    prompt_logprobs: Vec<Option<f32>>,
    tokens: Vec<u32>,
    logprobs: Vec<Option<f32>>,
}

#[derive(Serialize)]
struct Answers {
    cuts: Vec<u32>,
    shares: Vec<u32>,
    alone: Vec<Answer>,
    chunked: Answer,
    batched: Vec<Answer>,
    unscored: Vec<Answer>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = arguments.first().ok_or("usage: parity MODEL_FOLDER")?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let model = Model::open(Path::new(folder))?;
    if let [_, place, addresses] = arguments.as_slice() {
        let (place, addresses): (TensorPlace, Vec<String>) = (serde_json::from_str(place)?, serde_json::from_str(addresses)?);
        return answer_as_rank(&model, &request, place, &addresses);
    }
    for cuts in &request.layouts {
        let mut pipeline = pipeline(&model, cuts, &request.caches()?)?;
        println!("{}", serde_json::to_string(&answers(&mut pipeline, &request, cuts, &[])?)?);
    }
    for shares in &request.shares {
        println!("{}", run_ranks(folder, &line, shares, &[])?);
    }
    Ok(())
}

/// What this process says as one rank of a group: rank 0 prints it.
fn answer_as_rank(model: &Model, request: &Request, place: TensorPlace, addresses: &[String]) -> Result<(), Box<dyn Error>> {
    let shares = place.shares.clone();
    let is_first = place.rank == 0;
    let mut pipeline = Pipeline { stages: vec![rank(model, place, addresses, &request.caches()?)?], number: 0 };
    let answers = answers(&mut pipeline, request, &[], &shares)?;
    if is_first {
        println!("{}", serde_json::to_string(&answers)?);
    }
    Ok(())
}

fn pipeline(model: &Model, cuts: &[u32], caches: &CacheOptions) -> Result<Pipeline, Box<dyn Error>> {
    let mut stages = Vec::new();
    for layers in model.stages(cuts) {
        let weights = Weights::load(&model.folder, &model.index, &model.map, &model.spec.parts_of(layers.clone()), |_| {})?;
        stages.push(Shard::new(&model.spec, layers, weights, caches)?);
    }
    Ok(Pipeline { stages, number: 0 })
}

/// One rank of all layers.
fn rank(model: &Model, place: TensorPlace, addresses: &[String], caches: &CacheOptions) -> Result<Shard, Box<dyn Error>> {
    let parts = model.spec.parts();
    check_cover(&model.spec, &model.map, &parts, &place.shares)?;
    let rank = rank_model(&model.spec, &model.map, &place)?;
    let group = Group::new(place);
    let weights = Weights::load(&model.folder, &model.index, &rank.weights, &parts, |_| {})?.of_rank(rank.split, group.clone());
    let shard = Shard::new(&rank.spec, 0..model.spec.n_layers(), weights, caches)?;
    group.form(Collective::Ring, addresses)?;
    Ok(shard)
}

fn answers(pipeline: &mut Pipeline, request: &Request, cuts: &[u32], shares: &[u32]) -> Result<Answers, Box<dyn Error>> {
    let prompts = &request.prompts;
    let mut alone = Vec::new();
    for prompt in prompts {
        alone.extend(pipeline.answer(std::slice::from_ref(prompt), request.new_tokens, 1, true)?);
    }
    let chunked = pipeline.answer(&prompts[..1], request.new_tokens, request.chunks, true)?.swap_remove(0);
    let batched = pipeline.answer(prompts, request.new_tokens, 1, true)?;
    let unscored = pipeline.answer(prompts, request.new_tokens, request.chunks, false)?;
    Ok(Answers { cuts: cuts.to_vec(), shares: shares.to_vec(), alone, chunked, batched, unscored })
}

/// Stages one after the other.
struct Pipeline {
    stages: Vec<Shard>,
    number: u64,
}

impl Pipeline {
    /// The prompts side by side, each in so many chunks, and their greedy continuations. What a prompt that is not scored makes besides its
    /// caches is computed for its last token alone.
    fn answer(&mut self, prompts: &[Vec<u32>], new_tokens: u32, chunks: usize, scored: bool) -> Result<Vec<Answer>, Box<dyn Error>> {
        let mut answers = vec![Answer::default(); prompts.len()];
        for chunk in 0..chunks {
            let segment = |(i, prompt): (usize, &Vec<u32>)| {
                let (start, end) = (prompt.len() * chunk / chunks, prompt.len() * (chunk + 1) / chunks);
                let sample = (chunk + 1 == chunks).then_some(0);
                let tokens: Vec<Token> = prompt[start..end].iter().map(|id| Token::Id(*id)).collect();
                (!tokens.is_empty()).then(|| segment(i, start, tokens, Output { sample, prompt_logprobs: scored }))
            };
            let segments = prompts.iter().enumerate().filter_map(segment).collect();
            self.step(segments, if chunk == 0 { prompts.len() } else { 0 }, &mut answers)?;
        }
        for index in 1..new_tokens {
            let segment = |(i, answer): (usize, &Answer)| {
                let last = *answer.tokens.last()?;
                let start = prompts[i].len() + index as usize - 1;
                Some(segment(i, start, vec![Token::Id(last)], Output { sample: Some(index), prompt_logprobs: false }))
            };
            let segments = answers.iter().enumerate().filter_map(segment).collect();
            self.step(segments, 0, &mut answers)?;
        }
        self.stages.iter_mut().for_each(Shard::clear);
        Ok(answers)
    }

    fn step(&mut self, segments: Vec<Segment>, admitted: usize, answers: &mut [Answer]) -> Result<(), Box<dyn Error>> {
        self.number += 1;
        let params = SamplingParams { temperature: 0.0, logprobs: Some(0), prompt_logprobs: Some(0), ..Default::default() };
        let admissions =
            (0..admitted).map(|i| Admission { sequence: SequenceId(i as u64), params: params.clone(), adapter: None }).collect();
        let step = Step { epoch: Epoch(0), number: self.number, admissions, releases: Vec::new(), segments };
        let mut activations = None;
        for stage in &mut self.stages {
            match stage.apply(&step, activations.take())? {
                StepOutput::Activations(next) => activations = Some(next),
                StepOutput::Result(pending) => {
                    for result in pending.read()?.sequences {
                        note(&mut answers[result.sequence.0 as usize], result);
                    }
                }
            }
        }
        Ok(())
    }
}

fn segment(sequence: usize, start: usize, tokens: Vec<Token>, output: Output) -> Segment {
    Segment { sequence: SequenceId(sequence as u64), start: start as u32, tokens, output }
}

fn note(answer: &mut Answer, result: SegmentResult) {
    answer.prompt_logprobs.extend(result.prompt.into_iter().flat_map(|(_, tokens)| tokens).map(|token| token.logprob));
    if let Some(token) = result.sampled {
        answer.tokens.push(token.id);
        answer.logprobs.push(token.logprob);
    }
}

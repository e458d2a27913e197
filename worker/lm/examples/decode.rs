//! Decodes greedily with one shard in one process, without scheduler or network: what the maths alone can do.
//!
//! `decode MODEL_FOLDER PROMPT_IDS N_TOKENS [eager]` prints the tokens with their log-probabilities and the speed as JSON.

use mlx_cluster_common::{
    architectures::read_spec,
    cache::CacheOptions,
    ids::{Epoch, SequenceId},
    sampling::SamplingParams,
    step::{Admission, Output, Segment, Step, Token},
    weights::WeightMap,
};
use mlx_cluster_lm::{
    shard::{PendingResult, Shard, StepOutput},
    weights::Weights,
};
use std::{error::Error, path::Path, time::Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, folder, prompt, n_tokens, mode @ ..] = arguments.as_slice() else {
        return Err("usage: decode MODEL_FOLDER PROMPT_IDS N_TOKENS [eager]".into());
    };
    let prompt: Vec<u32> = prompt.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let n_tokens: u32 = n_tokens.parse()?;
    let mut shard = load(Path::new(folder))?;
    if mode.iter().any(|word| word == "eager") {
        shard.disable_compilation();
    }
    shard.warm_up()?;
    let scored = mode.iter().any(|word| word == "score");
    let start = Instant::now();
    let mut running = step(&mut shard, 1, 0, prompt.iter().map(|id| Token::Id(*id)).collect(), 0, scored)?;
    running.start()?;
    let (mut tokens, mut prefill_s) = (Vec::new(), 0.0);
    let mut echo = Vec::new();
    for index in 1..=n_tokens {
        let next = match index < n_tokens {
            true => {
                let next = step(&mut shard, u64::from(index) + 1, prompt.len() as u32 + index - 1, vec![Token::Previous], index, scored)?;
                next.start()?;
                Some(next)
            }
            false => None,
        };
        let result = running.read()?.sequences.remove(0);
        if index == 1 {
            prefill_s = start.elapsed().as_secs_f64();
            echo = result.prompt.map(|(_, tokens)| tokens.into_iter().map(|token| token.logprob).collect()).unwrap_or_default();
        }
        tokens.extend(result.sampled.map(|token| (token.id, token.logprob)));
        match next {
            Some(next) => running = next,
            None => break,
        }
    }
    let decode_s = start.elapsed().as_secs_f64() - prefill_s;
    let (ids, logprobs): (Vec<u32>, Vec<Option<f32>>) = tokens.into_iter().unzip();
    println!(
        "{{\"tokens\": {ids:?}, \"logprobs\": {:?}, \"echo\": {:?}, \"prefill_tps\": {:.2}, \"decode_tps\": {:.2}}}",
        logprobs.into_iter().map(|logprob| logprob.unwrap_or(0.0)).collect::<Vec<_>>(),
        echo.into_iter().map(|logprob: Option<f32>| logprob.unwrap_or(0.0)).collect::<Vec<_>>(),
        prompt.len() as f64 / prefill_s,
        f64::from(n_tokens - 1) / decode_s
    );
    Ok(())
}

fn step(shard: &mut Shard, number: u64, start: u32, tokens: Vec<Token>, index: u32, scored: bool) -> Result<PendingResult, Box<dyn Error>> {
    let sequence = SequenceId(1);
    let logprobs = scored.then_some(0);
    let params = SamplingParams { logprobs, prompt_logprobs: logprobs, ..Default::default() };
    let admissions = if start == 0 { vec![Admission { sequence, params, adapter: None }] } else { Vec::new() };
    let output = Output { sample: Some(index), prompt_logprobs: scored && start == 0 };
    let step =
        Step { epoch: Epoch(0), number, admissions, releases: Vec::new(), segments: vec![Segment { sequence, start, tokens, output }] };
    match shard.apply(&step, None)? {
        StepOutput::Result(pending) => Ok(pending),
        StepOutput::Activations(_) => Err("a whole model gives tokens".into()),
    }
}

fn load(folder: &Path) -> Result<Shard, Box<dyn Error>> {
    let spec = read_spec(&mlx_cluster_hub::read_config(&folder.join("config.json"))?)?;
    let index = mlx_cluster_hub::folder_weight_index(folder)?;
    let map = WeightMap::assign(&spec, &index)?;
    let weights = Weights::load(folder, &index, &map, &spec.parts(), |_| {})?;
    Ok(Shard::new(&spec, 0..spec.n_layers(), weights, &CacheOptions::default())?)
}

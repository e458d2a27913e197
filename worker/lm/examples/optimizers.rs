//! Optimizers, losses and random numbers by themselves: what `tests/parity/training/optimizers.py` compares with Python's MLX.
//!
//! Reads lines of JSON on stdin, and answers each with a line. Arrays come and go in safetensors files that a line names.

use mlx_cluster_common::training::{Optimizer, Schedule};
use mlx_cluster_lm::{
    Array, LmError,
    tuner::{losses, optimizers::Updates, random},
};
use mlx_rs::{
    Device,
    error::Exception,
    transforms::{eval, fallible_vjp},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, error::Error, io::BufRead, path::PathBuf};

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Request {
    Optimizer(Training),
    Loss(Losses),
    Random(Draws),
}

/// Updates `NAME` of the parameters with `STEP.NAME` of the gradients; gives parameters and state after all of them.
#[derive(Deserialize)]
struct Training {
    optimizer: Optimizer,
    schedule: Schedule,
    parameters: PathBuf,
    gradients: PathBuf,
    outputs: PathBuf,
    steps: u64,
}

/// The loss of `logits` beside `targets`, and the gradient for `cotangents`.
#[derive(Deserialize)]
struct Losses {
    loss: Loss,
    temperature: f32,
    inputs: PathBuf,
    outputs: PathBuf,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
enum Loss {
    CrossEntropy,
    KlDivergence,
    JsDivergence,
}

#[derive(Deserialize)]
struct Draws {
    seed: u64,
    name: String,
    shape: Vec<i32>,
    low: f32,
    high: f32,
    outputs: PathBuf,
}

#[derive(Serialize, Default)]
struct Answer {
    /// That was reported before the first update and after each.
    learning_rates: Vec<f32>,
}

fn main() -> Result<(), Box<dyn Error>> {
    // Bits are compared, and those of a GPU are others.
    Device::set_default(&Device::cpu());
    for line in std::io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Request::Optimizer(training) => train(&training)?,
            Request::Loss(losses) => differentiate(&losses)?,
            Request::Random(draws) => draw(&draws)?,
        };
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

fn train(training: &Training) -> Result<Answer, Box<dyn Error>> {
    let mut parameters: BTreeMap<String, Array> = Array::load_safetensors(&training.parameters)?.into_iter().collect();
    let gradients = Array::load_safetensors(&training.gradients)?;
    let mut updates = Updates::new(training.optimizer.clone(), training.schedule.clone(), &parameters)?;
    let mut answer = Answer { learning_rates: vec![updates.learning_rate()] };
    for step in 0..training.steps {
        let gradient = |name: &String| gradients.get(&format!("{step}.{name}")).map(|gradient| (name.clone(), gradient.clone()));
        let gradients = parameters.keys().filter_map(gradient).collect();
        parameters = updates.apply(&parameters, &gradients)?;
        eval(parameters.values().chain(updates.arrays()))?;
        answer.learning_rates.push(updates.learning_rate());
    }
    parameters.extend(updates.save());
    Array::save_safetensors(&parameters, None, &training.outputs)?;
    Ok(answer)
}

fn differentiate(request: &Losses) -> Result<Answer, Box<dyn Error>> {
    let inputs = Array::load_safetensors(&request.inputs)?;
    let input = |name: &str| inputs.get(name).cloned().ok_or_else(|| format!("no `{name}` in {}", request.inputs.display()));
    let (logits, targets, cotangents) = (input("logits")?, input("targets")?, input("cotangents")?);
    let loss = |logits: &Array| match request.loss {
        Loss::CrossEntropy => losses::cross_entropy(logits, &targets),
        Loss::KlDivergence => losses::kl_divergence(logits, &targets, request.temperature),
        Loss::JsDivergence => losses::js_divergence(logits, &targets, request.temperature),
    };
    let run = |arrays: &[Array]| loss(&arrays[0]).map(|loss| vec![loss]).map_err(|error: LmError| Exception::custom(error.to_string()));
    let (losses, gradients) = fallible_vjp(run, &[logits], &[cotangents])?;
    let outputs = [("losses", &losses[0]), ("gradients", &gradients[0])];
    Array::save_safetensors(outputs, None, &request.outputs)?;
    Ok(Answer::default())
}

fn draw(draws: &Draws) -> Result<Answer, Box<dyn Error>> {
    let array = random::uniform(draws.seed, &draws.name, &draws.shape, draws.low, draws.high)?;
    Array::save_safetensors([("drawn", &array)], None, &draws.outputs)?;
    Ok(Answer::default())
}

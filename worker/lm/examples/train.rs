//! Trains a model for a few steps, whole and cut into stages inside one process: what training is compared with mlx-lm's by.
//!
//! `train MODEL_FOLDER` reads one line of JSON on stdin, `{"role": …, "steps": [[[micro-batch]]], "layouts": [[first layers]], "start": FILE,
//! "save": FILE}`: each step is a list of batches that are accumulated, each batch a list of micro-batches. For each layout it prints a line with
//! the loss of each batch, and the names and shapes of what is trained; what came out is saved in `save` with the layout's number. `"shares":
//! [[1, 1]]` adds groups that split each matrix, a process a rank.

mod support;

use mlx_cluster_common::{
    plan::Collective,
    tensor::{TensorPlace, rank_model},
    training::{MicroBatch, TrainingRole},
};
use mlx_cluster_lm::{
    Array,
    activations::Activations,
    group::Group,
    tuner::{
        Source,
        stage::{Passed, Pending, TrainedStage},
    },
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    error::Error,
    io::BufRead,
    path::{Path, PathBuf},
};
use support::{Model, run_ranks};

#[derive(Deserialize)]
struct Request {
    role: TrainingRole,
    steps: Vec<Vec<Vec<MicroBatch>>>,
    layouts: Vec<Vec<u32>>,
    #[serde(default)]
    shares: Vec<Vec<u32>>,
    start: Option<PathBuf>,
    save: Option<PathBuf>,
}

#[derive(Serialize)]
struct Answer {
    layout: Vec<u32>,
    losses: Vec<f32>,
    /// Of the trained parameters.
    shapes: BTreeMap<String, Vec<i32>>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = arguments.first().ok_or("usage: train MODEL_FOLDER")?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let model = Model::open(Path::new(folder))?;
    if let [_, place, addresses, number] = arguments.as_slice() {
        let (place, addresses): (TensorPlace, Vec<String>) = (serde_json::from_str(place)?, serde_json::from_str(addresses)?);
        let shares = place.shares.clone();
        let is_first = place.rank == 0;
        let stage = rank(&model, place, &addresses, &request)?;
        return run(vec![stage], &request, shares, number.parse()?, is_first);
    }
    for (number, cuts) in request.layouts.iter().enumerate() {
        run(pipeline(&model, cuts, &request)?, &request, cuts.clone(), number, true)?;
    }
    for (number, shares) in (request.layouts.len()..).zip(&request.shares) {
        println!("{}", run_ranks(folder, &line, shares, &[&number.to_string()])?);
    }
    Ok(())
}

fn run(mut stages: Vec<TrainedStage>, request: &Request, layout: Vec<u32>, number: usize, prints: bool) -> Result<(), Box<dyn Error>> {
    let mut losses = Vec::new();
    for batches in &request.steps {
        for batch in batches {
            let mut loss = 0.0;
            for micro in batch {
                loss += forward_and_back(&mut stages, micro)?;
            }
            losses.push(loss);
        }
        for stage in &mut stages {
            stage.reduce()?;
            stage.update(batches.len() as u32)?;
        }
    }
    let mut parameters: BTreeMap<String, Array> = BTreeMap::new();
    for stage in &stages {
        parameters.extend(stage.saved(false)?.parameters);
    }
    if !prints {
        return Ok(());
    }
    let shapes = parameters.iter().map(|(name, array)| (name.clone(), array.shape().to_vec())).collect();
    if let Some(save) = &request.save {
        Array::save_safetensors(
            parameters.iter().map(|(name, array)| (name.as_str(), array)),
            None,
            save.with_extension(format!("{number}.safetensors")),
        )?;
    }
    println!("{}", serde_json::to_string(&Answer { layout, losses, shapes })?);
    Ok(())
}

fn forward_and_back(stages: &mut [TrainedStage], micro: &MicroBatch) -> Result<f32, Box<dyn Error>> {
    let (mut input, mut pendings): (Option<Activations>, Vec<Pending>) = (None, Vec::new());
    for stage in stages.iter_mut() {
        match stage.forward(micro, input.take())? {
            Passed::Activations { output, pending } => {
                input = Some(output);
                pendings.push(pending);
            }
            Passed::Loss { loss, gradients } => {
                let mut given = gradients;
                for (stage, pending) in stages.iter_mut().zip(pendings).rev() {
                    given = stage.backward(pending, given)?;
                }
                return Ok(loss);
            }
        }
    }
    Err("no stage gave a loss".into())
}

fn pipeline(model: &Model, cuts: &[u32], request: &Request) -> Result<Vec<TrainedStage>, Box<dyn Error>> {
    model.stages(cuts).into_iter().map(|layers| stage(model, layers, &TensorPlace::alone(), None, request)).collect()
}

fn rank(model: &Model, place: TensorPlace, addresses: &[String], request: &Request) -> Result<TrainedStage, Box<dyn Error>> {
    let group = Group::new(place.clone());
    group.form(Collective::Ring, addresses)?;
    stage(model, 0..model.spec.n_layers(), &place, Some(group), request)
}

fn stage(
    model: &Model,
    layers: std::ops::Range<u32>,
    place: &TensorPlace,
    group: Option<Group>,
    request: &Request,
) -> Result<TrainedStage, Box<dyn Error>> {
    let is_split = group.is_some();
    let source = Source {
        folder: &model.folder,
        index: &model.index,
        spec: &model.spec,
        weights: &model.map,
        rank: rank_model(&model.spec, &model.map, place)?,
        layers,
        role: request.role.clone(),
        group,
        is_split,
    };
    let mut stage = source.load(|_| {})?;
    stage.prepare()?;
    if let Some(start) = &request.start {
        let own = Array::load_safetensors(start)?.into_iter().filter(|(name, _)| stage.parameters().contains_key(name));
        let own = own.collect();
        stage.restore(own, 0, None)?;
    }
    Ok(stage)
}

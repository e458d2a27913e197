//! Trains a model for a few steps, whole and cut into stages inside one process: what training is compared with mlx-lm's by.
//!
//! `train MODEL_FOLDER` reads one line of JSON on stdin, `{"role": …, "steps": [[[micro-batch]]], "layouts": [[first layers]], "start": FILE,
//! "save": FILE}`: each step is a list of batches that are accumulated, each batch a list of micro-batches. For each layout it prints a line with
//! the loss of each batch, and the names and shapes of what is trained; what came out is saved in `save` with the layout's number. `"shares":
//! [[1, 1]]` adds groups that split each matrix, a process a rank.

use mlx_cluster_common::{
    architectures::read_spec,
    plan::Collective,
    spec::ModelSpec,
    tensor::{TensorPlace, rank_model},
    training::{MicroBatch, TrainingRole},
    weights::{WeightIndex, WeightMap},
};
use mlx_cluster_lm::{
    Array,
    activations::Activations,
    group::{Group, HOSTFILE_VARIABLE, RANK_VARIABLE},
    tuner::{
        Source,
        stage::{Passed, Pending, TrainedStage},
    },
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    error::Error,
    io::{BufRead, Read, Write},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

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
        let stage = model.rank(place, &addresses, &request)?;
        return run(vec![stage], &request, shares, number.parse()?, is_first);
    }
    for (number, cuts) in request.layouts.iter().enumerate() {
        run(model.pipeline(cuts, &request)?, &request, cuts.clone(), number, true)?;
    }
    for (number, shares) in (request.layouts.len()..).zip(&request.shares) {
        println!("{}", of_group(folder, &line, shares, number)?);
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

/// Starts a process a rank, and gives what rank 0 prints.
fn of_group(folder: &str, request: &str, shares: &[u32], number: usize) -> Result<String, Box<dyn Error>> {
    let free = |_: &u32| Ok::<_, std::io::Error>(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string());
    let addresses = serde_json::to_string(&shares.iter().map(free).collect::<Result<Vec<_>, _>>()?)?;
    let mut ranks = Vec::new();
    for rank in 0..shares.len() {
        let hostfile = std::env::temp_dir().join(format!("train-{}-{rank}.json", std::process::id()));
        let place = TensorPlace { rank: rank as u32, shares: shares.to_vec() };
        let mut process = Command::new(std::env::current_exe()?)
            .args([folder, &serde_json::to_string(&place)?, &addresses, &number.to_string()])
            .envs([(HOSTFILE_VARIABLE, hostfile.as_os_str()), (RANK_VARIABLE, rank.to_string().as_ref())])
            .stdin(Stdio::piped())
            .stdout(if rank == 0 { Stdio::piped() } else { Stdio::null() })
            .spawn()?;
        process.stdin.take().ok_or("no stdin")?.write_all(request.as_bytes())?;
        ranks.push((process, hostfile));
    }
    let mut output = String::new();
    let mut failed = None;
    for (rank, (mut process, hostfile)) in ranks.into_iter().enumerate() {
        if let Some(mut stdout) = process.stdout.take() {
            stdout.read_to_string(&mut output)?;
        }
        let status = process.wait()?;
        drop(std::fs::remove_file(hostfile));
        if !status.success() {
            failed = failed.or(Some(format!("rank {rank} of shares {shares:?} ended with {status}")));
        }
    }
    failed.map_or_else(|| Ok(output.trim().to_owned()), |failed| Err(failed.into()))
}

struct Model {
    folder: PathBuf,
    spec: ModelSpec,
    index: WeightIndex,
    map: WeightMap,
}

impl Model {
    fn open(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let spec = read_spec(&mlx_cluster_hub::read_config(&folder.join("config.json"))?)?;
        let index = mlx_cluster_hub::folder_weight_index(folder)?;
        let map = WeightMap::assign(&spec, &index)?;
        Ok(Self { folder: folder.to_path_buf(), spec, index, map })
    }

    fn pipeline(&self, cuts: &[u32], request: &Request) -> Result<Vec<TrainedStage>, Box<dyn Error>> {
        let starts = [0].iter().chain(cuts).copied();
        let ends = cuts.iter().copied().chain([self.spec.n_layers()]);
        starts.zip(ends).map(|(start, end)| self.stage(start..end, &TensorPlace::alone(), None, request)).collect()
    }

    fn rank(&self, place: TensorPlace, addresses: &[String], request: &Request) -> Result<TrainedStage, Box<dyn Error>> {
        let group = Group::new(place.clone());
        group.form(Collective::Ring, addresses)?;
        self.stage(0..self.spec.n_layers(), &place, Some(group), request)
    }

    fn stage(
        &self,
        layers: std::ops::Range<u32>,
        place: &TensorPlace,
        group: Option<Group>,
        request: &Request,
    ) -> Result<TrainedStage, Box<dyn Error>> {
        let is_split = group.is_some();
        let source = Source {
            folder: &self.folder,
            index: &self.index,
            spec: &self.spec,
            weights: &self.map,
            rank: rank_model(&self.spec, &self.map, place)?,
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
}

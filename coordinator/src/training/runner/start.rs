//! Where a run begins: a checkpoint, weights that the user gave, or nothing.

use crate::{
    core::settings::ModelFacts,
    training::{
        checkpoint::{Part, SavedTensor, TensorFile},
        runs::RunnerContext,
    },
};
use mlx_cluster_common::training::{Trained, TrainingConfig};
use std::{collections::BTreeMap, path::Path};

pub(super) struct Start {
    /// Of the job; when it only tests an adapter, as that was trained.
    pub(super) config: TrainingConfig,
    /// Where there is no checkpoint yet.
    pub(super) weights: Vec<SavedTensor>,
    /// The fingerprint of the data that the newest checkpoint was made with.
    data: Option<(u64, String)>,
    pub(super) notes: Vec<String>,
}

impl Start {
    /// An error is a sentence.
    pub(super) async fn find(context: &RunnerContext, config: &TrainingConfig, model: &ModelFacts) -> Result<Self, String> {
        let mut config = config.clone();
        let file = match (config.train, &config.resume_adapter_file) {
            (true, file) => file.clone(),
            // mlx-lm tests a model without an adapter when the path is empty.
            (false, _) if config.adapter_path.as_os_str().is_empty() => None,
            (false, _) => {
                config = as_trained(&config)?;
                Some(config.adapter_path.join("adapters.safetensors"))
            }
        };
        let trained = model.spec.trained(&model.weights, &config.fine_tune, config.num_layers).map_err(|error| error.to_string())?;
        let trained = trained.into_values().flatten().map(|Trained { name, shape, .. }| (name, shape)).collect();
        let checkpoints = context.checkpoints.clone();
        let name = model.name.clone();
        let found = tokio::task::spawn_blocking(move || {
            let newest = checkpoints.newest().map_err(|error| error.to_string())?;
            let weights = match (&newest.checkpoint, file) {
                (None, Some(file)) => read(&file, &trained, &name)?,
                _ => Vec::new(),
            };
            Ok::<_, String>((newest, weights))
        });
        let (mut newest, weights) = found.await.map_err(|error| error.to_string())??;
        if let (false, Some(file)) = (weights.is_empty(), &config.resume_adapter_file)
            && let Some(base) = base_of(file).filter(|base| *base != config.model)
        {
            newest.warnings.push(format!(
                "{} was made for {base}; its shapes fit {}, which it is trained on now",
                file.display(),
                config.model
            ));
        }
        let data = newest.checkpoint.as_ref().map(|checkpoint| (checkpoint.state.iteration, checkpoint.state.data_fingerprint.clone()));
        Ok(Self { config, weights, data, notes: newest.warnings })
    }

    /// Whether the run began with the checkpoint of this iteration.
    pub(super) fn began_at(&self, iteration: u64) -> bool {
        self.data.as_ref().is_some_and(|(began, _)| *began == iteration)
    }

    pub(super) fn check_data(&self, fingerprint: &str) -> Result<(), String> {
        let Some((iteration, wanted)) = self.data.as_ref().filter(|(_, wanted)| wanted != fingerprint) else { return Ok(()) };
        // The number of validation batches stands behind.
        let of_training = |fingerprint: &str| fingerprint.split('+').next().map(str::to_owned);
        let what = match of_training(wanted) == of_training(fingerprint) {
            true => "the validation set has another number of batches than the one, on which the order of training depends, that",
            false => "the training examples are not those that",
        };
        Err(format!(
            "{what} the checkpoint of iteration {iteration} was made with: bring them back, or start a new job with `resume_adapter_file`"
        ))
    }
}

/// What an adapter was trained as decides how it is read.
fn as_trained(config: &TrainingConfig) -> Result<TrainingConfig, String> {
    let path = config.adapter_path.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let keys: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).map_err(|error| format!("{} is not JSON: {error}", path.display()))?;
    config.for_adapter(&keys).map_err(|error| format!("{}: {error}", path.display()))
}

/// The model that the adapter of this file was made for, as it stands beside it.
fn base_of(adapter: &Path) -> Option<String> {
    let config = std::fs::read(adapter.with_file_name("adapter_config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&config).ok()?;
    Some(config.get("model")?.as_str()?.to_owned())
}

/// Weights of exactly the trained parameters, or some of them, in the shapes that the model has.
fn read(path: &Path, trained: &BTreeMap<String, Vec<u64>>, model: &str) -> Result<Vec<SavedTensor>, String> {
    let file = TensorFile::open(path, Part::Adapters).map_err(|error| error.to_string())?;
    let (mut wrong, mut all) = (Vec::new(), 0usize);
    for (name, slot) in file.left() {
        all += 1;
        match trained.get(name) {
            Some(shape) if *shape == slot.shape => {}
            Some(shape) => wrong.push(format!("`{name}` is {:?}, wanted is {shape:?}", slot.shape)),
            None => wrong.push(format!("`{name}` is nothing that this job trains")),
        }
    }
    if let Some(first) = wrong.first() {
        let made_for = base_of(path).map(|base| format!(", which was made for {base},")).unwrap_or_default();
        return Err(format!(
            "{}{made_for} does not fit {model} with these settings: {first} ({} of its {all} tensors do not fit); is it of another model, or of \
             another rank, keys or fine_tune_type?",
            path.display(),
            wrong.len(),
        ));
    }
    file.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())
}

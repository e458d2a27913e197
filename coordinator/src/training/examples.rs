//! What a job is trained on: its data sets, read once, and the batches that follow from them.

use super::data::{
    BatchError, BatchPlan, Batches, DataError, DataSet, DataSets, DataSource, Encoder, Features, Grouped, HubSet, ReadOptions, Wanted,
    locate, pack, packing_note, read, test_only,
};
use mlx_cluster_common::training::{Row, TrainingConfig, config};
use mlx_cluster_hub::HubSettings;
use std::{path::PathBuf, sync::Arc};
use tokio_util::sync::CancellationToken;

/// Why there is nothing to train on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExamplesError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Batch(#[from] BatchError),
    #[error("the training set is empty: {name} has no examples")]
    Empty { name: String },
    #[error("reading the data failed: {cause}; please report this")]
    Task { cause: String },
}

/// All that is read before engines start.
pub(super) struct Examples {
    pub(super) train: Option<Arc<DataSet>>,
    valid: Option<Arc<DataSet>>,
    test: Option<Arc<DataSet>>,
    /// For people.
    pub(super) notes: Vec<String>,
    batch_size: usize,
    packing: bool,
    plan: BatchPlan,
    test_batches: Option<u64>,
}

impl Examples {
    /// `model` is the folder with the tokenizer.
    pub(super) async fn read(
        config: &TrainingConfig,
        model: PathBuf,
        settings: &HubSettings,
        cancel: &CancellationToken,
    ) -> Result<Self, ExamplesError> {
        let wanted = Wanted { train: config.train, test: config.test };
        let located = locate(&source(config), wanted, settings, &|_| {}).await?;
        let options = ReadOptions { mask_prompt: config.mask_prompt, max_seq_length: config.max_seq_length as usize };
        let cancel = cancel.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let encoder = Encoder::load(&model)?;
            read(&located, &encoder, options, &cancel)
        });
        let sets = reading.await.map_err(|error| ExamplesError::Task { cause: error.to_string() })??;
        let DataSets { train, valid, test, mut notes } = sets;
        for set in [&train, &valid, &test].into_iter().flatten() {
            notes.extend(set.notes.iter().cloned());
        }
        if let Some(train) = train.as_ref().filter(|train| train.examples.is_empty()) {
            return Err(ExamplesError::Empty { name: train.name.clone() });
        }
        let examples = Self {
            train: train.map(Arc::new),
            valid: valid.filter(|valid| !valid.examples.is_empty()).map(Arc::new),
            test: test.map(Arc::new),
            notes,
            batch_size: config.batch_size as usize,
            packing: config.packing,
            plan: BatchPlan {
                iters: config.iters,
                steps_per_eval: config.steps_per_eval,
                val_batches: config.val_batches,
                seed: config.seed,
            },
            test_batches: config.test_batches,
        };
        examples.check()?;
        Ok(examples)
    }

    /// Batches that are too few, or that nothing can be learned from, are refused before anything is loaded, also those that are needed
    /// at the very end.
    fn check(&self) -> Result<(), ExamplesError> {
        if let (Some((batches, _)), Some(train)) = (self.batches()?, &self.train) {
            batches.check_trained(train)?;
        }
        for set in [&self.valid, &self.test].into_iter().flatten() {
            Grouped::new(set, self.batch_size)?.check_evaluated(set)?;
        }
        Ok(())
    }

    /// The longest row, in tokens.
    pub(super) fn longest(&self) -> u32 {
        let sets = [&self.train, &self.valid, &self.test].into_iter().flatten();
        let longest = sets.flat_map(|set| &set.examples).map(|example| example.tokens.len()).max().unwrap_or(1);
        u32::try_from(longest).unwrap_or(u32::MAX)
    }

    /// Of what decides what is trained on and when. Evaluations draw from the random numbers that order the batches of training, one
    /// number for each batch there is: how many follows after a `+`. Older checkpoints have the training set's part alone.
    pub(super) fn fingerprint(&self) -> String {
        let train = self.train.as_ref().map(|train| train.fingerprint()).unwrap_or_default();
        match &self.valid {
            Some(valid) => format!("{train}+{}", valid.examples.len() / self.batch_size.max(1)),
            None => train,
        }
    }

    /// From the start, with a note where examples are packed.
    pub(super) fn batches(&self) -> Result<Option<(Batches, Option<String>)>, ExamplesError> {
        let Some(train) = &self.train else { return Ok(None) };
        let (grouped, note) = match self.packing {
            true => {
                let rows = pack(train);
                (Grouped::packed(train, &rows, self.batch_size)?, Some(packing_note(train, &rows)))
            }
            false => (Grouped::new(train, self.batch_size)?, None),
        };
        let valid = self.valid.as_ref().map(|valid| Grouped::new(valid, self.batch_size)).transpose()?;
        Ok(Some((Batches::new(grouped, valid, self.plan)?, note)))
    }

    /// Batches of the test: after training, or without.
    pub(super) fn test_batches(&self, trained: Option<&mut Batches>) -> Result<Vec<Vec<u32>>, ExamplesError> {
        let Some(test) = &self.test else { return Ok(Vec::new()) };
        Ok(match trained {
            Some(batches) => batches.test(&Grouped::new(test, self.batch_size)?, self.test_batches),
            None => test_only(test, self.batch_size, self.test_batches, self.plan.seed)?,
        })
    }

    pub(super) fn train_rows(&self, batch: &[u32]) -> Vec<Row> {
        self.train.as_ref().map(|set| set.rows(batch)).unwrap_or_default()
    }

    pub(super) fn valid_rows(&self, batch: &[u32]) -> Vec<Row> {
        self.valid.as_ref().map(|set| set.rows(batch)).unwrap_or_default()
    }

    pub(super) fn test_rows(&self, batch: &[u32]) -> Vec<Row> {
        self.test.as_ref().map(|set| set.rows(batch)).unwrap_or_default()
    }
}

fn source(config: &TrainingConfig) -> DataSource {
    let features = |features: &config::Features| {
        let config::Features { prompt, completion, text, chat } = features.clone();
        Features { prompt, completion, text, chat }
    };
    match &config.data {
        config::DataSource::Named { name, features: of } => DataSource::Named { data: name.clone(), features: features(of) },
        config::DataSource::Hub(sets) => DataSource::Listed(
            sets.iter()
                .map(|set| HubSet {
                    path: set.path.clone(),
                    revision: set.revision.clone(),
                    config_name: set.config_name.clone(),
                    train_split: Some(set.train_split.clone()),
                    valid_split: Some(set.valid_split.clone()),
                    test_split: set.test_split.clone(),
                    features: features(&set.features),
                })
                .collect(),
        ),
    }
}

#[cfg(test)]
mod tests;

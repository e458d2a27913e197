//! Models that are read to be served while the coordinator runs: one at a time, and only while none is served.

use crate::{
    core::{
        placement::{self, WhyNot},
        settings::InstanceSettings,
    },
    model::{self, LoadedModel, ModelError},
};
use mlx_cluster_common::plan::Strategy;
use std::{path::PathBuf, pin::Pin};
use tokio::sync::oneshot;

/// What is asked for; what is left out is as the coordinator was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadRequest {
    /// A folder or a repository.
    pub model: String,
    pub strategy: Option<Strategy>,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: Option<u32>,
}

/// Why a model is not loaded, or not unloaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("`{model}` is served already: unload it first with POST /v1/cluster/unload")]
    ServedAlready { model: String },
    #[error("`{model}` is being read already: wait for it, or call it off with POST /v1/cluster/unload")]
    BeingRead { model: String },
    #[error("no model is served: load one with POST /v1/cluster/load")]
    NothingServed,
    #[error("`{model}` was called off while it was read")]
    CalledOff { model: String },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Plan(#[from] WhyNot),
}

/// Answered with the model's name once its engines are being planned, before they are there.
pub type LoadAnswer = oneshot::Sender<Result<String, LoadError>>;

/// A model whose files are being read.
pub(crate) struct Reading {
    request: LoadRequest,
    answer: LoadAnswer,
    model: Pin<Box<dyn Future<Output = Result<LoadedModel, ModelError>> + Send>>,
}

/// What a model is to be served with.
pub(crate) struct Read {
    pub(crate) model: LoadedModel,
    pub(crate) settings: InstanceSettings,
}

impl Reading {
    pub(crate) fn start(request: LoadRequest, answer: LoadAnswer, home: PathBuf) -> Self {
        let name = request.model.clone();
        Self { request, answer, model: Box::pin(async move { model::load(&name, &home).await }) }
    }

    /// What it is called in the request.
    pub(crate) fn model(&self) -> &str {
        &self.request.model
    }

    /// Waits for the files. May be dropped and called again.
    pub(crate) async fn read(&mut self) -> Result<LoadedModel, ModelError> {
        self.model.as_mut().await
    }

    /// Tells who asked how it went; Some when the model can be planned.
    pub(crate) fn finish(self, read: Result<LoadedModel, ModelError>, defaults: &InstanceSettings) -> Option<Read> {
        let checked = read.map_err(LoadError::from).and_then(|model| {
            let settings = InstanceSettings {
                strategy: self.request.strategy.unwrap_or(defaults.strategy),
                context_tokens: self.request.context_tokens.or(defaults.context_tokens),
                ..defaults.clone()
            };
            check(&model, &settings)?;
            Ok(Read { model, settings })
        });
        let (answer, read) = match checked {
            Ok(read) => (Ok(read.model.facts.name.clone()), Some(read)),
            Err(error) => (Err(error), None),
        };
        // Who asked may be gone; the model is served all the same.
        drop(self.answer.send(answer));
        read
    }

    pub(crate) fn call_off(self) {
        // Who asked may be gone.
        drop(self.answer.send(Err(LoadError::CalledOff { model: self.request.model })));
    }
}

/// What can be known to be wrong before any worker is there.
pub(crate) fn check(model: &LoadedModel, settings: &InstanceSettings) -> Result<(), WhyNot> {
    placement::check_split(model.facts.spec.n_layers(), settings.split.as_deref())?;
    placement::check_stages(&model.facts.spec, settings.stages.as_deref(), settings.strategy)
}

//! Reads what is to be served: config, weight index, tokenizer, chat template. No weights.

use crate::{
    chat::{
        template::{ChatTemplate, TemplateError},
        tokenizer::{ChatTokenizer, TokenizerError},
    },
    core::{placement::Reckoned, settings::ModelFacts},
    serving::ServedModel,
};
use mlx_cluster_common::{
    architectures::read_spec,
    config::ConfigError,
    engine::ModelSource,
    weights::{WeightError, WeightMap},
};
use mlx_cluster_hub::{HubError, HubErrorKind, HubSettings, JsonFileError, ModelRef, ModelRefError, Snapshot};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Why a model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Name(#[from] ModelRefError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{model}: {source}")]
    Config { model: String, source: ConfigError },
    #[error("{model}: {source}")]
    Weights { model: String, source: WeightError },
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error("{model}: {source}")]
    Template { model: String, source: TemplateError },
    #[error("{model}: the tokenizer has ids up to {}, the embedding has {rows} rows: tokenizer and weights do not belong together", ids.saturating_sub(1))]
    Vocabulary { model: String, ids: u32, rows: u32 },
    #[error("reading the model failed: {cause}; please report this")]
    Task { cause: String },
}

impl ModelError {
    /// The coarse cause.
    pub fn kind(&self) -> HubErrorKind {
        match self {
            ModelError::Hub(error) => error.kind(),
            ModelError::Name(_) => HubErrorKind::NotFound,
            ModelError::Task { .. } => HubErrorKind::Resources,
            _ => HubErrorKind::BadFile,
        }
    }
}

/// A model, read and checked as far as possible without its weights.
#[derive(Debug)]
pub struct LoadedModel {
    pub facts: Arc<ModelFacts>,
    tokenizer: Arc<ChatTokenizer>,
    template: Option<ChatTemplate>,
    created: u64,
}

/// Finds the model that `--model` names, fetches its metadata where it is on the hub, and checks all of it. What it consists of is kept in
/// the data folder `home`.
pub async fn load(argument: &str, home: &Path) -> Result<LoadedModel, ModelError> {
    let model = ModelRef::parse(argument)?;
    let name = model.display_name();
    let progress = |progress: mlx_cluster_hub::Progress<'_>| {
        tracing::debug!(file = progress.file, done_bytes = progress.done_bytes, total_bytes = progress.total_bytes, "metadata");
    };
    let snapshot = Snapshot::open(&model, &HubSettings::from_env().with_home(home), &progress).await?;
    let facts = facts(&name, &snapshot).await?;
    let folder = snapshot.folder().to_owned();
    let (tokenizer, template) = blocking(&name, move |name| text_side(&name, &folder)).await??;
    let rows = facts.spec.vocab_size;
    if tokenizer.vocab_size() > rows {
        return Err(ModelError::Vocabulary { model: name, ids: tokenizer.vocab_size(), rows });
    }
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Ok(LoadedModel { facts: Arc::new(facts), tokenizer: Arc::new(tokenizer), template, created })
}

/// What the planner needs: no tokenizer, no template.
pub async fn load_facts(argument: &str) -> Result<ModelFacts, ModelError> {
    let model = ModelRef::parse(argument)?;
    let snapshot = Snapshot::open(&model, &HubSettings::from_env(), &|_| {}).await?;
    facts(&model.display_name(), &snapshot).await
}

async fn facts(name: &str, snapshot: &Snapshot) -> Result<ModelFacts, ModelError> {
    let spec = read_spec(&snapshot.config()?).map_err(|source| ModelError::Config { model: name.to_owned(), source })?;
    let index = snapshot.weight_index().await?;
    let weights = WeightMap::assign(&spec, &index).map_err(|source| ModelError::Weights { model: name.to_owned(), source })?;
    let path = snapshot.folder().join("config.json");
    let config = tokio::fs::read(&path).await.map_err(|source| ModelError::Read { path, source })?;
    let fingerprint = index.fingerprint(&config);
    Ok(ModelFacts { name: name.to_owned(), source: source(snapshot.model()), spec, weights, fingerprint, reckoned: Reckoned::default() })
}

/// What to tell workers: a folder by its whole path, a repository at its commit.
fn source(model: &ModelRef) -> ModelSource {
    match model {
        ModelRef::Folder(folder) => {
            let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
            ModelSource::Folder(absolute.to_string_lossy().into_owned())
        }
        ModelRef::Repo(repo) => ModelSource::Repo { id: repo.id(), revision: repo.revision().to_owned() },
    }
}

fn text_side(name: &str, folder: &Path) -> Result<(ChatTokenizer, Option<ChatTemplate>), ModelError> {
    let tokenizer = ChatTokenizer::load(folder)?;
    let template = ChatTemplate::load(folder).map_err(|source| ModelError::Template { model: name.to_owned(), source })?;
    Ok((tokenizer, template))
}

/// Tokenizers are large and slow to parse.
async fn blocking<T: Send + 'static>(name: &str, work: impl FnOnce(String) -> T + Send + 'static) -> Result<T, ModelError> {
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || work(name)).await.map_err(|error| ModelError::Task { cause: error.to_string() })
}

impl LoadedModel {
    /// As the API sees it, with the context that was planned.
    pub fn served(&self, context_tokens: u32) -> ServedModel {
        ServedModel {
            id: self.facts.name.clone(),
            adapter: None,
            vocab_size: self.facts.spec.vocab_size,
            context_tokens,
            tokenizer: Arc::clone(&self.tokenizer),
            template: self.template.clone(),
            created: self.created,
        }
    }
}

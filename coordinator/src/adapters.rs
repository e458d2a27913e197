//! Adapters that clients ask for by name: found on this machine, checked against the model before any engine hears of them, and kept open.

use crate::core::{
    adapters::{ADAPTERS_MAX, AdapterFacts},
    settings::ModelFacts,
};
use mlx_cluster_common::{
    dtype::DType,
    ids::AdapterId,
    spec::Part,
    training::{AdapterError, Change, FineTune},
    weights::TensorEntry,
};
use mlx_cluster_hub::{AdapterFileError, AdapterFiles};
use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};
use tokio::sync::oneshot;

const NAME_CHARS_MAX: usize = 128;
/// Factors are held as 32-bit numbers, whatever they are on the disk.
const NUMBER_BYTES: u64 = 4;

/// Why an adapter is not loaded, or not dropped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServeAdapterError {
    #[error("an adapter's name has 1 to {NAME_CHARS_MAX} letters, digits, `.`, `_`, `-` and `/`, not `{name}`")]
    Name { name: String },
    #[error("adapter `{name}` is there already: drop it first with DELETE /v1/adapters/{name}, or give this one another name")]
    NameTaken { name: String },
    #[error("`{name}` is the name of the model: give the adapter another one")]
    NameOfModel { name: String },
    #[error("{ADAPTERS_MAX} adapters are there already: drop one with DELETE /v1/adapters/NAME first")]
    TooMany,
    #[error("no model is served that an adapter could go with: load one with POST /v1/cluster/load")]
    NothingServed,
    #[error("there is no adapter `{name}`; {there}")]
    NotThere { name: String, there: String },
    #[error("{message}")]
    File { message: String },
    #[error("{folder}: {cause}")]
    Misfit { folder: String, cause: AdapterError },
    #[error(
        "{folder} holds whole weights (`fine_tune_type` full), which cannot be chosen for each request: make a model of them with `mlx-cluster fuse`"
    )]
    Full { folder: String },
    #[error("{message}")]
    Engines { message: String },
    #[error("reading the adapter failed: {cause}; please report this")]
    Task { cause: String },
}

/// Answered once the adapter is on all engines, or once no new request can have it.
pub type AdapterAnswer = oneshot::Sender<Result<Arc<AdapterFacts>, ServeAdapterError>>;

/// What `--adapter` says: a path, or a name and a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterArgument {
    pub name: String,
    pub path: PathBuf,
}

impl std::str::FromStr for AdapterArgument {
    type Err = ServeAdapterError;

    /// `PATH`, whose last part is the name, or `NAME=PATH`.
    fn from_str(text: &str) -> Result<Self, ServeAdapterError> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) => (name.to_owned(), Path::new(path)),
            None => (last_part(text), Path::new(text)),
        };
        check_name(&name)?;
        Ok(Self { name, path: path.to_owned() })
    }
}

/// The folder's name, or that of a file without its ending.
fn last_part(path: &str) -> String {
    let last = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    last.strip_suffix(".safetensors").unwrap_or(last).to_owned()
}

pub(crate) fn check_name(name: &str) -> Result<(), ServeAdapterError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    match !name.is_empty() && name.len() <= NAME_CHARS_MAX && name.chars().all(is_allowed) {
        true => Ok(()),
        false => Err(ServeAdapterError::Name { name: name.chars().take(NAME_CHARS_MAX).collect() }),
    }
}

/// An adapter that fits to the served model, with its file open: what was checked is what every engine gets, also when another file takes the
/// place of this one, as training does when it saves.
#[derive(Debug)]
pub struct OpenAdapter {
    pub facts: Arc<AdapterFacts>,
    pub(crate) scale: f32,
    tensors: BTreeMap<String, TensorEntry>,
    file: File,
    stamp: (u64, Option<SystemTime>),
}

/// What an engine is sent of an adapter.
pub(crate) struct Piece {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) data: Vec<u8>,
}

impl OpenAdapter {
    /// Opens and checks the adapter at a path (its folder, or one of the weight files in it). Blocks on the disk.
    pub fn open(name: &str, path: &Path, model: &ModelFacts) -> Result<Self, ServeAdapterError> {
        let file_error = |error: AdapterFileError| ServeAdapterError::File { message: error.to_string() };
        let AdapterFiles { folder, weights, adapter } = AdapterFiles::open(path).map_err(file_error)?;
        let (folder_name, path) = (folder.display().to_string(), weights.display().to_string());
        let scale = match &adapter.config.fine_tune {
            FineTune::Full => return Err(ServeAdapterError::Full { folder: folder_name }),
            FineTune::Lora(lora) | FineTune::Dora(lora) => lora.scale,
        };
        let misfit = |cause| ServeAdapterError::Misfit { folder: folder_name.clone(), cause };
        adapter.check_against(&model.spec, &model.weights, &model.name).map_err(misfit)?;
        let unread = |error: io::Error| ServeAdapterError::File { message: format!("cannot read {path}: {error}") };
        let file = File::open(&weights).map_err(unread)?;
        let stamp = stamp(&file).map_err(unread)?;
        let is_dora = adapter.changes().values().any(|change| matches!(change, Change::LowRank { magnitude: Some(_), .. }));
        let rank = adapter.config.fine_tune.lora().map_or(0, |lora| lora.rank);
        let facts = AdapterFacts {
            name: name.to_owned(),
            path: path.clone(),
            rank,
            is_dora,
            modules: adapter.changes().len(),
            bytes: bytes_by_part(model, &adapter.tensors.tensors),
        };
        Ok(Self { facts: Arc::new(facts), scale, tensors: adapter.tensors.tensors, file, stamp })
    }

    /// The tensors for these parts of the model, and their bytes on the disk.
    pub(crate) fn of_parts(&self, model: &ModelFacts, parts: &[Part]) -> (Vec<String>, u64) {
        let paths: Vec<&str> = parts.iter().flat_map(|part| model.spec.weights(*part)).map(|weight| weight.path()).collect();
        let own = self.tensors.iter().filter(|(name, _)| name.rsplit_once('.').is_some_and(|(path, _)| paths.contains(&path)));
        let own: Vec<_> = own.collect();
        (own.iter().map(|(name, _)| (*name).clone()).collect(), own.iter().map(|(_, entry)| entry.bytes).sum())
    }

    /// Reads up to `length` bytes of a tensor from `start` on. Blocks on the disk. An error is a sentence.
    pub(crate) fn read(&self, name: &str, start: u64, length: u64) -> Result<Piece, String> {
        let entry = self.tensors.get(name).ok_or_else(|| format!("`{name}` is no tensor of {}", self.facts.path))?;
        let unread = |error: io::Error| format!("cannot read {}: {error}", self.facts.path);
        if stamp(&self.file).map_err(unread)? != self.stamp {
            return Err(format!("{} was changed since it was loaded: drop the adapter and load it again", self.facts.path));
        }
        let mut data = vec![0; length.min(entry.bytes.saturating_sub(start)) as usize];
        self.file.read_exact_at(&mut data, entry.offset + start).map_err(unread)?;
        Ok(Piece { name: name.to_owned(), dtype: entry.dtype, shape: entry.shape.clone(), data })
    }
}

/// As long as this is the same, so is the file.
fn stamp(file: &File) -> io::Result<(u64, Option<SystemTime>)> {
    let metadata = file.metadata()?;
    Ok((metadata.len(), metadata.modified().ok()))
}

fn bytes_by_part(model: &ModelFacts, tensors: &BTreeMap<String, TensorEntry>) -> BTreeMap<Part, u64> {
    let mut bytes = BTreeMap::new();
    for part in model.spec.parts() {
        for weight in model.spec.weights(part) {
            let factors = ["lora_a", "lora_b", "m"].map(|suffix| format!("{}.{suffix}", weight.path()));
            let numbers: u64 = factors.iter().filter_map(|name| tensors.get(name)).map(|entry| entry.shape.iter().product::<u64>()).sum();
            if numbers > 0 {
                *bytes.entry(part).or_default() += numbers * NUMBER_BYTES;
            }
        }
    }
    bytes
}

/// The adapters that engines are given, by number, and who waits for them.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    last: u64,
    open: BTreeMap<AdapterId, Arc<OpenAdapter>>,
    waiting: BTreeMap<AdapterId, AdapterAnswer>,
    /// What is to be answered once the state that it speaks of can be seen.
    owed: Vec<(AdapterAnswer, Result<Arc<AdapterFacts>, ServeAdapterError>)>,
    /// Names of those that are being read.
    reading: Vec<String>,
}

impl Registry {
    pub(crate) fn add(&mut self, adapter: Arc<OpenAdapter>, answer: Option<AdapterAnswer>) -> AdapterId {
        self.last += 1;
        let id = AdapterId(self.last);
        self.open.insert(id, adapter);
        self.waiting.extend(answer.map(|answer| (id, answer)));
        id
    }

    pub(crate) fn get(&self, id: AdapterId) -> Option<&Arc<OpenAdapter>> {
        self.open.get(&id)
    }

    /// A place for an adapter that is going to be read; `there` are those that the core knows.
    pub(crate) fn reserve(&mut self, name: &str, model: &ModelFacts, there: &[&str]) -> Result<(), ServeAdapterError> {
        check_name(name)?;
        if name == model.name {
            return Err(ServeAdapterError::NameOfModel { name: name.to_owned() });
        }
        if there.contains(&name) || self.reading.iter().any(|other| other == name) {
            return Err(ServeAdapterError::NameTaken { name: name.to_owned() });
        }
        if there.len() + self.reading.len() >= ADAPTERS_MAX {
            return Err(ServeAdapterError::TooMany);
        }
        self.reading.push(name.to_owned());
        Ok(())
    }

    pub(crate) fn read(&mut self, name: &str) {
        self.reading.retain(|other| other != name);
    }

    /// Tells who waits what became of an adapter; one that is not there is forgotten.
    pub(crate) fn settled(&mut self, id: AdapterId, outcome: Result<(), String>) {
        let Some(adapter) = self.open.get(&id).cloned() else { return };
        if outcome.is_err() {
            self.open.remove(&id);
        }
        if let Some(answer) = self.waiting.remove(&id) {
            let outcome = outcome.map(|()| Arc::clone(&adapter.facts));
            self.owe(answer, outcome.map_err(|message| ServeAdapterError::Engines { message }));
        }
    }

    /// To be answered soon.
    pub(crate) fn owe(&mut self, answer: AdapterAnswer, outcome: Result<Arc<AdapterFacts>, ServeAdapterError>) {
        self.owed.push((answer, outcome));
    }

    /// Answers all that is owed.
    pub(crate) fn answer(&mut self) {
        // Who asked may be gone.
        self.owed.drain(..).for_each(|(answer, outcome)| drop(answer.send(outcome)));
    }

    /// The model is gone, and all adapters with it.
    pub(crate) fn clear(&mut self) {
        let ids: Vec<AdapterId> = self.open.keys().copied().collect();
        ids.into_iter().for_each(|id| self.settled(id, Err("the model is not served any more".into())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_argument_is_a_path_or_a_name_and_a_path() {
        let read = |text: &str| text.parse::<AdapterArgument>().map(|argument| (argument.name, argument.path.display().to_string()));
        assert_eq!(read("runs/poems/"), Ok(("poems".into(), "runs/poems/".into())));
        assert_eq!(read("runs/poems/0000100_adapters.safetensors").map(|(name, _)| name), Ok("0000100_adapters".into()));
        assert_eq!(read("verse=runs/poems"), Ok(("verse".into(), "runs/poems".into())));
        for wrong in ["", "=x", "a:b=x", "a b=x", &format!("{}=x", "n".repeat(129))] {
            assert!(matches!(read(wrong), Err(ServeAdapterError::Name { .. })), "{wrong}");
        }
    }
}

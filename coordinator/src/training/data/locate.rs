//! Where the files of a data set are: a folder, or a repository on the hub, whose files are fetched.

use super::{
    error::DataError,
    form::Features,
    split::{Slice, parse},
};
use mlx_cluster_hub::{DatasetRepo, HubSettings, OnProgress, RepoRef};
use std::path::{Path, PathBuf};

/// What the configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataSource {
    /// `data`: a folder, or else a data set on the hub.
    Named { data: String, features: Features },
    /// `hf_dataset`: parts of data sets, one after the other.
    Listed(Vec<HubSet>),
}

/// An entry of `hf_dataset`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSet {
    /// A folder, or `owner/name` on the hub.
    pub path: String,
    /// A branch, tag or commit on the hub; None: `main`.
    pub revision: Option<String>,
    /// Which configuration of the data set. No name is accepted, but to be refused it has to get here.
    pub config_name: Option<String>,
    /// None: `train[:80%]`, as in mlx-lm.
    pub train_split: Option<String>,
    /// None: `train[-10%:]`, as in mlx-lm.
    pub valid_split: Option<String>,
    /// Needed for a test.
    pub test_split: Option<String>,
    pub features: Features,
}

/// Which sets are needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Training and validation.
    pub train: bool,
    pub test: bool,
}

/// Files on this machine, for [`read`](super::read).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Located {
    pub(super) train: Option<Split>,
    pub(super) valid: Option<Split>,
    pub(super) test: Option<Split>,
    pub(super) notes: Vec<String>,
}

/// One set: parts that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) name: String,
    pub(super) parts: Vec<Part>,
}

/// Rows of one form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) pieces: Vec<Piece>,
    pub(super) features: Features,
    /// Rows are of a table: each has all fields that any of them has.
    pub(super) columns: bool,
}

/// Rows out of files that make up one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) files: Vec<PathBuf>,
    /// None: all rows.
    pub(super) slice: Option<Slice>,
}

/// Finds the files, and fetches those that are on the hub. A missing validation set is a note and no error.
///
/// # Errors
/// A source that does not exist, splits without JSON lines, and all of [`HubError`](mlx_cluster_hub::HubError).
pub async fn locate(source: &DataSource, wanted: Wanted, settings: &HubSettings, progress: OnProgress<'_>) -> Result<Located, DataError> {
    match source {
        DataSource::Named { data, features } => named(data, features, wanted, settings, progress).await,
        DataSource::Listed(sets) => listed(sets, wanted, settings, progress).await,
    }
}

async fn named(
    data: &str,
    features: &Features,
    wanted: Wanted,
    settings: &HubSettings,
    progress: OnProgress<'_>,
) -> Result<Located, DataError> {
    let place = Place::open(data, settings).await?;
    let mut located = Located::default();
    let file = |split: &str| format!("{split}.jsonl");
    if wanted.train {
        let missing = || DataError::NoTrainingSet { place: place.name(), file: file("train") };
        located.train = Some(place.whole("train", features, progress).await?.ok_or_else(|| place.explain("train", missing()))?);
        located.valid = place.whole("valid", features, progress).await?;
        if located.valid.is_none() {
            located.notes.push(format!("{} has no {}: training goes on without validation", place.name(), file("valid")));
        }
    }
    if wanted.test {
        let missing = || DataError::NoTestSet { place: place.name(), file: file("test") };
        located.test = Some(place.whole("test", features, progress).await?.ok_or_else(|| place.explain("test", missing()))?);
    }
    Ok(located)
}

async fn listed(sets: &[HubSet], wanted: Wanted, settings: &HubSettings, progress: OnProgress<'_>) -> Result<Located, DataError> {
    let (mut train, mut valid, mut test) = (Vec::new(), Vec::new(), Vec::new());
    for set in sets {
        let place = Place::of_entry(set, settings).await?;
        if wanted.train {
            train.push(place.part(set.train_split.as_deref().unwrap_or("train[:80%]"), &set.features, progress).await?);
            valid.push(place.part(set.valid_split.as_deref().unwrap_or("train[-10%:]"), &set.features, progress).await?);
        }
        if wanted.test {
            let split = set.test_split.as_deref().ok_or_else(|| DataError::NoTestSplit { path: set.path.clone() })?;
            test.push(place.part(split, &set.features, progress).await?);
        }
    }
    let joined = |parts: Vec<(String, Part)>| -> Option<Split> {
        let (names, parts): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        (!parts.is_empty()).then(|| Split { name: names.join(" and "), parts })
    };
    let located = Located { train: joined(train), valid: joined(valid), test: joined(test), notes: Vec::new() };
    match (&located.train, &located.test) {
        (None, _) if wanted.train => Err(DataError::NoSource),
        (_, None) if wanted.test => Err(DataError::NoSource),
        _ => Ok(located),
    }
}

/// A folder or a repository.
enum Place {
    Folder(PathBuf, Vec<String>),
    Repo(RepoRef, Box<DatasetRepo>),
}

impl Place {
    /// As an entry of `hf_dataset` names it.
    async fn of_entry(set: &HubSet, settings: &HubSettings) -> Result<Self, DataError> {
        let path = set.path.clone();
        if let Some(name) = set.config_name.clone() {
            return Err(DataError::NoConfigurations { path, name });
        }
        match set.revision.clone() {
            Some(revision) if Path::new(&path).is_dir() => Err(DataError::FolderRevision { path, revision }),
            Some(revision) if !Path::new(&path).exists() => Self::open(&format!("{path}@{revision}"), settings).await,
            _ => Self::open(&path, settings).await,
        }
    }

    async fn open(argument: &str, settings: &HubSettings) -> Result<Self, DataError> {
        if argument.trim().is_empty() {
            return Err(DataError::NoSource);
        }
        let path = Path::new(argument);
        if path.is_dir() {
            let failed = |source| DataError::Read { path: path.to_owned(), source };
            let entries: Vec<_> = std::fs::read_dir(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)?;
            let names = entries.into_iter().filter(|entry| entry.path().is_file()).filter_map(|entry| entry.file_name().into_string().ok());
            let mut names: Vec<String> = names.collect();
            names.sort();
            return Ok(Self::Folder(path.to_owned(), names));
        }
        if path.exists() {
            return Err(DataError::NotAFolder { path: path.to_owned() });
        }
        let repo: RepoRef = argument.parse()?;
        let opened = DatasetRepo::open(&repo, settings).await?;
        Ok(Self::Repo(repo, Box::new(opened)))
    }

    fn name(&self) -> String {
        match self {
            Self::Folder(path, _) => path.display().to_string(),
            Self::Repo(repo, _) => repo.id(),
        }
    }

    fn holds(&self) -> &[String] {
        match self {
            Self::Folder(_, names) => names,
            Self::Repo(_, repo) => repo.files(),
        }
    }

    /// The set in `split`.jsonl, all of it.
    async fn whole(&self, split: &str, features: &Features, progress: OnProgress<'_>) -> Result<Option<Split>, DataError> {
        let files = match self {
            // As mlx-lm: the one file of that name.
            Self::Folder(path, names) => {
                names.iter().find(|name| **name == format!("{split}.jsonl")).map(|name| path.join(name)).into_iter().collect()
            }
            Self::Repo(_, repo) => repo.fetch(&files_of(split, repo.files()), progress).await?,
        };
        if files.is_empty() {
            return Ok(None);
        }
        let name = match (self, files.as_slice()) {
            (Self::Folder(..), [file]) => file.display().to_string(),
            _ => format!("{} ({split})", self.name()),
        };
        let piece = Piece { files, slice: None };
        let part = Part { pieces: vec![piece], features: features.clone(), columns: matches!(self, Self::Repo(..)) };
        Ok(Some(Split { name, parts: vec![part] }))
    }

    /// The part that an expression names.
    async fn part(&self, expression: &str, features: &Features, progress: OnProgress<'_>) -> Result<(String, Part), DataError> {
        let mut pieces = Vec::new();
        for slice in parse(expression)? {
            let names = files_of(&slice.split, self.holds());
            if names.is_empty() {
                let missing = DataError::NoSplit { place: self.name(), split: slice.split.clone(), holds: some(self.holds()) };
                return Err(self.explain(&slice.split, missing));
            }
            let files = match self {
                Self::Folder(path, _) => names.iter().map(|name| path.join(name)).collect(),
                Self::Repo(_, repo) => repo.fetch(&names, progress).await?,
            };
            pieces.push(Piece { files, slice: Some(slice) });
        }
        Ok((format!("{} ({expression})", self.name()), Part { pieces, features: features.clone(), columns: true }))
    }

    /// A better reason than `missing`, if there is one.
    fn explain(&self, split: &str, missing: DataError) -> DataError {
        let deeper = match self {
            Self::Folder(..) => &[],
            Self::Repo(_, repo) => repo.deeper(),
        };
        let all = [self.holds(), deeper].concat();
        let parquet = all.iter().find(|name| name.ends_with(".parquet"));
        let jsonl = all.iter().any(|name| name.ends_with(".jsonl"));
        match (self, parquet) {
            (_, Some(example)) if !jsonl => DataError::Parquet { place: self.name(), example: example.clone() },
            (Self::Repo(..), _) if !deeper.is_empty() => {
                DataError::NoSplit { place: self.name(), split: split.to_owned(), holds: some(&all) }
            }
            (Self::Repo(_, repo), _) => repo.not_cached(&format!("{split}.jsonl")).map_or(missing, DataError::Hub),
            _ => missing,
        }
    }
}

/// `split`.jsonl or, in their order, its numbered parts as `datasets` names them; for `valid` also what it calls it, `validation`.
fn files_of(split: &str, names: &[String]) -> Vec<String> {
    let is_part = |name: &String, split: &str| {
        let numbers = name.strip_prefix(split).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".jsonl")?.split_once("-of-"));
        let is_number = |digits: &str| digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
        numbers.is_some_and(|(part, parts)| is_number(part) && is_number(parts))
    };
    let spellings: &[&str] = if split == "valid" { &["valid", "validation"] } else { &[split] };
    for split in spellings {
        let file = format!("{split}.jsonl");
        if names.contains(&file) {
            return vec![file];
        }
        let mut parts: Vec<String> = names.iter().filter(|name| is_part(name, split)).cloned().collect();
        parts.sort();
        if !parts.is_empty() {
            return parts;
        }
    }
    Vec::new()
}

/// A few of the names, for people.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 5;
    match names.len() {
        0 => "no files".to_owned(),
        count if count <= SHOWN => names.join(", "),
        count => format!("{} and {} more", names[..SHOWN].join(", "), count - SHOWN),
    }
}

#[cfg(test)]
mod tests;

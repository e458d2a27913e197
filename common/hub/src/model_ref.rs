//! What `--model` names: a folder on this machine or a repository on the hub, validated before any path or URL is built.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The longest owner or repository name that the hub accepts.
const MAX_NAME_CHARS: usize = 96;
const MAX_REVISION_CHARS: usize = 200;
const MAX_PATH_BYTES: usize = 4096;
/// Errors quote at most this much of what was given.
const MAX_QUOTED_CHARS: usize = 80;

/// A model: a folder that exists, or a repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ModelRef {
    Folder(PathBuf),
    Repo(RepoRef),
}

/// A model repository `owner/name` on the hub, optionally at a branch, tag or commit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RepoRef {
    owner: String,
    name: String,
    revision: Option<String>,
}

/// What a repository holds; it decides addresses and the place in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    /// The start of the folder's name in the cache.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// The repository as the hub's addresses have it.
    pub(crate) fn path(self, repo: &RepoRef) -> String {
        match self {
            Self::Model => repo.id(),
            Self::Dataset => format!("datasets/{}", repo.id()),
        }
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        })
    }
}

/// Why the argument of `--model` names no model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelRefError {
    #[error("the model name is empty: give a folder, or a hub repository as owner/name")]
    Empty,
    #[error("`{given}` holds a control character: give a folder, or a hub repository as owner/name")]
    ControlCharacter { given: String },
    #[error("the model name is {bytes} bytes long, at most {MAX_PATH_BYTES} are allowed: `{given}`")]
    TooLong { given: String, bytes: usize },
    #[error("there is no folder `{given}`: check the path, or give a hub repository as owner/name")]
    NoSuchFolder { given: String },
    #[error("`{given}` is a file: give the folder that holds config.json and the .safetensors files")]
    NotAFolder { given: String },
    #[error("`{given}` is a URL: give only its owner/name part")]
    Url { given: String },
    #[error("`{given}` is neither a folder here nor a hub repository (owner/name, optionally @revision): {reason}")]
    NotARepo { given: String, reason: &'static str },
}

impl ModelRef {
    /// Reads what a person typed after `--model`. A folder that exists wins over a repository of the same name.
    ///
    /// Looks at the disk, never at the network.
    pub fn parse(argument: &str) -> Result<Self, ModelRefError> {
        check_text(argument)?;
        let path = Path::new(argument);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_path_buf()));
        }
        if path.is_file() {
            return Err(ModelRefError::NotAFolder { given: quoted(argument) });
        }
        if argument.contains("://") {
            return Err(ModelRefError::Url { given: quoted(argument) });
        }
        if looks_like_a_path(argument) {
            return Err(ModelRefError::NoSuchFolder { given: quoted(argument) });
        }
        argument.parse().map(Self::Repo)
    }

    /// A name for people and for `/v1/models`: the repository without its revision, or the folder's own name.
    pub fn display_name(&self) -> String {
        match self {
            Self::Repo(repo) => repo.id(),
            Self::Folder(folder) => {
                let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.clone());
                absolute.file_name().map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned())
            }
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => folder.display().fmt(f),
            Self::Repo(repo) => repo.fmt(f),
        }
    }
}

impl RepoRef {
    /// `owner/name`, without the revision.
    pub fn id(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    pub fn owner(&self) -> &str {
        &self.owner
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The branch, tag or commit; `main` when none was given.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// The revision, when it is a full commit hash: then nothing on the hub can change under it.
    pub fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }

    /// The same repository at exactly this commit.
    pub(crate) fn at_commit(&self, commit: &str) -> Self {
        Self { revision: Some(commit.to_owned()), ..self.clone() }
    }
}

impl fmt::Display for RepoRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

impl FromStr for RepoRef {
    type Err = ModelRefError;

    /// Reads `owner/name` or `owner/name@revision`; does not look at the disk.
    fn from_str(text: &str) -> Result<Self, ModelRefError> {
        check_text(text)?;
        let refused = |reason| ModelRefError::NotARepo { given: quoted(text), reason };
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = id.split_once('/').ok_or_else(|| refused("the owner is missing"))?;
        check_name(owner).map_err(refused)?;
        check_name(name).map_err(refused)?;
        revision.map_or(Ok(()), check_revision).map_err(refused)?;
        Ok(Self { owner: owner.to_owned(), name: name.to_owned(), revision: revision.map(str::to_owned) })
    }
}

/// Whether this is a full git commit hash, the only kind of revision that never moves.
pub(crate) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn check_text(text: &str) -> Result<(), ModelRefError> {
    if text.trim().is_empty() {
        return Err(ModelRefError::Empty);
    }
    if text.len() > MAX_PATH_BYTES {
        return Err(ModelRefError::TooLong { given: quoted(text), bytes: text.len() });
    }
    if text.chars().any(char::is_control) {
        return Err(ModelRefError::ControlCharacter { given: quoted(text) });
    }
    Ok(())
}

fn looks_like_a_path(text: &str) -> bool {
    text.starts_with(['/', '.', '~'])
        || text.ends_with('/')
        || text.contains('\\')
        || text.split('@').next().is_some_and(|id| id.matches('/').count() > 1)
}

fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("the owner or the name is empty");
    }
    if name.len() > MAX_NAME_CHARS {
        return Err("owner and name have at most 96 characters each");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err("owner and name consist of letters, digits, `-`, `_` and `.`");
    }
    if name.starts_with(['.', '-']) || name.ends_with(['.', '-']) || name.contains("..") || name.contains("--") {
        return Err("owner and name neither start nor end with `.` or `-`, nor hold `..` or `--`");
    }
    Ok(())
}

/// What git allows in a reference name, minus what is not printable ASCII: it becomes part of a path in the cache.
fn check_revision(revision: &str) -> Result<(), &'static str> {
    if revision.is_empty() {
        return Err("the revision after `@` is empty");
    }
    if revision.len() > MAX_REVISION_CHARS {
        return Err("a revision has at most 200 characters");
    }
    if !revision.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\~^:?*[@".contains(&byte)) {
        return Err("a revision is a branch, a tag or a commit hash");
    }
    if revision.split('/').any(|part| part.is_empty() || part.starts_with('.') || part.contains("..")) {
        return Err("a revision is a branch, a tag or a commit hash");
    }
    Ok(())
}

fn quoted(text: &str) -> String {
    let mut quoted: String = text.chars().take(MAX_QUOTED_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().count() > MAX_QUOTED_CHARS {
        quoted.push('…');
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_parsed() {
        let repo: RepoRef = "mlx-community/Qwen3-30B-A3B-4bit".parse().unwrap();
        assert_eq!((repo.owner(), repo.name(), repo.revision()), ("mlx-community", "Qwen3-30B-A3B-4bit", "main"));
        assert_eq!(repo.commit(), None);
        for text in ["a/b@refs/pr/1", "a/b@v1.0", "a_b/c.d@0123456789abcdef0123456789abcdef01234567"] {
            assert_eq!(text.parse::<RepoRef>().unwrap().to_string(), text);
        }
        let pinned: RepoRef = "a/b@0123456789abcdef0123456789abcdef01234567".parse().unwrap();
        assert_eq!(pinned.commit(), Some("0123456789abcdef0123456789abcdef01234567"));
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused() {
        let long = "n".repeat(300);
        for text in [
            "", " ", "a", "a/", "/a", "../b", "a/..", "a/b/c", "a/b@", "a/b@../c", "a/b@/etc", "a/b@x//y", "a/.b", "a/b-", "a--b/c",
            "a/b c", "a/b\0c", "ä/b", "a/b@.git", "a\\b/c", "a/b@x y",
        ] {
            assert!(text.parse::<RepoRef>().is_err(), "{text:?}");
        }
        assert!(format!("a/{long}").parse::<RepoRef>().is_err());
        assert!(format!("a/b@{long}").parse::<RepoRef>().is_err());
    }

    #[test]
    fn an_argument_is_a_folder_when_it_exists() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(ModelRef::parse(path), Ok(ModelRef::Folder(folder.path().to_path_buf())));
        let file = folder.path().join("model.gguf");
        std::fs::write(&file, b"x").unwrap();
        assert!(matches!(ModelRef::parse(file.to_str().unwrap()), Err(ModelRefError::NotAFolder { .. })));
    }

    #[test]
    fn a_path_that_does_not_exist_says_so() {
        for text in ["/no/such/model", "./model", "../../x", "~/model", "models/a/b", "model/", ".."] {
            let result = ModelRef::parse(text);
            let existed = Path::new(text).is_dir();
            assert!(existed || matches!(result, Err(ModelRefError::NoSuchFolder { .. })), "{text}: {result:?}");
        }
        assert!(matches!(ModelRef::parse("https://huggingface.co/a/b"), Err(ModelRefError::Url { .. })));
        assert!(matches!(ModelRef::parse("a\0b"), Err(ModelRefError::ControlCharacter { .. })));
        assert!(matches!(ModelRef::parse(&"x".repeat(5000)), Err(ModelRefError::TooLong { bytes: 5000, .. })));
    }

    #[test]
    fn messages_are_short_and_printable() {
        let message = ModelRef::parse(&format!("a/{}", "\u{1b}x".repeat(200))).unwrap_err().to_string();
        assert!(message.len() < 700 && !message.contains('\u{1b}'), "{message}");
    }

    #[test]
    fn the_display_name_has_no_path_and_no_revision() {
        assert_eq!(ModelRef::parse("a/b@v1").unwrap().display_name(), "a/b");
        assert_eq!(ModelRef::Folder(PathBuf::from("/models/demo")).display_name(), "demo");
    }
}

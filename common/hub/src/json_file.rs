//! Reads the JSON files of a model, and says which file is wrong, where, and what it is instead.

use serde::de::DeserializeOwned;
use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

/// Larger than the index of any published model, small enough to hold in memory.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Why a JSON file of a model could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JsonFileError {
    #[error("{path} is missing: give a folder or repository that holds a model in Hugging Face's layout")]
    Missing { path: PathBuf },
    #[error("{path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} has {bytes} bytes, at most {MAX_JSON_BYTES} are read")]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{path} looks like a web page, not JSON: download it again")]
    WebPage { path: PathBuf },
    #[error("{path} is empty: download it again")]
    Empty { path: PathBuf },
    #[error("{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it again")]
    LfsPointer { path: PathBuf },
    #[error("{path}:{line}:{column} is not what it should be: {problem}")]
    Malformed { path: PathBuf, line: usize, column: usize, problem: String },
}

/// Reads one JSON file into any deserialisable type.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, JsonFileError> {
    let text = read_bounded(path)?;
    serde_json::from_slice(&text).map_err(|error| explain(path, &text, &error))
}

/// Reads a `config.json`, also one with numbers that JSON does not have.
pub fn read_config(path: &Path) -> Result<serde_json::Value, JsonFileError> {
    let text = read_bounded(path)?;
    mlx_cluster_common::config::parse_json(&text).map_err(|error| explain(path, &text, &error))
}

/// As [`read_json`], with None for a file that is not there.
pub fn read_json_if_present<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, JsonFileError> {
    match read_json(path) {
        Ok(value) => Ok(Some(value)),
        Err(JsonFileError::Missing { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, JsonFileError> {
    let unreadable = |source: std::io::Error| match source.kind() {
        ErrorKind::NotFound => JsonFileError::Missing { path: path.to_path_buf() },
        _ => JsonFileError::Unreadable { path: path.to_path_buf(), source },
    };
    let file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    if bytes > MAX_JSON_BYTES {
        return Err(JsonFileError::TooLarge { path: path.to_path_buf(), bytes });
    }
    let mut text = Vec::with_capacity(bytes as usize);
    file.take(MAX_JSON_BYTES).read_to_end(&mut text).map_err(unreadable)?;
    Ok(text)
}

fn explain(path: &Path, text: &[u8], error: &serde_json::Error) -> JsonFileError {
    let path = path.to_path_buf();
    let start = text.trim_ascii_start();
    if start.is_empty() {
        return JsonFileError::Empty { path };
    }
    if looks_like_a_web_page(start) {
        return JsonFileError::WebPage { path };
    }
    if is_lfs_pointer(start) {
        return JsonFileError::LfsPointer { path };
    }
    // serde_json repeats the position at the end of its text; here it stands beside the file name.
    let problem = error.to_string();
    let problem = problem.split(" at line ").next().unwrap_or_default().to_owned();
    JsonFileError::Malformed { path, line: error.line(), column: error.column(), problem }
}

/// Error pages and log-in forms get saved under the name of the file that somebody wanted.
pub(crate) fn looks_like_a_web_page(text: &[u8]) -> bool {
    text.trim_ascii_start().starts_with(b"<")
}

/// What a clone without Git LFS leaves in place of a large file.
pub(crate) fn is_lfs_pointer(text: &[u8]) -> bool {
    text.starts_with(b"version https://git-lfs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_for(text: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        read_json::<serde_json::Map<String, serde_json::Value>>(&path).unwrap_err().to_string()
    }

    #[test]
    fn each_kind_of_wrong_file_is_named() {
        for (text, expected) in [
            (&b"{\"a\": 1,\n  nope}"[..], "config.json:2:3"),
            (b"[1, 2]", "invalid type: sequence, expected a map"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b" \n", "empty"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"\xff\xfe{", "config.json:1:"),
        ] {
            let message = error_for(text);
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_deeply_nested_file_is_an_error_not_a_crash() {
        assert!(error_for("[".repeat(100_000).as_bytes()).contains("config.json:1:"));
        assert!(error_for(format!("{{\"a\":{}", "[".repeat(100_000)).as_bytes()).contains("recursion"));
    }

    #[test]
    fn a_missing_file_is_an_error_or_nothing() {
        let path = Path::new("/nonexistent/config.json");
        assert!(matches!(read_json::<serde_json::Value>(path), Err(JsonFileError::Missing { .. })));
        assert!(read_json_if_present::<serde_json::Value>(path).unwrap().is_none());
    }
}

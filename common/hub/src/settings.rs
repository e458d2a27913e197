//! Where the hub and its cache are, read from the environment once, so that everything behind it is free of globals.

use crate::{cache::RepoCache, model_ref::RepoRef};
use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// A secret that authorises requests to the hub; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// None when, without surrounding white space, nothing is left that an HTTP header could carry.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        let sendable = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        sendable.then(|| Self(text.to_owned()))
    }

    pub(crate) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// How to reach the hub, and how long to be patient with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Without a trailing slash.
    pub endpoint: String,
    /// The folder that holds `models--owner--name`; shared with Python's huggingface_hub.
    pub cache_dir: PathBuf,
    pub token: Option<Token>,
    /// Use only what is cached; never touch the network.
    pub offline: bool,
    /// Attempts in a row that may fail without one new byte.
    pub retries: u32,
    /// Doubled after each such failure.
    pub retry_delay: Duration,
    /// A request or a transfer that is silent for so long has failed.
    pub stall_timeout: Duration,
    /// Where descriptions of models are kept; None keeps none.
    pub descriptions: Option<PathBuf>,
    /// How long to wait for another process that holds the lock of a file and makes no progress with it.
    pub lock_timeout: Duration,
}

impl HubSettings {
    /// Settings for a given endpoint and cache, with nothing taken from the environment.
    pub fn new(endpoint: &str, cache_dir: &Path) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache_dir: cache_dir.to_path_buf(),
            token: None,
            offline: false,
            retries: 5,
            retry_delay: Duration::from_millis(500),
            stall_timeout: Duration::from_secs(30),
            descriptions: None,
            lock_timeout: Duration::from_secs(600),
        }
    }

    /// Honours HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, XDG_CACHE_HOME, HF_TOKEN, HUGGING_FACE_HUB_TOKEN,
    /// HF_TOKEN_PATH, HF_HUB_DISABLE_IMPLICIT_TOKEN, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, as Python's huggingface_hub does.
    pub fn from_env() -> Self {
        Self::from_lookup(&|name| std::env::var(name).ok())
    }

    /// With descriptions of models kept in the data folder `home`.
    pub fn with_home(self, home: &Path) -> Self {
        Self { descriptions: Some(home.join("descriptions")), ..self }
    }

    /// Where the shared cache has the files of this commit, if it has any.
    pub fn cached_folder(&self, repo: &RepoRef) -> PathBuf {
        RepoCache::new(&self.cache_dir, repo).snapshot(repo.revision())
    }

    /// As [`from_env`](Self::from_env), with `lookup` in place of the process environment. Reads the token file.
    pub fn from_lookup(lookup: &dyn Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let folder = |name: &str| get(name).map(|value| expand_home(&value, get("HOME")));
        let home = folder("HF_HOME")
            .unwrap_or_else(|| folder("XDG_CACHE_HOME").unwrap_or_else(|| expand_home("~/.cache", get("HOME"))).join("huggingface"));
        let cache_dir = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub"));
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let truthy = |name: &str| get(name).is_some_and(|value| is_true(&value));
        let token = if truthy("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            None
        } else {
            let file = folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            get("HF_TOKEN")
                .or_else(|| get("HUGGING_FACE_HUB_TOKEN"))
                .or_else(|| std::fs::read_to_string(file).ok())
                .and_then(|text| Token::new(&text))
        };
        Self { token, offline: truthy("HF_HUB_OFFLINE") || truthy("TRANSFORMERS_OFFLINE"), ..Self::new(&endpoint, &cache_dir) }
    }
}

/// The words that huggingface_hub takes for "yes".
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_ascii_uppercase().as_str())
}

fn expand_home(path: &str, home: Option<String>) -> PathBuf {
    match (path.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        (Some(rest), None) => std::env::temp_dir().join(rest),
        (None, _) => PathBuf::from(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> HubSettings {
        HubSettings::from_lookup(&|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (pairs, cache) in [
            (vec![("HOME", "/h")], "/h/.cache/huggingface/hub"),
            (vec![("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (vec![("HOME", "/h"), ("HF_HOME", "~/models")], "/h/models/hub"),
            (vec![("HF_HOME", "/m"), ("HF_HUB_CACHE", "/c")], "/c"),
            (vec![("HF_HOME", "/m"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (vec![("HF_HOME", "/m"), ("HF_HUB_CACHE", "")], "/m/hub"),
        ] {
            assert_eq!(settings(&pairs).cache_dir, Path::new(cache), "{pairs:?}");
        }
    }

    #[test]
    fn endpoint_and_offline_are_read() {
        let defaults = settings(&[("HF_HOME", "/m")]);
        assert_eq!((defaults.endpoint.as_str(), defaults.offline), (DEFAULT_ENDPOINT, false));
        let set = settings(&[("HF_ENDPOINT", "http://mirror/"), ("HF_HUB_OFFLINE", "yes")]);
        assert_eq!((set.endpoint.as_str(), set.offline), ("http://mirror", true));
        assert!(!settings(&[("HF_HUB_OFFLINE", "0")]).offline);
    }

    #[test]
    fn the_token_comes_from_the_environment_or_a_file() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from-file\n").unwrap();
        let home = home.path().to_str().unwrap();
        assert_eq!(settings(&[("HF_HOME", home)]).token, Token::new("from-file"));
        assert_eq!(settings(&[("HF_HOME", home), ("HF_TOKEN", " from-env ")]).token, Token::new("from-env"));
        assert_eq!(settings(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token, None);
        assert_eq!(Token::new("a\nb"), None);
    }

    #[test]
    fn a_token_is_never_printed() {
        let printed = format!("{:?}", settings(&[("HF_TOKEN", "hf_secret"), ("HF_HOME", "/m")]));
        assert!(!printed.contains("hf_secret"));
    }
}

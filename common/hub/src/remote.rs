//! Requests to the hub: commits, listings and small files through the hf-hub client; weight bytes through plain HTTP.
//!
//! hf-hub neither resumes nor verifies what it stores, gives up on a file that another process is fetching after 10 s, and takes
//! xet for every large file; so it only fetches what is small enough to lie in git itself.

use crate::{
    cache::RepoCache,
    error::HubError,
    index::is_plain_file_name,
    model_ref::{RepoKind, RepoRef, is_commit},
    settings::HubSettings,
};
use futures_util::TryStreamExt;
use hf_hub::{
    HFClient, HFError, RepoTypeAny,
    repository::{HFRepository, RepoTreeEntry},
};
use reqwest::{
    Client, Method, Request, Response, StatusCode, Url,
    header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER},
    redirect::Policy,
};
use std::{pin::pin, time::Duration};

const USER_AGENT: &str = concat!("mlx-cluster/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Some of hf-hub's requests have no timeout of their own; nothing small takes longer than this.
const SMALL_DEADLINE: Duration = Duration::from_secs(300);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(60);
const MAX_RELATIVE_REDIRECTS: usize = 5;
/// Folders with more files than this are not models.
const MAX_LISTED_FILES: usize = 10_000;

/// One repository on the hub, with the clients that talk about it.
#[derive(Debug)]
pub(crate) struct Remote {
    pub(crate) settings: HubSettings,
    kind: RepoKind,
    pub(crate) repo: RepoRef,
    pub(crate) cache: RepoCache,
    hf: HFClient,
    following: Client,
    not_following: Client,
}

/// A file in the top folder of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// Stored outside git, so that its ETag is its SHA-256.
    pub(crate) large: bool,
}

/// What the hub says about a file before any of it is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileFacts {
    pub(crate) etag: String,
    pub(crate) bytes: u64,
}

impl FileFacts {
    /// The SHA-256 of the content, when the ETag is one.
    pub(crate) fn sha256(&self) -> Option<&str> {
        (self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(&self.etag)
    }
}

impl Remote {
    pub(crate) fn new(repo: &RepoRef, settings: &HubSettings) -> Result<Self, HubError> {
        Self::of_kind(RepoKind::Model, repo, settings)
    }

    pub(crate) fn of_kind(kind: RepoKind, repo: &RepoRef, settings: &HubSettings) -> Result<Self, HubError> {
        let bad_endpoint = |cause: String| HubError::BadEndpoint { endpoint: settings.endpoint.clone(), cause };
        let client = |policy| {
            let builder = Client::builder().user_agent(USER_AGENT).connect_timeout(CONNECT_TIMEOUT).read_timeout(settings.stall_timeout);
            builder.redirect(policy).build().map_err(|error| bad_endpoint(innermost(&error)))
        };
        let following = client(Policy::default())?;
        let mut hf = HFClient::builder()
            .endpoint(&settings.endpoint)
            .cache_dir(&settings.cache_dir)
            .user_agent(USER_AGENT)
            .client(following.clone())
            .retry_max_attempts(settings.retries as usize)
            // It doubles the delay before the first retry.
            .retry_base_delay(settings.retry_delay / 2);
        if let Some(token) = &settings.token {
            hf = hf.token(token.secret());
        }
        Ok(Self {
            settings: settings.clone(),
            kind,
            repo: repo.clone(),
            cache: RepoCache::of_kind(kind, &settings.cache_dir, repo),
            hf: hf.build().map_err(|error| bad_endpoint(error.to_string()))?,
            following,
            not_following: client(Policy::none())?,
        })
    }

    fn repository(&self) -> HFRepository<RepoTypeAny> {
        let kind = match self.kind {
            RepoKind::Model => RepoTypeAny::Model,
            RepoKind::Dataset => RepoTypeAny::Dataset,
        };
        self.hf.repository(kind, self.repo.owner(), self.repo.name())
    }

    /// The commit that the wanted revision has now.
    pub(crate) async fn resolve_commit(&self) -> Result<String, HubError> {
        let (owner, name, revision) = (self.repo.owner(), self.repo.name(), self.repo.revision());
        let what = "its description";
        let sha = match self.kind {
            RepoKind::Model => self.within_deadline(what, self.hf.model(owner, name).info().revision(revision).send()).await?.sha,
            RepoKind::Dataset => self.within_deadline(what, self.hf.dataset(owner, name).info().revision(revision).send()).await?.sha,
        };
        let sha = sha.unwrap_or_default();
        if is_commit(&sha) {
            return Ok(sha);
        }
        Err(HubError::NotAHub { endpoint: self.settings.endpoint.clone(), cause: "it names no commit".to_owned() })
    }

    /// The files in the top folder at this commit; names that are not plain are left out.
    pub(crate) async fn list(&self, commit: &str) -> Result<Vec<RemoteFile>, HubError> {
        let mut files = self.tree(commit, false).await?;
        files.retain(|file| is_plain_file_name(&file.name));
        Ok(files)
    }

    /// The files at this commit, with their paths as names; `deep` for those in folders too.
    pub(crate) async fn tree(&self, commit: &str, deep: bool) -> Result<Vec<RemoteFile>, HubError> {
        let repo = self.repository();
        let listing = async {
            let mut entries = pin!(repo.list_tree().revision(commit).recursive(deep).limit(MAX_LISTED_FILES).send()?);
            let mut files = Vec::new();
            while let Some(entry) = entries.try_next().await? {
                if let RepoTreeEntry::File { path, size, lfs, xet_hash, .. } = entry {
                    files.push(RemoteFile { name: path, bytes: size, large: lfs.is_some() || xet_hash.is_some() });
                }
            }
            Ok(files)
        };
        self.within_deadline("its list of files", listing).await
    }

    /// Fetches a file that lies in git itself, with hf-hub, into the cache.
    pub(crate) async fn fetch_small(&self, commit: &str, file: &RemoteFile) -> Result<(), HubError> {
        let repo = self.repository();
        let request = repo.download_file().filename(&file.name).revision(commit).send();
        let path = self.within_deadline(&file.name, request).await?;
        let got_bytes = std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
        if got_bytes == file.bytes {
            return Ok(());
        }
        // hf-hub stores whatever came, be it an error page.
        self.cache.forget(commit, &file.name);
        Err(HubError::WrongSize { file: file.name.clone(), got_bytes, expected_bytes: file.bytes })
    }

    /// Size and ETag of a file, from a HEAD request; redirects to storage are not followed, since the facts come before them.
    pub(crate) async fn facts(&self, commit: &str, file: &str) -> Result<FileFacts, HubError> {
        self.retrying(|| self.facts_once(commit, file)).await
    }

    async fn facts_once(&self, commit: &str, file: &str) -> Result<FileFacts, HubError> {
        let mut url = self.file_url(commit, file)?;
        for _ in 0..=MAX_RELATIVE_REDIRECTS {
            let request = self.request(Method::HEAD, url.clone());
            let response = self.not_following.execute(request).await.map_err(|error| self.transport_error(&error))?;
            // Renamed repositories and other spellings redirect within the hub, without any facts.
            if let Some(next) = relative_redirect(&url, &response) {
                url = next;
                continue;
            }
            if response.status().is_success() || response.status().is_redirection() {
                return facts_in(response.headers()).ok_or_else(|| HubError::NotAHub {
                    endpoint: self.settings.endpoint.clone(),
                    cause: format!("no usable ETag and size for {file}"),
                });
            }
            return Err(self.refusal(&response, file));
        }
        Err(HubError::NotAHub { endpoint: self.settings.endpoint.clone(), cause: "too many redirects".to_owned() })
    }

    /// Asks for a file, or for the bytes in the HTTP range `range` of it. Errors of the connection and refusals are told apart
    /// by [`HubError::is_transient`]; the status may be 200, 206 or 416.
    pub(crate) async fn get(&self, commit: &str, file: &str, range: Option<String>) -> Result<Response, HubError> {
        let mut request = self.request(Method::GET, self.file_url(commit, file)?);
        if let Some(value) = range.and_then(|range| HeaderValue::try_from(range).ok()) {
            request.headers_mut().insert(reqwest::header::RANGE, value);
        }
        let response = self.following.execute(request).await.map_err(|error| self.transport_error(&error))?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            _ => Err(self.refusal(&response, file)),
        }
    }

    /// Runs `attempt` until it succeeds, fails for good, or has failed too often.
    pub(crate) async fn retrying<T, F: Future<Output = Result<T, HubError>>>(&self, attempt: impl Fn() -> F) -> Result<T, HubError> {
        let mut failures = 0;
        loop {
            match attempt().await {
                Err(error) if error.is_transient() && failures < self.settings.retries => {
                    failures += 1;
                    tracing::debug!(%error, failures, "trying again");
                    tokio::time::sleep(self.delay(&error, failures)).await;
                }
                result => return result,
            }
        }
    }

    /// How long to wait after the `failures`-th failure in a row.
    pub(crate) fn delay(&self, error: &HubError, failures: u32) -> Duration {
        let doubled = self.settings.retry_delay.saturating_mul(1 << failures.saturating_sub(1).min(16));
        match error {
            HubError::RateLimited { retry_after: Some(asked), .. } => doubled.max(*asked).min(MAX_RETRY_DELAY),
            _ => doubled.min(MAX_RETRY_DELAY),
        }
    }

    pub(crate) fn transport_error(&self, error: &reqwest::Error) -> HubError {
        HubError::Unreachable { endpoint: self.settings.endpoint.clone(), cause: innermost(error) }
    }

    fn request(&self, method: Method, url: Url) -> Request {
        let mut request = Request::new(method, url);
        // Sizes and ranges count the bytes of the file itself.
        request.headers_mut().insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let bearer = self.settings.token.as_ref().and_then(|token| HeaderValue::try_from(format!("Bearer {}", token.secret())).ok());
        if let Some(mut bearer) = bearer {
            bearer.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, bearer);
        }
        request
    }

    fn file_url(&self, commit: &str, file: &str) -> Result<Url, HubError> {
        let bad = |cause: String| HubError::BadEndpoint { endpoint: self.settings.endpoint.clone(), cause };
        let mut url = Url::parse(&self.settings.endpoint).map_err(|error| bad(error.to_string()))?;
        url.path_segments_mut()
            .map_err(|()| bad("it is not an http address".to_owned()))?
            .pop_if_empty()
            .extend(self.kind.path(&self.repo).split('/').chain(["resolve", commit, file]));
        Ok(url)
    }

    async fn within_deadline<T>(&self, what: &str, request: impl Future<Output = Result<T, HFError>>) -> Result<T, HubError> {
        match tokio::time::timeout(SMALL_DEADLINE, request).await {
            Ok(result) => result.map_err(|error| self.explain(error, what)),
            Err(_) => Err(HubError::Unreachable {
                endpoint: self.settings.endpoint.clone(),
                cause: format!("no answer within {} s", SMALL_DEADLINE.as_secs()),
            }),
        }
    }

    fn refusal(&self, response: &Response, what: &str) -> HubError {
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let refusal = Refusal { status: response.status().as_u16(), code: header("x-error-code"), message: header("x-error-message") };
        let retry_after = header(RETRY_AFTER.as_str()).and_then(|value| value.trim().parse().ok()).map(Duration::from_secs);
        let elsewhere = !response.url().as_str().starts_with(&self.settings.endpoint);
        if elsewhere && refusal.status == 403 {
            // The signed address of the storage has run out; the hub gives a new one.
            return HubError::Unavailable { endpoint: self.settings.endpoint.clone(), status: 403, what: what.to_owned() };
        }
        self.name_refusal(&refusal, what, retry_after)
    }

    fn explain(&self, error: HFError, what: &str) -> HubError {
        let endpoint = self.settings.endpoint.clone();
        let (context, retry_after) = match error {
            HFError::Http { context } | HFError::AuthRequired { context } | HFError::Forbidden { context } => (context, None),
            HFError::RateLimited { context, retry_after } => (context, retry_after),
            HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => (context, None),
            HFError::EntryNotFound { path, .. } => {
                return HubError::FileNotInRepo { repo: self.repo.id(), file: path, holds: String::new() };
            }
            HFError::Request { source, .. } if source.is_decode() => {
                return HubError::NotAHub { endpoint, cause: innermost(&source) };
            }
            HFError::Request { source, .. } => return self.transport_error(&source),
            HFError::Io(source) => return HubError::Disk { action: "write", path: self.settings.cache_dir.clone(), source },
            HFError::CacheLockTimeout { path } => return HubError::Locked { lock: path, waited: Duration::from_secs(10) },
            other => return HubError::NotAHub { endpoint, cause: format!("{what}: {other}") },
        };
        let refusal =
            Refusal { status: context.status.as_u16(), code: context.error_code.as_deref(), message: context.server_message.as_deref() };
        self.name_refusal(&refusal, what, retry_after)
    }

    fn name_refusal(&self, refusal: &Refusal<'_>, what: &str, retry_after: Option<Duration>) -> HubError {
        let (endpoint, kind, repo) = (self.settings.endpoint.clone(), self.kind, self.kind.path(&self.repo));
        let has_token = self.settings.token.is_some();
        let message = refusal.message.unwrap_or_default();
        match (refusal.status, refusal.code.unwrap_or_default()) {
            (_, "GatedRepo") => HubError::Gated { endpoint, repo, has_token },
            (404, "EntryNotFound") => HubError::FileNotInRepo { repo, file: what.to_owned(), holds: String::new() },
            (404, "RevisionNotFound") => HubError::RevisionNotFound { endpoint, repo, revision: self.repo.revision().to_owned() },
            (401, _) if has_token && message.starts_with("Invalid") => HubError::BadToken { endpoint },
            // Without a token the hub does not tell what is private from what does not exist.
            (401 | 404, _) => HubError::RepoNotFound { endpoint, kind, repo: self.repo.id(), has_token },
            (429, _) => HubError::RateLimited { endpoint, retry_after },
            (status @ (408 | 500..), _) => HubError::Unavailable { endpoint, status, what: what.to_owned() },
            (status, _) => {
                let message = message.chars().filter(|c| !c.is_control()).take(200).collect();
                HubError::Refused { endpoint, what: format!("{what} of {repo}"), status, message }
            }
        }
    }
}

struct Refusal<'a> {
    status: u16,
    code: Option<&'a str>,
    message: Option<&'a str>,
}

fn relative_redirect(url: &Url, response: &Response) -> Option<Url> {
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    let is_relative = response.status().is_redirection() && location.starts_with('/') && !location.starts_with("//");
    if is_relative { url.join(location).ok() } else { None }
}

fn facts_in(headers: &HeaderMap) -> Option<FileFacts> {
    let first = |names: [&str; 2]| names.iter().find_map(|name| headers.get(*name)?.to_str().ok());
    let etag = first(["x-linked-etag", "etag"])?.trim_start_matches("W/").trim_matches('"').to_owned();
    // It becomes a file name in the cache.
    let safe = is_plain_file_name(&etag) && etag.len() <= 128 && etag.is_ascii();
    let bytes = first(["x-linked-size", "content-length"])?.parse().ok()?;
    safe.then_some(FileFacts { etag, bytes })
}

/// The cause at the bottom: `Connection refused` rather than `error sending request`.
pub(crate) fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

//! A hub on loopback for tests: the few routes that a model needs, in the shape of huggingface.co, with faults on request.
//!
//! Runs on a thread of its own, so that asynchronous tests, plain tests and tests of the binary (through HF_ENDPOINT) can use it.

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use futures_util::stream;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};
use tokio::{net::TcpListener, sync::oneshot};

/// Files above this size, and all weights, are served like files in LFS: by a redirect, with their SHA-256 as the ETag.
const LARGE_BYTES: usize = 16 << 10;

/// A running fake hub; it stops when dropped.
pub struct FakeHub {
    address: SocketAddr,
    shared: Arc<Shared>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Who may read a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    Public,
    /// Invisible without this token.
    Private(&'static str),
    /// Visible, but its files need this token.
    Gated(&'static str),
}

/// What goes wrong with the next request for the content of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An answer with this status in place of the content.
    Status(u16),
    /// The connection breaks after this many bytes.
    CutAfter(usize),
    /// The last bit of the file is flipped.
    FlipBit,
    /// The whole file, whatever range was asked for.
    IgnoreRange,
    /// Bytes that begin elsewhere, under a header that says so.
    OtherRange,
    /// A header that says another length of the whole file.
    OtherTotal,
}

/// Bytes of files that were served, file by file, in the order in which they were asked for.
pub type Served = BTreeMap<String, Vec<Range<usize>>>;

/// A request that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    /// With the file's name in place of the hash for requests to the storage behind a redirect.
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

struct Shared {
    /// Where large files are: another address than the hub's, as on the internet.
    storage: SocketAddr,
    state: Mutex<Hub>,
}

#[derive(Default)]
struct Hub {
    repos: BTreeMap<String, Repo>,
    faults: Vec<(String, Fault)>,
    seen: Vec<Seen>,
    served: Arc<Mutex<Served>>,
    /// Bodies come in pieces of so many bytes with so long a pause after each.
    pace: Option<(usize, Duration)>,
}

struct Repo {
    commit: String,
    access: Access,
    files: BTreeMap<String, Stored>,
}

#[derive(Clone)]
struct Stored {
    bytes: Arc<[u8]>,
    etag: String,
    large: bool,
}

impl FakeHub {
    /// Listens on a free port of loopback.
    pub fn start() -> io::Result<Self> {
        let (listener, address) = listen()?;
        let (storage_listener, storage_address) = listen()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = Arc::new(Shared { storage: storage_address, state: Mutex::default() });
        let router = Router::new()
            .route("/api/models/{owner}/{name}/revision/{revision}", get(describe))
            .route("/api/models/{owner}/{name}/tree/{revision}", get(list))
            .route("/{owner}/{name}/resolve/{revision}/{file}", get(resolve))
            .route("/api/datasets/{owner}/{name}/revision/{revision}", get(describe_dataset))
            .route("/api/datasets/{owner}/{name}/tree/{revision}", get(list_dataset))
            .route("/datasets/{owner}/{name}/resolve/{revision}/{file}", get(resolve_dataset))
            .with_state(shared.clone());
        let storage_router = Router::new()
            .route("/storage/{owner}/{name}/{file}", get(storage))
            .route("/storage/datasets/{owner}/{name}/{file}", get(storage_of_dataset))
            .with_state(shared.clone());
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("fake-hub".to_owned()).spawn(move || {
            runtime.block_on(async {
                let (Ok(listener), Ok(storage_listener)) = (TcpListener::from_std(listener), TcpListener::from_std(storage_listener))
                else {
                    return;
                };
                tokio::select! {
                    _ = axum::serve(listener, router) => {}
                    _ = axum::serve(storage_listener, storage_router) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { address, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// The value for HF_ENDPOINT.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds a repository, or replaces it with a new commit. That of a data set is `datasets/owner/name`.
    pub fn add<'a>(&self, repo: &str, access: Access, files: impl IntoIterator<Item = (&'a str, Vec<u8>)>) {
        let files: BTreeMap<String, Stored> = files.into_iter().map(|(name, bytes)| (name.to_owned(), Stored::new(name, bytes))).collect();
        let mut hash = Sha256::new();
        for (name, file) in &files {
            hash.update(name);
            hash.update(&file.etag);
        }
        let commit = hex(&hash.finalize())[..40].to_owned();
        self.shared.lock().repos.insert(repo.to_owned(), Repo { commit, access, files });
    }

    /// Adds a repository with all files of a folder.
    pub fn add_folder(&self, repo: &str, folder: &std::path::Path) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if let (true, Some(name)) = (path.is_file(), path.file_name().and_then(|name| name.to_str())) {
                files.push((name.to_owned(), std::fs::read(&path)?));
            }
        }
        self.add(repo, Access::Public, files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())));
        Ok(())
    }

    /// The commit that `main` of this repository is at.
    pub fn commit(&self, repo: &str) -> Option<String> {
        self.shared.lock().repos.get(repo).map(|repo| repo.commit.clone())
    }

    /// The next request for the content of `file` goes wrong like this; faults for one file happen in the order given.
    pub fn fail_next(&self, file: &str, fault: Fault) {
        self.shared.lock().faults.push((file.to_owned(), fault));
    }

    /// Whether a fault for this file is still to come.
    pub fn fault_pending(&self, file: &str) -> bool {
        self.shared.lock().faults.iter().any(|(name, _)| name == file)
    }

    /// Replaces the content of a file without a new commit, which no honest hub does.
    pub fn swap(&self, repo: &str, file: &str, bytes: Vec<u8>) {
        if let Some(repo) = self.shared.lock().repos.get_mut(repo) {
            repo.files.insert(file.to_owned(), Stored::new(file, bytes));
        }
    }

    /// From now on content comes in pieces of `bytes`, with a pause after each; None at once.
    pub fn set_pace(&self, pace: Option<(usize, Duration)>) {
        self.shared.lock().pace = pace;
    }

    /// What was served so far of the content of files, and starts counting anew.
    pub fn take_served(&self) -> Served {
        let hub = self.shared.lock();
        std::mem::take(&mut *hub.served.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All requests so far, and starts counting anew.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.lock().seen)
    }

    /// Stops answering: from now on connections are refused.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Reply = Response<Body>;

async fn describe(
    State(shared): State<Arc<Shared>>,
    Path((owner, name, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let mut hub = shared.lock();
    hub.note(&Method::GET, &format!("/api/{}/{name}/revision/{revision}", of_kind(&owner)), &headers);
    match hub.visible(&owner, &name, &revision, &headers) {
        Err(refusal) => refusal.into_response(),
        Ok(repo) => {
            let siblings: Vec<_> = repo.files.keys().map(|file| json!({"rfilename": file})).collect();
            axum::Json(json!({"id": format!("{owner}/{name}"), "sha": repo.commit, "siblings": siblings})).into_response()
        }
    }
}

async fn list(
    State(shared): State<Arc<Shared>>,
    Path((owner, name, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let mut hub = shared.lock();
    hub.note(&Method::GET, &format!("/api/{}/{name}/tree/{revision}", of_kind(&owner)), &headers);
    match hub.visible(&owner, &name, &revision, &headers) {
        Err(refusal) => refusal.into_response(),
        Ok(repo) => {
            let mut entries = vec![json!({"type": "directory", "oid": "0", "path": "assets"})];
            entries.extend(repo.files.iter().map(|(path, file)| {
                let mut entry = json!({"type": "file", "oid": file.etag, "size": file.bytes.len(), "path": path});
                if file.large {
                    entry["lfs"] = json!({"oid": file.etag, "size": file.bytes.len(), "pointerSize": 135});
                }
                entry
            }));
            axum::Json(entries).into_response()
        }
    }
}

async fn resolve(
    State(shared): State<Arc<Shared>>,
    method: Method,
    Path((owner, name, revision, file)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let mut hub = shared.lock();
    hub.note(&method, &format!("/{owner}/{name}/resolve/{revision}/{file}"), &headers);
    let repo = match hub.visible(&owner, &name, &revision, &headers) {
        Ok(repo) => repo,
        Err(refusal) => return refusal.into_response(),
    };
    if let Access::Gated(token) = repo.access
        && bearer(&headers).as_deref() != Some(token)
    {
        let code = if bearer(&headers).is_some() { 403 } else { 401 };
        return Refusal(code, "GatedRepo", "Access to this model is restricted.").into_response();
    }
    let commit = repo.commit.clone();
    let Some(Stored { bytes, etag, large }) = repo.files.get(&file).cloned() else {
        return with_headers(Refusal(404, "EntryNotFound", "Entry not found").into_response(), &[("x-repo-commit", commit)]);
    };
    let etag = format!("\"{etag}\"");
    if large {
        return with_headers(
            status(302),
            &[
                ("location", format!("http://{}/storage/{owner}/{name}/{file}", shared.storage)),
                ("x-repo-commit", commit),
                ("x-linked-etag", etag),
                ("x-linked-size", bytes.len().to_string()),
            ],
        );
    }
    let reply = if method == Method::HEAD {
        with_headers(status(200), &[("content-length", bytes.len().to_string())])
    } else {
        hub.content(&file, &bytes, &headers)
    };
    with_headers(reply, &[("x-repo-commit", commit), ("etag", etag)])
}

type Hubs = State<Arc<Shared>>;

async fn describe_dataset(shared: Hubs, Path((owner, name, revision)): Path<(String, String, String)>, headers: HeaderMap) -> Reply {
    describe(shared, Path((dataset_owner(&owner), name, revision)), headers).await
}

async fn list_dataset(shared: Hubs, Path((owner, name, revision)): Path<(String, String, String)>, headers: HeaderMap) -> Reply {
    list(shared, Path((dataset_owner(&owner), name, revision)), headers).await
}

async fn resolve_dataset(
    shared: Hubs,
    method: Method,
    Path((owner, name, revision, file)): Path<(String, String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    resolve(shared, method, Path((dataset_owner(&owner), name, revision, file)), headers).await
}

async fn storage_of_dataset(shared: Hubs, Path((owner, name, file)): Path<(String, String, String)>, headers: HeaderMap) -> Reply {
    storage(shared, Path((dataset_owner(&owner), name, file)), headers).await
}

/// Data sets are kept among the models, with an owner that no model can have.
fn dataset_owner(owner: &str) -> String {
    format!("datasets/{owner}")
}

/// An owner as the paths of the API have it, with the kind of the repository before it.
fn of_kind(owner: &str) -> String {
    if owner.starts_with("datasets/") { owner.to_owned() } else { format!("models/{owner}") }
}

async fn storage(
    State(shared): State<Arc<Shared>>,
    Path((owner, name, file)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Reply {
    let mut hub = shared.lock();
    hub.note(&Method::GET, &format!("/storage/{owner}/{name}/{file}"), &headers);
    let bytes = hub.repos.get(&format!("{owner}/{name}")).and_then(|repo| repo.files.get(&file)).cloned();
    bytes.map_or_else(|| status(404), |stored| hub.content(&file, &stored.bytes, &headers))
}

impl Stored {
    fn new(name: &str, bytes: Vec<u8>) -> Self {
        let large = bytes.len() > LARGE_BYTES || name.ends_with(".safetensors");
        let hash = hex(&Sha256::digest(&bytes));
        // Of what lies in git, the ETag is a hash that git makes; any will do here.
        let etag = if large { hash } else { hash[..40].to_owned() };
        Self { bytes: bytes.into(), etag, large }
    }
}

impl Hub {
    fn note(&mut self, method: &Method, path: &str, headers: &HeaderMap) {
        let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        self.seen.push(Seen { method: method.to_string(), path: path.to_owned(), range, token: bearer(headers) });
    }

    fn visible(&self, owner: &str, name: &str, revision: &str, headers: &HeaderMap) -> Result<&Repo, Refusal> {
        let token = bearer(headers);
        let repo = self.repos.get(&format!("{owner}/{name}")).filter(|repo| match repo.access {
            Access::Private(wanted) => token.as_deref() == Some(wanted),
            Access::Public | Access::Gated(_) => true,
        });
        match (repo, token) {
            (Some(repo), _) if revision == "main" || revision == repo.commit => Ok(repo),
            (Some(_), _) => Err(Refusal(404, "RevisionNotFound", "Invalid rev id")),
            (None, Some(token)) if token.starts_with("bad") => Err(Refusal(401, "", "Invalid user token.")),
            (None, Some(_)) => Err(Refusal(404, "RepoNotFound", "Repository not found")),
            (None, None) => Err(Refusal(401, "RepoNotFound", "Invalid username or password.")),
        }
    }

    fn content(&mut self, file: &str, bytes: &[u8], headers: &HeaderMap) -> Reply {
        let fault = self.faults.iter().position(|(name, _)| name == file).map(|index| self.faults.remove(index).1);
        let mut bytes = bytes.to_vec();
        match fault {
            Some(Fault::Status(code)) => return with_body(code, "<html>the fake hub was told to fail</html>".into()),
            Some(Fault::FlipBit) => bytes.iter_mut().last().into_iter().for_each(|byte| *byte ^= 1),
            Some(Fault::CutAfter(_) | Fault::IgnoreRange | Fault::OtherRange | Fault::OtherTotal) | None => {}
        }
        let total = bytes.len();
        let served;
        let range = headers.get(header::RANGE).filter(|_| fault != Some(Fault::IgnoreRange)).and_then(|value| parse_range(value, total));
        let reply = match range {
            None => {
                served = 0..total;
                with_headers(status(200), &[("content-length", total.to_string())])
            }
            Some(Err(())) => return with_headers(status(416), &[("content-range", format!("bytes */{total}"))]),
            Some(Ok((start, end))) => {
                let (start, end) = if fault == Some(Fault::OtherRange) { (start + 1, total.min(end + 1)) } else { (start, end) };
                bytes = bytes[start..end].to_vec();
                served = start..end;
                let total = if fault == Some(Fault::OtherTotal) { total + 1 } else { total };
                let range = format!("bytes {start}-{}/{total}", end - 1);
                with_headers(status(206), &[("content-length", bytes.len().to_string()), ("content-range", range)])
            }
        };
        let cut = match fault {
            Some(Fault::CutAfter(count)) => Some(count),
            _ => None,
        };
        let tally = Tally { file: file.to_owned(), served: self.served.clone() };
        let pace = self.pace;
        reply.map(|_| match (cut, pace) {
            (None, Some((count, pause))) => paced(bytes, served.start, count, pause, tally),
            _ => {
                let end = cut.map_or(served.end, |count| served.end.min(served.start + count));
                tally.note(served.start..end);
                body(bytes, cut)
            }
        })
    }
}

/// Counts what is served of one file.
struct Tally {
    file: String,
    served: Arc<Mutex<Served>>,
}

impl Tally {
    fn note(&self, range: Range<usize>) {
        let mut served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.entry(self.file.clone()).or_default().push(range);
    }
}

fn paced(bytes: Vec<u8>, first: usize, count: usize, pause: Duration, tally: Tally) -> Body {
    Body::from_stream(stream::unfold((bytes, 0, tally), move |(bytes, at, tally)| async move {
        if at >= bytes.len() {
            return None;
        }
        tokio::time::sleep(pause).await;
        let end = bytes.len().min(at + count);
        let piece = bytes[at..end].to_vec();
        tally.note(first + at..first + end);
        Some((Ok::<_, io::Error>(piece), (bytes, end, tally)))
    }))
}

fn body(mut bytes: Vec<u8>, cut: Option<usize>) -> Body {
    let Some(count) = cut else { return Body::from(bytes) };
    bytes.truncate(count);
    // The pause between the bytes and the error makes the server send the bytes before it breaks the connection.
    Body::from_stream(stream::unfold(Some(bytes), |state| async {
        match state {
            Some(bytes) if !bytes.is_empty() => Some((Ok(bytes), Some(Vec::new()))),
            Some(_) => {
                tokio::task::yield_now().await;
                Some((Err(io::Error::other("cut")), None))
            }
            None => None,
        }
    }))
}

/// Start and end (exclusive) of a `bytes=a-b` header; an error when nothing of the file lies in it.
fn parse_range(value: &HeaderValue, total: usize) -> Option<Result<(usize, usize), ()>> {
    let (start, end) = value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let start: usize = start.parse().ok()?;
    let end = end.parse::<usize>().map_or(total, |last| total.min(last + 1));
    Some(if start < end { Ok((start, end)) } else { Err(()) })
}

fn listen() -> io::Result<(std::net::TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    Some(headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")?.to_owned())
}

/// Status, `X-Error-Code` and `X-Error-Message`, as the real hub sends them.
struct Refusal(u16, &'static str, &'static str);

impl IntoResponse for Refusal {
    fn into_response(self) -> Reply {
        let Self(code, error_code, message) = self;
        let reply = with_body(code, json!({"error": message}).to_string());
        with_headers(reply, &[("x-error-code", error_code.to_owned()), ("x-error-message", message.to_owned())])
    }
}

fn status(code: u16) -> Reply {
    with_body(code, String::new())
}

fn with_body(code: u16, text: String) -> Reply {
    (StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), text).into_response()
}

fn with_headers(mut reply: Reply, headers: &[(&'static str, String)]) -> Reply {
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(value) {
            reply.headers_mut().insert(HeaderName::from_static(name), value);
        }
    }
    reply
}

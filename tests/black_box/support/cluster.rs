//! A coordinator and its workers as processes, under a random cluster name, each with a data folder of its own.

use super::{
    http::{self, Answer, Stream},
    process::{PATIENCE, Process, kill, send_signal, wait_until},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tempfile::TempDir;
use uuid::Uuid;

/// Loading a tiny model on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// What users are promised.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// How to start a cluster.
pub(crate) struct Setup {
    /// A folder or a repository; None starts an idle coordinator.
    pub(crate) model: Option<OsString>,
    pub(crate) n_workers: usize,
    pub(crate) coordinator_args: Vec<String>,
    pub(crate) worker_args: Vec<String>,
    pub(crate) environment: Vec<(String, OsString)>,
    homes: Homes,
}

/// Where workers keep who they are and what they fetched.
enum Homes {
    /// In one folder with the workers of all tests, so that this machine is measured once. Which of its identities, and so which weight
    /// store, a worker gets depends on what runs beside it.
    OfAllTests,
    /// Each in a folder of its own.
    Own,
    /// In one folder that the test keeps for clusters that follow each other.
    Kept(PathBuf),
}

impl Setup {
    pub(crate) fn new(model: impl AsRef<Path>, n_workers: usize) -> Self {
        let model = Some(model.as_ref().into());
        Self { model, n_workers, coordinator_args: Vec::new(), worker_args: Vec::new(), environment: Vec::new(), homes: Homes::OfAllTests }
    }

    /// Its coordinator starts without a model.
    pub(crate) fn without_model(n_workers: usize) -> Self {
        Self { model: None, ..Self::new("", n_workers) }
    }

    pub(crate) fn coordinator_args(mut self, args: &[&str]) -> Self {
        self.coordinator_args = args.iter().map(|arg| (*arg).to_owned()).collect();
        self
    }

    pub(crate) fn worker_args(mut self, args: &[&str]) -> Self {
        self.worker_args = args.iter().map(|arg| (*arg).to_owned()).collect();
        self
    }

    /// Each worker has a data folder and a cache of its own, as on machines of their own.
    pub(crate) fn own_homes(mut self) -> Self {
        self.homes = Homes::Own;
        self
    }

    /// All processes have this data folder, which no other test's have.
    pub(crate) fn home(mut self, home: &Path) -> Self {
        self.homes = Homes::Kept(home.to_owned());
        self.environment("MLX_CLUSTER_HOME", home)
    }

    pub(crate) fn environment(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Starts nothing yet.
    pub(crate) fn idle(self) -> Cluster {
        Cluster {
            name: format!("test-{}", Uuid::new_v4().simple()),
            http_port: free_port(),
            home: tempfile::tempdir().unwrap(),
            processes: BTreeMap::new(),
            setup: self,
        }
    }

    /// Starts the processes without waiting for anything.
    pub(crate) fn start(self) -> Cluster {
        let mut cluster = self.idle();
        for i in 0..cluster.setup.n_workers {
            cluster.start_worker(&format!("worker{i}"));
        }
        cluster.start_coordinator("coordinator");
        cluster
    }
}

pub(crate) struct Cluster {
    pub(crate) name: String,
    pub(crate) http_port: u16,
    home: TempDir,
    processes: BTreeMap<String, Process>,
    setup: Setup,
}

impl Cluster {
    /// A cluster that serves the model.
    pub(crate) fn serving(model: impl AsRef<Path>, n_workers: usize) -> Self {
        let mut cluster = Setup::new(model, n_workers).start();
        cluster.wait_until_ready();
        cluster
    }

    pub(crate) fn start_worker(&mut self, name: &str) {
        let mut command = self.command(name, &["worker", "--cluster", &self.name, "--name", name, "--listen", "127.0.0.1:0"]);
        let of_all_tests = Path::new(env!("CARGO_TARGET_TMPDIR")).join("workers");
        let home = match &self.setup.homes {
            Homes::OfAllTests => of_all_tests.clone(),
            Homes::Own => self.home.path().join(name),
            Homes::Kept(home) => home.clone(),
        };
        if home != of_all_tests {
            std::fs::create_dir_all(&home).unwrap();
            // Where nothing was measured yet, the worker measures.
            drop(std::fs::copy(of_all_tests.join("measurement.json"), home.join("measurement.json")));
        }
        command.env("MLX_CLUSTER_HOME", home).args(&self.setup.worker_args);
        self.processes.insert(name.to_owned(), Process::start(name, &mut command));
    }

    pub(crate) fn start_coordinator(&mut self, name: &str) {
        let http = format!("127.0.0.1:{}", self.http_port);
        let n_workers = self.setup.n_workers.max(1).to_string();
        let mut command = self.command(name, &["coordinator", "--cluster", &self.name, "--http", &http, "--min-workers", &n_workers]);
        if let Some(model) = &self.setup.model {
            command.arg("--model").arg(model);
        }
        if self.setup.n_workers > 1 && !self.setup.coordinator_args.iter().any(|arg| arg == "--strategy") {
            command.args(["--strategy", "pipeline"]);
        }
        command.args(&self.setup.coordinator_args);
        self.processes.insert(name.to_owned(), Process::start(name, &mut command));
    }

    /// The binary with a data folder for `name`; nothing of the user's own settings reaches it.
    pub(crate) fn command(&self, name: &str, args: &[&str]) -> Command {
        let mut command = command(&self.home.path().join(name));
        command.args(args).envs(self.setup.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The data folder of the coordinator.
    pub(crate) fn coordinator_home(&self) -> PathBuf {
        self.home.path().join("coordinator")
    }

    /// Runs the binary to its end beside the cluster.
    pub(crate) fn run(&self, args: &[&str]) -> Finished {
        finish(&mut self.command("tool", args))
    }

    /// The coordinator ends with this exit status and one sentence that holds all these words.
    pub(crate) fn coordinator_refuses(&mut self, status: i32, words: &[&str]) {
        let coordinator = self.process_mut("coordinator");
        let ended = coordinator.wait(PATIENCE).code();
        Finished { status: ended, stdout: String::new(), stderr: coordinator.output() }.expect_refusal(status, words);
    }

    pub(crate) fn process(&self, name: &str) -> &Process {
        &self.processes[name]
    }

    pub(crate) fn process_mut(&mut self, name: &str) -> &mut Process {
        self.processes.get_mut(name).unwrap()
    }

    /// The process ids of the engines of all workers.
    pub(crate) fn engines(&self) -> Vec<u32> {
        self.processes.iter().filter(|(name, _)| name.starts_with("worker")).flat_map(|(_, worker)| worker.children()).collect()
    }

    pub(crate) fn kill_engine_of(&self, worker: &str) {
        self.signal_engine_of(worker, Signal::KILL);
    }

    pub(crate) fn signal_engine_of(&self, worker: &str, signal: Signal) {
        let engines = self.process(worker).children();
        assert_eq!(engines.len(), 1, "engines of {worker}\n{}", self.output());
        send_signal(engines[0], signal);
    }

    pub(crate) fn kill(&mut self, name: &str) {
        let mut process = self.processes.remove(name).unwrap();
        kill(process.pid());
        process.wait(STOP_TIMEOUT);
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http_port)
    }

    pub(crate) fn health(&self) -> Option<u16> {
        http::get(&format!("{}/health", self.url())).map(|answer| answer.status)
    }

    pub(crate) fn wait_until_ready(&mut self) {
        let ready = wait_until(READY_TIMEOUT, || {
            let ended = self.processes.iter_mut().find_map(|(name, process)| process.has_ended().then(|| name.clone()));
            assert_eq!(ended, None, "has ended\n{}", self.output());
            self.health() == Some(200)
        });
        assert!(ready, "not ready after {READY_TIMEOUT:?}\n{}", self.output());
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        http::get(&format!("{}{path}", self.url())).unwrap_or_else(|| panic!("no answer to {path}\n{}", self.output()))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        http::post(&format!("{}{path}", self.url()), body)
    }

    pub(crate) fn chat(&self, question: &str) -> Answer {
        let messages = json!([{"role": "user", "content": question}]);
        let answer = self.post("/v1/chat/completions", &json!({"messages": messages, "temperature": 0, "max_tokens": 80}));
        assert_eq!(answer.status, 200, "{answer:?}\n{}", self.output());
        answer
    }

    /// Continues some token ids, greedily.
    pub(crate) fn complete(&self, max_tokens: u32) -> Answer {
        self.post("/v1/completions", &completion(max_tokens))
    }

    pub(crate) fn stream(&self, max_tokens: u32) -> Stream {
        let mut body = completion(max_tokens);
        body["stream"] = json!(true);
        Stream::open(&format!("{}/v1/completions", self.url()), &body)
    }

    /// What all processes have said so far.
    pub(crate) fn output(&self) -> String {
        self.processes.iter().map(|(name, process)| format!("--- {name}\n{}", process.output())).collect()
    }
}

fn completion(max_tokens: u32) -> Value {
    json!({"prompt": [1, 2, 3, 4, 5], "temperature": 0, "max_tokens": max_tokens})
}

/// What a process that ran to its end left.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    pub(crate) fn expect_success(self) -> Self {
        assert_eq!(self.status, Some(0), "{self:?}");
        self
    }

    /// It refused with this exit status and one sentence, which holds all these words.
    pub(crate) fn expect_refusal(&self, status: i32, words: &[&str]) {
        assert_eq!(self.status, Some(status), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        let errors: Vec<&str> = self.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        let [sentence] = errors[..] else { panic!("not one sentence: {self:?}") };
        for word in words {
            assert!(sentence.contains(word), "`{word}` is not in `{sentence}`");
        }
    }
}

/// Runs the binary to its end with a fresh data folder.
pub(crate) fn run(args: &[&str]) -> Finished {
    let home = tempfile::tempdir().unwrap();
    finish(command(home.path()).args(args))
}

fn command(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mlx-cluster"));
    command.env("MLX_CLUSTER_HOME", home).env("HF_HOME", home.join("hub")).env("RUST_BACKTRACE", "1");
    for name in ["HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "RUST_LOG", "MLX_CLUSTER_URL"] {
        command.env_remove(name);
    }
    command
}

/// Kills what does not end by itself.
fn finish(command: &mut Command) -> Finished {
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let streams = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let stdout = std::thread::spawn(|| std::io::read_to_string(streams.0).unwrap());
    let stderr = std::thread::spawn(|| std::io::read_to_string(streams.1).unwrap());
    let ended = wait_until(PATIENCE, || child.try_wait().unwrap().is_some());
    if !ended {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap().code();
    let finished = Finished { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
    assert!(ended, "has not ended after {PATIENCE:?}: {finished:?}");
    finished
}

/// The bundled model.
pub(crate) fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model")
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

//! One process under test: its output is kept, and it ends with the value that stands for it.

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use std::{
    io::Read,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};
use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};

/// What a process has to say for itself after this long is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

pub(crate) struct Process {
    name: String,
    child: Child,
    output: Arc<Mutex<Vec<u8>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = Arc::new(Mutex::new(Vec::new()));
        let readers = vec![collect(child.stdout.take().unwrap(), &output), collect(child.stderr.take().unwrap(), &output)];
        Self { name: name.to_owned(), child, output, readers }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn stdin(&mut self) -> ChildStdin {
        self.child.stdin.take().expect("stdin is taken once")
    }

    /// Everything on stdout and stderr so far.
    pub(crate) fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).into_owned()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(pid(self.pid()), signal).unwrap();
    }

    pub(crate) fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let mut status = None;
        let ended = wait_until(timeout, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert!(ended, "{} has not ended after {timeout:?}\n{}", self.name, self.output());
        self.readers.drain(..).for_each(|reader| reader.join().unwrap());
        status.unwrap()
    }

    pub(crate) fn wait_for_output(&self, text: &str) {
        let came = wait_until(PATIENCE, || self.output().contains(text));
        assert!(came, "{} did not say `{text}`\n{}", self.name, self.output());
    }

    /// The processes that this one has started and that still run.
    pub(crate) fn children(&self) -> Vec<u32> {
        let mut system = System::new().unwrap();
        system.refresh_processes_specifics(ProcessesToUpdate::All, true, ProcessRefreshKind::nothing());
        let own = sysinfo::Pid::from_u32(self.pid());
        let of_us = |process: &&sysinfo::Process| process.parent() == Some(own) && process.thread_kind().is_none();
        let mut pids: Vec<u32> = system.processes().values().filter(of_us).map(|process| process.pid().as_u32()).collect();
        pids.retain(|pid| is_alive(*pid));
        pids
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ending it again is not an error; the engines of a killed worker end by themselves.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.name, self.output());
        }
    }
}

/// Keeps what comes as soon as it comes, so that an answer without a line's end can be waited for.
fn collect(mut stream: impl Read + Send + 'static, output: &Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    let output = output.clone();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            output.lock().unwrap().extend_from_slice(&bytes[..count]);
        }
    })
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
}

pub(crate) fn kill(number: u32) {
    send_signal(number, Signal::KILL);
}

pub(crate) fn send_signal(number: u32, signal: Signal) {
    kill_process(pid(number), signal).unwrap();
}

/// Whether a process runs; one that has ended but was not waited for does not.
pub(crate) fn is_alive(number: u32) -> bool {
    if test_kill_process(pid(number)).is_err() {
        return false;
    }
    let mut system = System::new().unwrap();
    let target = sysinfo::Pid::from_u32(number);
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[target]), true, ProcessRefreshKind::nothing());
    system.process(target).is_some_and(|process| process.status() != sysinfo::ProcessStatus::Zombie)
}

/// Asks again and again; false when it was never true in `timeout`.
pub(crate) fn wait_until(timeout: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !holds() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(POLL);
    }
    true
}

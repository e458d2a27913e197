//! One engine process: started with its boot line, listened to, ended, and described when it is gone.

use super::{
    lines::{Lines, Tail},
    plan::{Event, Run},
};
use crate::{
    engine::boot::{Boot, BootLine},
    kernels,
};
use mlx_cluster_common::tensor::TensorPlace;
use mlx_cluster_lm::group::{HOSTFILE_VARIABLE, RANK_VARIABLE};
use std::{
    ffi::OsString,
    io,
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
    sync::mpsc,
    time::timeout,
};

/// Takes far less; an engine that does not read its boot line in this time never will.
const BOOT_WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// For what is left in the pipes of a process that is gone. Something that it started may hold them open.
const DRAIN_DEADLINE: Duration = Duration::from_millis(300);

const TEMPORARY_VARIABLE: &str = "TMPDIR";
/// For ranks of groups: the temporary folder that all engines of this machine share.
pub(crate) const COMMON_TEMPORARY_VARIABLE: &str = "MLX_CLUSTER_COMMON_TMPDIR";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Control {
    /// The engine ends by itself when its stdin closes.
    CloseStdin,
    Kill,
}

/// A running process, owned by the task that [`start`] returns.
#[derive(Debug)]
pub(crate) struct EngineProcess {
    child: Child,
    boot: Boot,
    run: Run,
    control: mpsc::Receiver<Control>,
    events: mpsc::Sender<Event>,
}

/// What MLX reads from the environment of a rank of a tensor-parallel group, `folder` being this worker's own.
pub(crate) fn environment(place: &TensorPlace, run: Run, folder: &Path) -> io::Result<Vec<(&'static str, OsString)>> {
    if place.is_alone() {
        return Ok(Vec::new());
    }
    let temporary = folder.join("tmp");
    std::fs::create_dir_all(&temporary)?;
    kernels::take(&std::env::temp_dir(), &temporary)?;
    let hostfile = temporary.join(format!("group-{}.json", run.0));
    Ok(vec![
        (HOSTFILE_VARIABLE, hostfile.into()),
        (RANK_VARIABLE, place.rank.to_string().into()),
        (TEMPORARY_VARIABLE, temporary.into()),
        (COMMON_TEMPORARY_VARIABLE, std::env::temp_dir().into()),
    ])
}

/// Starts `command engine`. Its process id is known at once; everything else arrives as events.
pub(crate) fn start(
    command: &Path,
    environment: Vec<(&'static str, OsString)>,
    boot: Boot,
    run: Run,
    control: mpsc::Receiver<Control>,
    events: mpsc::Sender<Event>,
) -> io::Result<EngineProcess> {
    let child = Command::new(command)
        .arg("engine")
        .envs(environment)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal reaches the whole process group; the worker decides when its engines end.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    Ok(EngineProcess { child, boot, run, control, events })
}

/// What happens to a process next.
enum Step {
    Stdout(Option<String>),
    Stderr(Option<String>),
    Control(Option<Control>),
    Gone(io::Result<ExitStatus>),
}

impl EngineProcess {
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Listens until the process is gone; the last event is [`Event::Exited`].
    pub(crate) async fn attend(mut self) {
        let mut stdin = self.child.stdin.take();
        let mut ears = Ears::new(&mut self);
        send_boot(&mut stdin, &self.boot).await;
        let status = loop {
            let step = tokio::select! {
                line = ears.stdout.next(), if !ears.stdout.is_finished() => Step::Stdout(line),
                line = ears.stderr.next(), if !ears.stderr.is_finished() => Step::Stderr(line),
                control = self.control.recv() => Step::Control(control),
                status = self.child.wait() => Step::Gone(status),
            };
            match step {
                Step::Stdout(line) => ears.hear_stdout(line).await,
                Step::Stderr(line) => ears.hear_stderr(line),
                Step::Control(Some(Control::CloseStdin)) => drop(stdin.take()),
                // Without an owner nobody would end it.
                Step::Control(Some(Control::Kill) | None) => {
                    if let Err(error) = self.child.start_kill() {
                        tracing::warn!(%error, "an engine could not be killed");
                    }
                    self.control.close();
                    break self.child.wait().await;
                }
                Step::Gone(status) => break status,
            }
        };
        // Fails only when something that the engine started holds its pipes open.
        let _ = timeout(DRAIN_DEADLINE, ears.drain()).await;
        let cause = match status {
            Ok(status) => describe_exit(status),
            Err(error) => format!("engine was lost: {error}"),
        };
        let exited = Event::Exited { run: self.run, cause, output: ears.tail.into_lines() };
        // Nobody is there to hear it when the worker itself ends.
        let _ = self.events.send(exited).await;
    }
}

/// A process that dies before it reads is noticed by its exit, so errors do not matter here.
async fn send_boot(stdin: &mut Option<ChildStdin>, boot: &Boot) {
    let Some(stdin) = stdin else { return };
    let Ok(mut line) = serde_json::to_vec(boot) else { return };
    line.push(b'\n');
    let _ = timeout(BOOT_WRITE_DEADLINE, stdin.write_all(&line)).await;
}

/// What an engine says, on both pipes.
struct Ears {
    run: Run,
    engine: String,
    events: mpsc::Sender<Event>,
    stdout: Lines<ChildStdout>,
    stderr: Lines<ChildStderr>,
    tail: Tail,
}

impl Ears {
    fn new(process: &mut EngineProcess) -> Self {
        Self {
            run: process.run,
            engine: process.boot.spec.id.to_string(),
            events: process.events.clone(),
            stdout: Lines::new(process.child.stdout.take()),
            stderr: Lines::new(process.child.stderr.take()),
            tail: Tail::default(),
        }
    }

    async fn hear_stdout(&mut self, line: Option<String>) {
        let Some(line) = line else { return };
        match serde_json::from_str::<BootLine>(&line) {
            Ok(line) => {
                let _ = self.events.send(Event::Said { run: self.run, line }).await;
            }
            Err(_) => self.hear_stderr(Some(line)),
        }
    }

    fn hear_stderr(&mut self, line: Option<String>) {
        let Some(line) = line else { return };
        tracing::info!(target: "mlx_cluster::engine", engine = self.engine, "{line}");
        self.tail.push(&line);
    }

    async fn drain(&mut self) {
        while let Some(line) = self.stdout.next().await {
            self.hear_stdout(Some(line)).await;
        }
        while let Some(line) = self.stderr.next().await {
            self.hear_stderr(Some(line));
        }
    }
}

/// How a process ended, as the rest of "worker mini: …".
pub(crate) fn describe_exit(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("engine exited with code {code}"),
        (None, Some(signal)) => match signal_name(signal) {
            Some(name) => format!("engine exited with signal {signal} ({name})"),
            None => format!("engine exited with signal {signal}"),
        },
        (None, None) => format!("engine exited: {status}"),
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn each_rank_of_a_group_has_its_own_files_and_knows_its_place() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(environment(&TensorPlace::alone(), Run(7), folder.path()).expect("nothing to make"), []);
        let environment = environment(&TensorPlace { rank: 2, shares: vec![1; 3] }, Run(7), folder.path()).expect("made");
        let value = |name| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone()).expect("set");
        assert_eq!(value("MLX_RANK"), "2");
        assert!(Path::new(&value("TMPDIR")).is_dir() && Path::new(&value("MLX_HOSTFILE")).starts_with(value("TMPDIR")));
    }

    #[test]
    fn an_exit_is_described_by_code_or_signal() {
        for (wait_status, text) in [
            (3 << 8, "engine exited with code 3"),
            (0, "engine exited with code 0"),
            (9, "engine exited with signal 9 (SIGKILL)"),
            (6 | 0x80, "engine exited with signal 6 (SIGABRT)"),
            (40, "engine exited with signal 40"),
        ] {
            assert_eq!(describe_exit(ExitStatus::from_raw(wait_status)), text);
        }
    }
}

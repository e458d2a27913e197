//! What this machine can do: measured once by a short-lived child that runs MLX, then remembered in the data folder.

use super::home;
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};

/// A measurement takes about a second; one that takes this long will not come.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);
#[cfg(target_os = "macos")]
const SYSCTL_DEADLINE: Duration = Duration::from_secs(2);
/// Two workers that start together on one machine measure one after the other, since they would slow each other down.
const LOCK_POLL: Duration = Duration::from_millis(50);
const OUTPUT_BYTES_SHOWN: usize = 300;

/// The line that `mlx-cluster engine --probe` prints.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Measurement {
    /// Floating-point operations per second of a large f32 matrix product.
    pub matmul_rate: f64,
    /// Bytes per second read from memory by a streaming kernel.
    pub memory_bandwidth: f64,
    /// What the GPU may use of unified memory; absent without a GPU.
    pub gpu_memory_bytes: Option<u64>,
}

/// Why there are no numbers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeasureError {
    #[error("{command} could not be started: {source}")]
    Start { command: PathBuf, source: io::Error },
    #[error("no result within {} s", PROBE_DEADLINE.as_secs())]
    TooSlow,
    #[error("{exit}, after: {output}")]
    Failed { exit: String, output: String },
    #[error("the result `{output}` is no measurement")]
    Unreadable { output: String },
}

/// A measurement, valid as long as `key` describes this machine and build.
#[derive(Debug, Serialize, Deserialize)]
struct Remembered {
    key: String,
    measurement: Measurement,
}

/// The remembered measurement, or a new one. `key` names whatever a result depends on.
pub(crate) async fn measure(command: &Path, home: &Path, key: &str) -> Result<Measurement, MeasureError> {
    let path = home.join("measurement.json");
    if let Some(measurement) = recall(&path, key) {
        return Ok(measurement);
    }
    let deadline = Instant::now() + PROBE_DEADLINE;
    let lock = loop {
        // A folder that cannot be locked is no reason not to measure.
        let Ok(lock) = home::try_lock(&home.join("measurement.lock")) else { break None };
        if lock.is_some() || Instant::now() >= deadline {
            break lock;
        }
        sleep(LOCK_POLL).await;
    };
    if let Some(measurement) = recall(&path, key) {
        return Ok(measurement);
    }
    let measurement = probe(command).await?;
    remember(&path, Remembered { key: key.to_owned(), measurement });
    drop(lock);
    Ok(measurement)
}

/// What the user lets the GPU take, ` wired N` in MB: Metal's recommendation follows it, so it is part of what a measurement depends on. Not run on
/// Linux.
#[cfg(target_os = "macos")]
pub(crate) async fn wired_limit() -> String {
    let sysctl = Command::new("/usr/sbin/sysctl").args(["-n", "iogpu.wired_limit_mb"]).stdin(Stdio::null()).kill_on_drop(true).output();
    match timeout(SYSCTL_DEADLINE, sysctl).await {
        Ok(Ok(output)) if output.status.success() => format!(" wired {}", String::from_utf8_lossy(&output.stdout).trim()),
        // Systems without this setting have Metal's own limit, always.
        _ => String::new(),
    }
}

#[cfg(not(target_os = "macos"))]
pub(crate) async fn wired_limit() -> String {
    String::new()
}

fn recall(path: &Path, key: &str) -> Option<Measurement> {
    let remembered: Remembered = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (remembered.key == key).then_some(remembered.measurement)
}

fn remember(path: &Path, remembered: Remembered) {
    let written = serde_json::to_vec(&remembered).map_err(io::Error::from).and_then(|json| home::write_whole(path, &json));
    if let Err(error) = written {
        tracing::warn!(path = %path.display(), %error, "the measurement cannot be remembered; the next start measures again");
    }
}

async fn probe(command: &Path) -> Result<Measurement, MeasureError> {
    let child = Command::new(command).args(["engine", "--probe"]).stdin(Stdio::null()).process_group(0).kill_on_drop(true).output();
    match timeout(PROBE_DEADLINE, child).await {
        Err(_) => Err(MeasureError::TooSlow),
        Ok(Err(source)) => Err(MeasureError::Start { command: command.to_path_buf(), source }),
        Ok(Ok(output)) => read(&output),
    }
}

fn read(output: &Output) -> Result<Measurement, MeasureError> {
    if !output.status.success() {
        let exit = super::process::describe_exit(output.status);
        return Err(MeasureError::Failed { exit, output: shown(&output.stderr) });
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    let measurement: Option<Measurement> = serde_json::from_str(line).ok();
    let is_rate = |rate: f64| rate.is_finite() && rate >= 0.0;
    measurement
        .filter(|found| is_rate(found.matmul_rate) && is_rate(found.memory_bandwidth))
        .ok_or_else(|| MeasureError::Unreadable { output: shown(&output.stdout) })
}

/// The end of an output, on one line.
fn shown(output: &[u8]) -> String {
    let end = &output[output.len().saturating_sub(OUTPUT_BYTES_SHOWN)..];
    let line: String = String::from_utf8_lossy(end).chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn output(wait_status: i32, stdout: &str, stderr: &str) -> Output {
        Output { status: std::process::ExitStatus::from_raw(wait_status), stdout: stdout.into(), stderr: stderr.into() }
    }

    #[test]
    fn a_result_is_read_and_checked() {
        let line = r#"{"matmul_rate":1e12,"memory_bandwidth":1e11,"gpu_memory_bytes":null}"#;
        let wanted = Measurement { matmul_rate: 1e12, memory_bandwidth: 1e11, gpu_memory_bytes: None };
        assert_eq!(read(&output(0, &format!("chatter\n{line}\n"), "")).expect("readable"), wanted);
        for stdout in ["", "{}", r#"{"matmul_rate":-1,"memory_bandwidth":1}"#, "garbage"] {
            assert!(matches!(read(&output(0, stdout, "")), Err(MeasureError::Unreadable { .. })), "{stdout}");
        }
        let failure = read(&output(6, line, "MLX: no\nGPU\u{1b}")).expect_err("aborted").to_string();
        assert_eq!(failure, "engine exited with signal 6 (SIGABRT), after: MLX: no GPU");
    }

    #[test]
    fn a_measurement_is_recalled_for_the_same_key_only() {
        let home = tempfile::tempdir().expect("a folder");
        let path = home.path().join("measurement.json");
        let measurement = Measurement { matmul_rate: 2.0, memory_bandwidth: 3.0, gpu_memory_bytes: Some(4) };
        remember(&path, Remembered { key: "0.1.0 M4 64".into(), measurement });
        assert_eq!(recall(&path, "0.1.0 M4 64"), Some(measurement));
        assert_eq!(recall(&path, "0.2.0 M4 64"), None);
        std::fs::write(&path, "{").expect("written");
        assert_eq!(recall(&path, "0.1.0 M4 64"), None);
    }
}

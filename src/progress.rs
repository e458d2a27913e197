//! What a cluster does until its model is ready: bars on a terminal, plain lines elsewhere.

use crate::{
    client::Client,
    failure::{Exit, Failure},
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mlx_cluster_common::units::Bytes;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    io::{self, IsTerminal},
    sync::LazyLock,
    time::Duration,
};
use tokio::time::{Instant, sleep};

const POLL: Duration = Duration::from_millis(100);
/// A coordinator that does not answer for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Plain lines are printed once for this share of a transfer.
const LINES_PER_TRANSFER: u64 = 4;

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Prints something without tearing the bars.
pub(crate) fn suspended<T>(print: impl FnOnce() -> T) -> T {
    BARS.suspend(print)
}

/// Puts a bar below those that are there. None where stderr is no terminal.
pub(crate) fn add_bar(bar: impl FnOnce() -> ProgressBar) -> Option<ProgressBar> {
    io::stderr().is_terminal().then(|| BARS.add(bar()))
}

/// What is worth showing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detail {
    /// The state of the cluster, and what its workers fetch and load.
    All,
    /// Somebody else says what state the cluster is in.
    Transfers,
}

/// Shows progress until the model can answer, and returns the status of the cluster then.
pub(crate) async fn until_ready(client: &Client, detail: Detail) -> anyhow::Result<Value> {
    let mut shown = Shown::new();
    let mut heard = Instant::now();
    loop {
        match client.cluster().await {
            Ok(status) => {
                heard = Instant::now();
                match state_of(&status) {
                    "ready" if status["model"].is_object() => return Ok(status),
                    "idle" => {
                        return Err(refused(client, "serves no model: load one with POST /v1/cluster/load, or start it with --model"));
                    }
                    "failed" | "draining" => return Err(refused(client, &format!("cannot answer: {}", cause_of(&status)))),
                    _ => shown.show(&status, detail),
                }
            }
            Err(error) if heard.elapsed() > SILENCE_MAX => return Err(error),
            Err(_) => {}
        }
        sleep(POLL).await;
    }
}

fn refused(client: &Client, why: &str) -> anyhow::Error {
    Failure::new(Exit::Other, format!("the coordinator at {} {why}", client.url())).into()
}

fn state_of(status: &Value) -> &str {
    status.pointer("/instance/state").and_then(Value::as_str).unwrap_or_default()
}

fn cause_of(status: &Value) -> &str {
    status.pointer("/instance/cause").and_then(Value::as_str).unwrap_or("no cause is given")
}

/// A transfer of bytes that a worker is busy with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Transfer {
    worker: String,
    what: String,
    done_bytes: u64,
    total_bytes: u64,
}

fn transfers(status: &Value) -> Vec<Transfer> {
    let workers = status["workers"].as_array().into_iter().flatten();
    let transfer = |worker: &Value| {
        let engine = &worker["engine"];
        let what = match engine["state"].as_str()? {
            "fetching" => format!("fetching {}", engine["file"].as_str()?),
            "loading" => "loading".to_owned(),
            _ => return None,
        };
        // Before the files are looked at, there is no total.
        let (done_bytes, total_bytes) = (engine["done_bytes"].as_u64()?, engine["total_bytes"].as_u64().filter(|total| *total > 0)?);
        Some(Transfer { worker: worker["name"].as_str()?.to_owned(), what, done_bytes, total_bytes })
    };
    workers.filter_map(transfer).collect()
}

/// What was shown last.
enum Shown {
    Bars { state: ProgressBar, transfers: BTreeMap<String, ProgressBar> },
    Lines { state: String, transfers: BTreeMap<String, (String, u64)> },
}

impl Shown {
    fn new() -> Self {
        match io::stderr().is_terminal() {
            true => Shown::Bars { state: BARS.add(ProgressBar::new_spinner()), transfers: BTreeMap::new() },
            false => Shown::Lines { state: String::new(), transfers: BTreeMap::new() },
        }
    }

    fn show(&mut self, status: &Value, detail: Detail) {
        let current = transfers(status);
        match self {
            Shown::Bars { state, transfers } => {
                if detail == Detail::All {
                    state.set_message(cause_of(status).to_owned());
                    state.tick();
                }
                transfers.retain(|worker, bar| {
                    let goes_on = current.iter().any(|transfer| transfer.worker == *worker);
                    if !goes_on {
                        bar.finish_and_clear();
                    }
                    goes_on
                });
                for transfer in current {
                    let bar = transfers.entry(transfer.worker.clone()).or_insert_with(|| BARS.add(bar(&transfer)));
                    bar.set_message(transfer.what);
                    bar.set_length(transfer.total_bytes);
                    bar.set_position(transfer.done_bytes);
                }
            }
            Shown::Lines { state, transfers } => {
                if detail == Detail::All && state != cause_of(status) {
                    cause_of(status).clone_into(state);
                    eprintln!("{state}");
                }
                for transfer in current {
                    let part = transfer.done_bytes * LINES_PER_TRANSFER / transfer.total_bytes;
                    let mark = (transfer.what.clone(), part);
                    if transfers.insert(transfer.worker.clone(), mark.clone()) != Some(mark) {
                        let Transfer { worker, what, done_bytes, total_bytes } = transfer;
                        eprintln!("{worker}: {what}, {} of {}", Bytes(done_bytes), Bytes(total_bytes));
                    }
                }
            }
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Shown::Bars { state, transfers } = self {
            transfers.values().chain([&*state]).for_each(ProgressBar::finish_and_clear);
        }
    }
}

fn bar(transfer: &Transfer) -> ProgressBar {
    let template = "{prefix:16} {bar:30} {decimal_bytes:>10} of {decimal_total_bytes:10} {decimal_bytes_per_sec:>12} {msg}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(transfer.total_bytes).with_style(style).with_prefix(transfer.worker.clone()).with_position(transfer.done_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn transfers_are_read_from_the_status() {
        let engine = |state: &str| json!({"state": state, "file": "model.safetensors", "done_bytes": 5, "total_bytes": 9});
        let status = json!({"workers": [
            {"name": "mini", "engine": engine("fetching")}, {"name": "studio", "engine": engine("loading")},
            {"name": "air", "engine": engine("ready")}, {"name": "pro", "engine": null}]});
        let transfer = |worker: &str, what: &str| Transfer { worker: worker.into(), what: what.into(), done_bytes: 5, total_bytes: 9 };
        assert_eq!(transfers(&status), [transfer("mini", "fetching model.safetensors"), transfer("studio", "loading")]);
    }
}

//! `mlx-cluster status`: workers, layers, memory and speed of a running cluster.

use crate::{
    client::Client,
    failure::{Exit, Failure},
    progress::{self, Detail},
    target::DEFAULT_URL,
};
use mlx_cluster_common::{links::Medium, units::Bytes};
use serde_json::Value;
use std::{fmt::Write, time::Duration};
use tokio::time::timeout;

/// Show the workers of a cluster, what they hold and how fast they are.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster status
  mlx-cluster status --json | jq '.workers[].name'")]
pub(crate) struct StatusArgs {
    /// The coordinator to ask
    #[arg(long, env = "MLX_CLUSTER_URL", default_value = DEFAULT_URL)]
    url: String,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// Wait so long until the model can answer
    #[arg(long, value_name = "SECONDS")]
    wait: Option<u64>,
}

pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let client = Client::new(&args.url)?;
    let status = match args.wait {
        None => client.cluster().await?,
        Some(seconds) => match timeout(Duration::from_secs(seconds), progress::until_ready(&client, Detail::All)).await {
            Ok(status) => status?,
            Err(_) => return Err(Failure::new(Exit::Network, format!("the model at {} is not ready after {seconds} s", args.url)).into()),
        },
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&status)?),
        false => print!("{}", text(&status)),
    }
    Ok(())
}

fn text(status: &Value) -> String {
    let shown = |pointer: &str| status.pointer(pointer).map(plain).unwrap_or_default();
    let mut text = format!("cluster {}: {}", shown("/cluster"), shown("/instance/state"));
    let cause = shown("/instance/cause");
    if !cause.is_empty() {
        text += &format!(" ({cause})");
    }
    text.push('\n');
    if status["model"].is_object() {
        text += &format!("model {}, context {} tokens\n", shown("/model/id"), shown("/model/context_tokens"));
    }
    for adapter in list(status, "adapters") {
        text += &adapter_line(adapter);
    }
    for job in list(status, "jobs") {
        text += &job_line(job);
    }
    text += &table(status);
    text += &ways(status);
    let addresses = status["join_addresses"].as_array().into_iter().flatten().map(plain).collect::<Vec<_>>();
    if let Some(address) = addresses.first() {
        text += &format!("a worker that is not found joins with --join {address}\n");
    }
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{:.1} tokens/s, {} requests running, {} waiting, caches {} of {} tokens",
        status.pointer("/load/tokens_per_second").and_then(Value::as_f64).unwrap_or(0.0),
        shown("/load/running"),
        shown("/load/waiting"),
        shown("/load/cache_tokens_used"),
        shown("/load/cache_tokens_max"),
    );
    text
}

fn list<'a>(status: &'a Value, key: &str) -> &'a [Value] {
    status[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn adapter_line(adapter: &Value) -> String {
    let shown = |key: &str| plain(&adapter[key]);
    let cause = if adapter["cause"].is_null() { String::new() } else { format!(" ({})", shown("cause")) };
    let (name, state, kind, rank) = (shown("name"), shown("state"), shown("fine_tune_type"), shown("rank"));
    format!("adapter {name}: {state}{cause}, {kind} of rank {rank} on {} matrices, {}\n", shown("modules"), bytes(&adapter["bytes"]))
}

fn job_line(job: &Value) -> String {
    let cause = plain(&job["instance"]["cause"]);
    let cause = if cause.is_empty() { cause } else { format!(" ({cause})") };
    format!("job {}: {}{cause}, model {}\n", plain(&job["number"]), plain(&job["instance"]["state"]), plain(&job["model"]))
}

/// One line a worker with its engine of the served model, and one for each engine of a job.
fn table(status: &Value) -> String {
    let workers = list(status, "workers");
    if workers.is_empty() {
        return "no workers: start `mlx-cluster worker` on each Mac\n".to_owned();
    }
    let rows = workers.iter().flat_map(|worker| std::iter::once(row(worker)).chain(job_rows(worker)));
    aligned(["worker", "engine", "layers", "memory used", "usable", "chip"], rows)
}

fn job_rows(worker: &Value) -> impl Iterator<Item = [String; 6]> {
    let of_jobs = list(worker, "engines").iter().filter(|engine| !engine["job"].is_null());
    of_jobs.map(|engine| {
        let state = format!("job {}: {}", plain(&engine["job"]), engine_state(engine));
        [plain(&worker["name"]), state, layers(engine), bytes(&engine["resident_bytes"]), String::new(), String::new()]
    })
}

fn engine_state(engine: &Value) -> String {
    match engine["state"].as_str() {
        None => "none".to_owned(),
        Some("failed") => format!("failed: {}", plain(&engine["cause"])),
        Some(state) => state.to_owned(),
    }
}

/// What the engine of a plan has of the model.
fn layers(place: &Value) -> String {
    let layers = match (place["first_layer"].as_u64(), place["last_layer"].as_u64()) {
        (Some(first), Some(last)) if first == last => first.to_string(),
        (Some(first), Some(last)) => format!("{first}-{last}"),
        _ => "-".to_owned(),
    };
    let part = match place["ranks"].as_u64() {
        Some(2..) => format!(", {}/{} of each", plain(&place["share"]), plain(&place["share_of"])),
        _ => String::new(),
    };
    layers + &part
}

fn bytes(value: &Value) -> String {
    value.as_u64().map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string())
}

/// The way that is taken from each worker to each other one; nothing where none was measured.
fn ways(status: &Value) -> String {
    let mut chosen = list(status, "links").iter().filter(|link| link["chosen"].as_bool() == Some(true)).map(way).peekable();
    if chosen.peek().is_none() {
        return String::new();
    }
    aligned(["from", "to", "address", "interface", "round trip", "throughput"], chosen)
}

fn way(link: &Value) -> [String; 6] {
    let medium: Medium = serde_json::from_value(link["medium"].clone()).unwrap_or_default();
    let number = |key: &str| link[key].as_f64().unwrap_or(0.0);
    [
        plain(&link["from"]),
        plain(&link["to"]),
        plain(&link["address"]),
        format!("{} ({medium})", plain(&link["interface"])),
        format!("{:.2} ms", number("round_trip_seconds") * 1e3),
        format!("{:.0} Mbit/s", number("bytes_per_second") * 8.0 / 1e6),
    ]
}

fn aligned(header: [&str; 6], rows: impl Iterator<Item = [String; 6]>) -> String {
    let rows: Vec<_> = std::iter::once(header.map(str::to_owned)).chain(rows).collect();
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; 6]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("  {}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(worker: &Value) -> [String; 6] {
    let engine = &worker["engine"];
    let state = if worker["connected"].as_bool() == Some(false) { "gone".to_owned() } else { engine_state(engine) };
    let [resident, usable] = [&engine["resident_bytes"], &worker["usable_memory_bytes"]].map(bytes);
    [plain(&worker["name"]), state, layers(worker), resident, usable, plain(&worker["chip"])]
}

/// Texts without quotes, nothing for null.
fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_rank_is_shown_with_its_share() {
        let worker = json!({"name": "studio", "connected": true, "first_layer": 0, "last_layer": 4, "rank": 1, "ranks": 2, "share": 1, "share_of": 3});
        assert_eq!(row(&worker)[2], "0-4, 1/3 of each");
    }

    #[test]
    fn engines_of_jobs_have_lines_of_their_own() {
        let status = json!({
            "cluster": "home", "instance": {"state": "idle", "cause": "no model was asked for"}, "model": null,
            "jobs": [{"number": 3, "model": "org/base", "instance": {"state": "recovering", "cause": "worker mini: it was killed"}}],
            "workers": [{"name": "mini", "connected": true, "chip": "Apple M4", "engine": null, "usable_memory_bytes": 16_000_000_000u64,
                "engines": [{"job": 3, "state": "loading", "first_layer": 0, "last_layer": 7, "rank": 1, "ranks": 2, "share": 1, "share_of": 2}]}]});
        let text = text(&status);
        assert!(
            text.starts_with(
                "cluster home: idle (no model was asked for)\n\
                 job 3: recovering (worker mini: it was killed), model org/base\n\
                 \x20 worker  engine          layers            memory used  usable   chip\n\
                 \x20 mini    none            -                 -            16.0 GB  Apple M4\n\
                 \x20 mini    job 3: loading  0-7, 1/2 of each  -\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn a_status_is_one_screen() {
        let status = json!({
            "cluster": "home", "instance": {"state": "ready", "cause": null}, "model": {"id": "tiny", "context_tokens": 4096},
            "workers": [
                {"name": "studio", "connected": true, "chip": "Apple M2 Ultra", "first_layer": 0, "last_layer": 4, "usable_memory_bytes": 48_000_000_000u64,
                 "engine": {"state": "ready", "resident_bytes": 1_200_000_000}},
                {"name": "mini", "connected": false, "chip": "Apple M4", "engine": null}],
            "links": [
                {"from": "studio", "to": "mini", "address": "10.0.0.4", "interface": "en0", "medium": "thunderbolt", "chosen": true,
                 "round_trip_seconds": 0.000214, "bytes_per_second": 1.25e9},
                {"from": "studio", "to": "mini", "address": "192.168.1.21", "interface": "en1", "medium": "wifi", "chosen": false,
                 "round_trip_seconds": 0.003, "bytes_per_second": 5e7}],
            "join_addresses": ["192.168.1.20:7070", "10.0.0.4:7070"],
            "load": {"tokens_per_second": 31.25, "running": 2, "waiting": 0, "cache_tokens_used": 700, "cache_tokens_max": 8192}});
        assert_eq!(
            text(&status),
            "cluster home: ready\n\
             model tiny, context 4096 tokens\n\
             \x20 worker  engine  layers  memory used  usable   chip\n\
             \x20 studio  ready   0-4     1.2 GB       48.0 GB  Apple M2 Ultra\n\
             \x20 mini    gone    -       -            -        Apple M4\n\
             \x20 from    to    address   interface          round trip  throughput\n\
             \x20 studio  mini  10.0.0.4  en0 (Thunderbolt)  0.21 ms     10000 Mbit/s\n\
             a worker that is not found joins with --join 192.168.1.20:7070\n\
             31.2 tokens/s, 2 requests running, 0 waiting, caches 700 of 8192 tokens\n"
        );
    }
}

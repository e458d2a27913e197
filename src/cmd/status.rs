//! `mlx-cluster status`: workers, layers, memory and speed of a running cluster.

use crate::{
    client::Client,
    failure::{Exit, Failure},
    progress::{self, Detail},
    target::DEFAULT_URL,
};
use mlx_cluster_common::units::Bytes;
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
    text += &table(status);
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

/// One line a worker.
fn table(status: &Value) -> String {
    let workers = status["workers"].as_array().map(Vec::as_slice).unwrap_or_default();
    if workers.is_empty() {
        return "no workers: start `mlx-cluster worker` on each Mac\n".to_owned();
    }
    let rows: Vec<[String; 6]> = workers.iter().map(row).collect();
    let header = ["worker", "engine", "layers", "memory used", "usable", "chip"].map(str::to_owned);
    let mut widths = [0; 6];
    for row in rows.iter().chain([&header]) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; 6]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("  {}\n", cells.join("  ").trim_end())
    };
    [&header].into_iter().chain(&rows).map(line).collect()
}

fn row(worker: &Value) -> [String; 6] {
    let engine = &worker["engine"];
    let state = match (worker["connected"].as_bool(), engine["state"].as_str()) {
        (Some(false), _) => "gone".to_owned(),
        (_, None) => "none".to_owned(),
        (_, Some("failed")) => format!("failed: {}", plain(&engine["cause"])),
        (_, Some(state)) => state.to_owned(),
    };
    let layers = match (worker["first_layer"].as_u64(), worker["last_layer"].as_u64()) {
        (Some(first), Some(last)) if first == last => first.to_string(),
        (Some(first), Some(last)) => format!("{first}-{last}"),
        _ => "-".to_owned(),
    };
    let bytes = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), |bytes| Bytes(bytes).to_string());
    [plain(&worker["name"]), state, layers, bytes(&engine["resident_bytes"]), bytes(&worker["usable_memory_bytes"]), plain(&worker["chip"])]
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
    fn a_status_is_one_screen() {
        let status = json!({
            "cluster": "home", "instance": {"state": "ready", "cause": null}, "model": {"id": "tiny", "context_tokens": 4096},
            "workers": [
                {"name": "studio", "connected": true, "chip": "Apple M2 Ultra", "first_layer": 0, "last_layer": 4, "usable_memory_bytes": 48_000_000_000u64,
                 "engine": {"state": "ready", "resident_bytes": 1_200_000_000}},
                {"name": "mini", "connected": false, "chip": "Apple M4", "engine": null}],
            "join_addresses": ["192.168.1.20:7070", "10.0.0.4:7070"],
            "load": {"tokens_per_second": 31.25, "running": 2, "waiting": 0, "cache_tokens_used": 700, "cache_tokens_max": 8192}});
        assert_eq!(
            text(&status),
            "cluster home: ready\n\
             model tiny, context 4096 tokens\n\
             \x20 worker  engine  layers  memory used  usable   chip\n\
             \x20 studio  ready   0-4     1.2 GB       48.0 GB  Apple M2 Ultra\n\
             \x20 mini    gone    -       -            -        Apple M4\n\
             a worker that is not found joins with --join 192.168.1.20:7070\n\
             31.2 tokens/s, 2 requests running, 0 waiting, caches 700 of 8192 tokens\n"
        );
    }
}

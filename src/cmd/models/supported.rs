//! `mlx-cluster models supported`: what can be run.

use mlx_cluster_common::architectures::{Architecture, architectures};
use std::fmt::Write;

/// List every model_type of config.json that can be run, by family, and what is special about each.
#[derive(clap::Args)]
pub(super) struct SupportedArgs {
    /// One JSON object a line: model_type, family, special
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &SupportedArgs) {
    print!("{}", if args.json { as_json() } else { as_table() });
}

fn as_json() -> String {
    let object = |architecture: &Architecture| {
        let Architecture { model_type, group, special, .. } = architecture;
        format!("{}\n", serde_json::json!({"model_type": model_type, "family": group.to_string(), "special": special}))
    };
    architectures().into_iter().map(object).collect()
}

fn as_table() -> String {
    let all = architectures();
    let width = all.iter().map(|architecture| architecture.model_type.len()).max().unwrap_or(0);
    let (mut text, mut group) = (String::new(), None);
    for Architecture { model_type, group: own, special, .. } in &all {
        // Writing to a String cannot fail.
        if group != Some(own) {
            let _ = writeln!(text, "{}{own}", if group.is_some() { "\n" } else { "" });
            group = Some(own);
        }
        let _ = writeln!(text, "  {model_type:width$}  {special}");
    }
    let _ = writeln!(text, "\n{} model types. docs/adding-an-architecture.md says how to add one.", all.len());
    text
}

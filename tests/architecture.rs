//! The rules of the code's layout: which crate may know what, where `unsafe` may stand, how files open.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

/// The one file that may hold `unsafe`.
const UNSAFE_FILE: &str = "worker/lm/src/ffi.rs";

/// Each crate, and what it must not depend on, directly or through others (development and build dependencies apart).
const FORBIDDEN: [(&str, &[&str]); 6] = [
    ("mlx-cluster-common", &["tokio", "tonic", "mlx-rs", "mlx-sys", "reqwest", "mlx-cluster-proto"]),
    ("mlx-cluster-hub", &["tonic", "mlx-rs", "mlx-sys", "mlx-cluster-proto", "mlx-cluster-coordinator", "mlx-cluster-worker"]),
    ("mlx-cluster-proto", &["mlx-rs", "mlx-sys", "mlx-cluster-coordinator", "mlx-cluster-worker", "mlx-cluster-lm"]),
    ("mlx-cluster-coordinator", &["mlx-rs", "mlx-sys", "mlx-cluster-lm", "mlx-cluster-worker"]),
    (
        "mlx-cluster-lm",
        &["tokio", "tonic", "reqwest", "axum", "mlx-cluster-proto", "mlx-cluster-hub", "mlx-cluster-coordinator", "mlx-cluster-worker"],
    ),
    ("mlx-cluster-worker", &["minijinja", "tokenizers", "mlx-cluster-coordinator"]),
];

#[test]
fn crates_know_only_what_they_may() {
    let graph = Graph::read();
    for (crate_name, forbidden) in FORBIDDEN {
        let reached = graph.reached_from(crate_name);
        for name in forbidden {
            assert!(!reached.contains(*name), "{crate_name} depends on {name}");
        }
    }
}

#[test]
fn arrows_between_our_crates_run_one_way() {
    let graph = Graph::read();
    let ours: Vec<&String> = graph.edges.keys().filter(|name| name.starts_with("mlx-cluster")).collect();
    for name in &ours {
        for other in &ours {
            let both = name != other && graph.reached_from(name).contains(*other) && graph.reached_from(other).contains(*name);
            assert!(!both, "{name} and {other} depend on each other");
        }
    }
    assert_eq!(ours.len(), FORBIDDEN.len() + 1, "a new crate needs a row in FORBIDDEN: {ours:?}");
}

#[test]
fn models_are_data_where_they_are_run_and_planned() {
    let names = mlx_cluster_common::architectures::supported_model_types();
    let places = ["worker/src", "worker/lm/src", "coordinator/src/core"].map(|place| root().join(place));
    for path in rust_files().into_iter().filter(|path| places.iter().any(|place| path.starts_with(place))) {
        let text = std::fs::read_to_string(&path).unwrap();
        // Tests read configs of real architectures, and comments name the model that a formula comes from.
        let code = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).filter(|line| !line.trim_start().starts_with("//"));
        let is_test = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
        for line in code.filter(|_| !is_test) {
            let found = names.iter().find(|name| words(line).any(|word| word == **name));
            assert!(found.is_none(), "{}: `{}` in: {line}", path.display(), found.unwrap());
        }
    }
}

/// The identifiers of a line, and those inside its texts.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '-').filter(|word| !word.is_empty())
}

#[test]
fn unsafe_code_stands_in_one_file() {
    for path in rust_files() {
        // The tool that writes bindings writes the word, and this file holds it.
        let is_allowed = path.ends_with(UNSAFE_FILE) || path.ends_with(file!()) || path.starts_with(root().join("scripts"));
        let text = std::fs::read_to_string(&path).unwrap();
        let found =
            text.lines().find(|line| ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|word| line.contains(word)));
        assert!(is_allowed || found.is_none(), "{}: {}", path.display(), found.unwrap_or_default());
    }
}

#[test]
fn every_file_opens_with_its_purpose() {
    for path in rust_files() {
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//! "), "{} does not open with `//!` and a sentence", path.display());
    }
}

#[test]
fn main_stays_small() {
    let text = std::fs::read_to_string(root().join("src/main.rs")).unwrap();
    assert!(text.lines().count() < 60);
}

/// Names of packages and what they depend on when built for use.
struct Graph {
    edges: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn read() -> Self {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version", "1", "--locked", "--offline"])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        let names: BTreeMap<&str, &str> = packages.iter().map(|package| (text(&package["id"]), text(&package["name"]))).collect();
        let nodes = metadata["resolve"]["nodes"].as_array().unwrap();
        let edges = nodes.iter().map(|node| {
            let used = node["deps"].as_array().unwrap().iter().filter(|dep| is_for_use(dep));
            (names[text(&node["id"])].to_owned(), used.map(|dep| names[text(&dep["pkg"])].to_owned()).collect())
        });
        Self { edges: edges.fold(BTreeMap::new(), merge) }
    }

    fn reached_from(&self, name: &str) -> BTreeSet<String> {
        let mut reached = BTreeSet::new();
        let mut open = vec![name.to_owned()];
        while let Some(name) = open.pop() {
            for next in self.edges.get(&name).into_iter().flatten() {
                if reached.insert(next.clone()) {
                    open.push(next.clone());
                }
            }
        }
        reached
    }
}

/// Versions of one package are taken together.
fn merge(mut edges: BTreeMap<String, BTreeSet<String>>, (name, used): (String, BTreeSet<String>)) -> BTreeMap<String, BTreeSet<String>> {
    edges.entry(name).or_default().extend(used);
    edges
}

fn is_for_use(dep: &Value) -> bool {
    dep["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files that are ours.
fn rust_files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["src", "common", "proto", "coordinator", "worker", "tests", "scripts"].iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true if path.ends_with("target") => {}
                true => folders.push(path),
                false => files.extend(path.extension().is_some_and(|extension| extension == "rs").then_some(path)),
            }
        }
    }
    assert!(files.len() > 20, "the folders have moved");
    files
}

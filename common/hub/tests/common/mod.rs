//! A small model on a fake hub, and settings that reach it with little patience.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use mlx_cluster_hub::{
    HubSettings, ModelRef, Progress,
    fake::{Access, FakeHub},
};
use safetensors::tensor::{Dtype, TensorView};
use std::{path::Path, sync::Mutex, time::Duration};
use tempfile::TempDir;

pub const REPO: &str = "demo/tiny";
pub const FIRST: &str = "model-00001-of-00002.safetensors";
pub const SECOND: &str = "model-00002-of-00002.safetensors";

/// A fake hub with one repository, and an empty cache.
pub struct World {
    pub hub: FakeHub,
    pub home: TempDir,
    pub settings: HubSettings,
}

impl World {
    pub fn new() -> Self {
        Self::with(Access::Public, model_files())
    }

    pub fn with(access: Access, files: Vec<(&str, Vec<u8>)>) -> Self {
        let hub = FakeHub::start().unwrap();
        hub.add(REPO, access, files);
        let home = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            retries: 2,
            retry_delay: Duration::from_millis(1),
            stall_timeout: Duration::from_secs(5),
            ..HubSettings::new(&hub.endpoint(), &home.path().join("hub"))
        };
        Self { hub, home, settings }
    }

    pub fn offline(&self) -> HubSettings {
        HubSettings { offline: true, ..self.settings.clone() }
    }

    /// Requests for the content of a file, and their ranges.
    pub fn ranges(&self, file: &str) -> Vec<Option<String>> {
        let path = format!("/storage/{REPO}/{file}");
        self.hub.take_seen().into_iter().filter(|seen| seen.path == path).map(|seen| seen.range).collect()
    }

    pub fn incomplete(&self) -> std::path::PathBuf {
        let blobs = self.settings.cache_dir.join("models--demo--tiny/blobs");
        let mut parts = std::fs::read_dir(blobs).unwrap().map(|entry| entry.unwrap().path());
        parts.find(|path| path.extension().is_some_and(|extension| extension == "incomplete")).unwrap()
    }
}

pub fn model() -> ModelRef {
    ModelRef::parse(REPO).unwrap()
}

pub fn weights(name: &str, elements: usize) -> Vec<u8> {
    let data: Vec<u8> = (0..elements * 4).map(|index| (index * 31 % 251) as u8).collect();
    let view = TensorView::new(Dtype::F32, vec![elements], &data).unwrap();
    safetensors::serialize([(name, view)], None).unwrap()
}

/// Config, template and index lie in git, tokenizer and weights in LFS.
pub fn model_files() -> Vec<(&'static str, Vec<u8>)> {
    let index = format!(r#"{{"metadata": {{}}, "weight_map": {{"a": "{FIRST}", "b": "{SECOND}"}}}}"#);
    vec![
        ("config.json", br#"{"model_type": "qwen3"}"#.to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("tokenizer.json", format!("{{\"pad\": \"{}\"}}", "x".repeat(20_000)).into_bytes()),
        ("model.safetensors.index.json", index.into_bytes()),
        ("README.md", b"# tiny".to_vec()),
        (FIRST, weights("a", 700_000)),
        (SECOND, weights("b", 100)),
    ]
}

pub fn silent(_: Progress<'_>) {}

/// Remembers every report of progress.
#[derive(Default)]
pub struct Reports(pub Mutex<Vec<(String, u64, u64)>>);

impl Reports {
    pub fn add(&self, progress: Progress<'_>) {
        self.0.lock().unwrap().push((progress.file.to_owned(), progress.done_bytes, progress.total_bytes));
    }

    pub fn of(&self, file: &str) -> Vec<(u64, u64)> {
        self.0.lock().unwrap().iter().filter(|(name, _, _)| name == file).map(|(_, done, total)| (*done, *total)).collect()
    }
}

pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

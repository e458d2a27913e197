//! The folder of a fused model: written under a hidden name, checked for room before, renamed when complete, removed when not.

use crate::{
    failure::{Exit, Failure},
    target::interrupted,
};
use anyhow::Context;
use mlx_cluster_common::{
    config::parse_json,
    training::{
        FusePlan,
        fuse::{CanonicalTensor, Rewrite},
    },
    units::Bytes,
    weights::WeightIndex,
};
use mlx_cluster_hub::{
    ADAPTER_CONFIG_FILE, Description, SHARD_BYTES_MAX, Shard, ShardTensor, WEIGHT_INDEX_FILE, free_disk_bytes, plan_shards,
    weight_index_file,
};
use mlx_cluster_lm::fuse::{Checkpoint, Fusion};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    fs::{self, File, Permissions},
    io::{BufWriter, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use tokio_util::sync::CancellationToken;

/// Kinds of files beside the weights that belong to a model: config, tokenizer, template, and code that Python may ask for.
const SMALL_FILES: [&str; 6] = ["json", "jinja", "txt", "model", "tiktoken", "py"];
/// No tokenizer is larger.
const SMALL_FILE_BYTES_MAX: u64 = 256 << 20;
const CONFIG_FILE: &str = "config.json";
/// What stands in a config for numbers in other forms than floats, or for parts that are not written.
const DEQUANTISED_KEYS: [&str; 5] = ["quantization", "quantization_config", "quantize_activations", "vision_config", "_name_or_path"];

/// The model that an adapter becomes part of.
pub(super) struct Base {
    pub(super) folder: PathBuf,
    pub(super) description: Description,
    pub(super) index: WeightIndex,
}

/// A result that is being written.
pub(super) struct Output<'a> {
    target: &'a Path,
    partial: Partial,
    base: &'a Base,
    small_files: Vec<(PathBuf, u64)>,
    weights: Weights<'a>,
}

enum Weights<'a> {
    /// The base's files, in which some tensors are written anew.
    Copies(&'a [Rewrite<'a>]),
    /// Files of their own.
    Shards(Vec<Shard>, BTreeMap<&'a str, &'a CanonicalTensor<'a>>),
}

/// A folder that is removed unless it was given its name.
struct Partial {
    folder: PathBuf,
}

/// A target has to be free: not there, or an empty folder.
pub(super) fn check_target(target: &Path) -> anyhow::Result<()> {
    let taken = |what: &str| {
        let message = format!("{} {what}: give --save-path a folder that is not there yet", target.display());
        Err(Failure::new(Exit::Usage, message).into())
    };
    match fs::read_dir(target) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                taken("is there and not empty")
            } else {
                Ok(())
            }
        }
        Err(_) if target.exists() => taken("is there and no folder that can be read"),
        Err(_) if target.file_name().is_none() => taken("is no name for a folder"),
        Err(_) => Ok(()),
    }
}

impl<'a> Output<'a> {
    /// Looks whether there is room, and makes the folder to write to.
    pub(super) fn begin(target: &'a Path, base: &'a Base, plan: &'a FusePlan<'a>) -> anyhow::Result<Self> {
        let small_files = small_files(&base.folder).with_context(|| format!("cannot read {}", base.folder.display()))?;
        let weights = match plan {
            FusePlan::AsPublished(rewrites) => Weights::Copies(rewrites),
            FusePlan::Canonical(tensors) => {
                let of =
                    |tensor: &CanonicalTensor| ShardTensor { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() };
                let by_name = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
                Weights::Shards(plan_shards(tensors.iter().map(of).collect(), SHARD_BYTES_MAX), by_name)
            }
        };
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let needed = weights.bytes(base) + small_files.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let free = free_disk_bytes(parent).with_context(|| format!("cannot look at the disk of {}", parent.display()))?;
        if needed > free {
            let message = format!(
                "the fused model needs {} in {}, {} are free: free some space, or give --save-path on a larger disk",
                Bytes(needed),
                parent.display(),
                Bytes(free)
            );
            return Err(Failure::new(Exit::Resources, message).into());
        }
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = Partial::create(parent.join(format!(".{name}.{}.partial", std::process::id())))?;
        Ok(Self { target, partial, base, small_files, weights })
    }

    /// Of the weight files.
    pub(super) fn bytes(&self) -> u64 {
        self.weights.bytes(self.base)
    }

    /// Writes everything and gives the folder its name. `progress` is told bytes of weights as they are there.
    pub(super) fn write(
        self,
        adapter: &Path,
        tensors: &WeightIndex,
        stop: &CancellationToken,
        progress: &dyn Fn(u64),
    ) -> anyhow::Result<()> {
        let folder = &self.partial.folder;
        for (path, _) in &self.small_files {
            copy(path, folder)?;
        }
        let base = Checkpoint { folder: &self.base.folder, index: &self.base.index };
        let mut fusion = Fusion::new(base, Checkpoint { folder: adapter, index: tensors });
        match &self.weights {
            Weights::Copies(rewrites) => self.write_copies(rewrites, &mut fusion, stop, progress)?,
            Weights::Shards(shards, by_name) => {
                let config = dequantised(&self.base.description.config)?;
                write_file(&folder.join(CONFIG_FILE), config.as_bytes())?;
                write_shards(folder, shards, by_name, &mut fusion, stop, progress)?;
            }
        }
        for entry in fs::read_dir(folder)? {
            File::open(entry?.path())?.sync_all()?;
        }
        self.partial.keep_as(self.target)
    }

    fn write_copies(
        &self,
        rewrites: &[Rewrite],
        fusion: &mut Fusion,
        stop: &CancellationToken,
        progress: &dyn Fn(u64),
    ) -> anyhow::Result<()> {
        let folder = &self.partial.folder;
        for (file, of) in &self.base.description.files {
            go_on(stop)?;
            copy(&self.base.folder.join(file), folder)?;
            progress(of.header.file_bytes);
        }
        for rewrite in rewrites {
            go_on(stop)?;
            fusion.rewrite(rewrite, folder)?;
        }
        if !folder.join(WEIGHT_INDEX_FILE).exists() {
            let tensors = &self.base.index.tensors;
            let text = weight_index_file(tensors.iter().map(|(name, entry)| (name.as_str(), entry.file.as_str(), entry.bytes)));
            write_file(&folder.join(WEIGHT_INDEX_FILE), text.as_bytes())?;
        }
        Ok(())
    }
}

impl Weights<'_> {
    fn bytes(&self, base: &Base) -> u64 {
        match self {
            Weights::Copies(_) => base.description.files.values().map(|file| file.header.file_bytes).sum(),
            Weights::Shards(shards, _) => {
                shards.iter().map(|shard| shard.head.len() as u64 + shard.tensors.iter().map(ShardTensor::bytes).sum::<u64>()).sum()
            }
        }
    }
}

fn write_shards(
    folder: &Path,
    shards: &[Shard],
    by_name: &BTreeMap<&str, &CanonicalTensor>,
    fusion: &mut Fusion,
    stop: &CancellationToken,
    progress: &dyn Fn(u64),
) -> anyhow::Result<()> {
    for Shard { file, head, tensors } in shards {
        let path = folder.join(file);
        let unwritten = || format!("cannot write {}", path.display());
        let mut out = BufWriter::new(File::create(&path).with_context(unwritten)?);
        out.write_all(head).with_context(unwritten)?;
        for tensor in tensors {
            go_on(stop)?;
            let planned =
                by_name.get(tensor.name.as_str()).with_context(|| format!("`{}` was not planned; please report this", tensor.name))?;
            fusion.write(planned, file, &mut out)?;
            progress(tensor.bytes());
        }
        out.flush().with_context(unwritten)?;
    }
    let placed =
        shards.iter().flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor.name.as_str(), shard.file.as_str(), tensor.bytes())));
    write_file(&folder.join(WEIGHT_INDEX_FILE), weight_index_file(placed).as_bytes())
}

fn go_on(stop: &CancellationToken) -> anyhow::Result<()> {
    if stop.is_cancelled() { Err(interrupted()) } else { Ok(()) }
}

/// Files of the base that go along, with their sizes.
fn small_files(folder: &Path) -> std::io::Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let known = path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| SMALL_FILES.contains(&extension));
        // Files of a cache are links.
        let facts = fs::metadata(&path)?;
        let known = known && path.file_name().is_some_and(|name| name != ADAPTER_CONFIG_FILE);
        if known && facts.is_file() && facts.len() <= SMALL_FILE_BYTES_MAX {
            files.push((path, facts.len()));
        }
    }
    files.sort();
    Ok(files)
}

/// A copy that may be written to, whatever the original allows.
fn copy(from: &Path, folder: &Path) -> anyhow::Result<()> {
    let to = folder.join(from.file_name().unwrap_or_default());
    let copied = fs::copy(from, &to).and_then(|_| fs::set_permissions(&to, Permissions::from_mode(0o644)));
    copied.with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn write_file(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// A config without quantisation, sorted as mlx-lm sorts it.
fn dequantised(config: &[u8]) -> anyhow::Result<String> {
    let Value::Object(mut config) = parse_json(config)? else { anyhow::bail!("config.json is not an object") };
    if let Some(Value::Object(text)) = config.get_mut("text_config") {
        DEQUANTISED_KEYS.iter().for_each(|key| drop(text.shift_remove(*key)));
    }
    DEQUANTISED_KEYS.iter().for_each(|key| drop(config.shift_remove(*key)));
    let sorted: BTreeMap<String, Value> = config.into_iter().collect();
    Ok(format!("{:#}\n", Value::Object(Map::from_iter(sorted))))
}

impl Partial {
    fn create(folder: PathBuf) -> anyhow::Result<Self> {
        // Of a process with the same number that was killed.
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn keep_as(mut self, target: &Path) -> anyhow::Result<()> {
        // Takes the place of an empty folder too, and fails for one that was filled meanwhile.
        fs::rename(&self.folder, target).with_context(|| format!("cannot rename {} to {}", self.folder.display(), target.display()))?;
        self.folder = PathBuf::new();
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.folder.as_os_str().is_empty() {
            // Nothing more can be done about it, and the error that led here is what the user has to see.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_to_be_free() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(check_target(folder.path()).is_ok() && check_target(&folder.path().join("new")).is_ok());
        let file = folder.path().join("file");
        fs::write(&file, "x").expect("written");
        for (target, cause) in [(folder.path(), "not empty"), (&file, "no folder"), (Path::new("/.."), "folder")] {
            let message = check_target(target).expect_err("refused").to_string();
            assert!(message.contains(cause), "{message}");
        }
    }

    #[test]
    fn a_folder_that_was_not_completed_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let partial = Partial::create(folder.path().join(".x.1.partial")).expect("created");
        fs::write(partial.folder.join("half"), "x").expect("written");
        drop(partial);
        assert_eq!(fs::read_dir(folder.path()).expect("read").count(), 0);
        let target = folder.path().join("x");
        fs::create_dir(&target).expect("created");
        Partial::create(folder.path().join(".x.1.partial")).expect("created").keep_as(&target).expect("renamed");
        assert!(target.is_dir() && fs::read_dir(folder.path()).expect("read").count() == 1);
    }

    #[test]
    fn a_config_loses_its_quantisation_at_both_places() {
        let config = br#"{"b": 1, "quantization": {"bits": 4}, "quantization_config": {}, "a": Infinity, "text_config": {"quantization_config": {}, "x": 2}}"#;
        let text = dequantised(config).expect("an object");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value, serde_json::json!({"a": {"__float__": "Infinity"}, "b": 1, "text_config": {"x": 2}}));
        assert!(text.find("\"a\"") < text.find("\"b\""));
    }
}

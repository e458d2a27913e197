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
    env,
    fs::{self, File, Permissions},
    io::{self, BufWriter, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Kinds of files beside the weights that belong to a model: config, tokenizer, template, and code that Python may ask for.
const SMALL_FILES: [&str; 7] = ["json", "jinja", "txt", "model", "tiktoken", "py", "bpe"];
/// Where a model keeps templates beside the one that is used unless another is asked for.
const TEMPLATES_FOLDER: &str = "additional_chat_templates";
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

/// Where the result is renamed to in the end: `path`, or the folder that it is a link to. It has to be free, not there or an empty folder, and
/// of a kind that a folder can take the place of; else all the work would be for nothing.
pub(super) fn free_target(path: &Path) -> anyhow::Result<PathBuf> {
    let refused = |what: &str| -> anyhow::Result<PathBuf> {
        let message = format!("{} {what}: give --save-path a folder that is not there yet", path.display());
        Err(Failure::new(Exit::Usage, message).into())
    };
    // Without what may stand behind the name, as in `name/.`: a link would be followed.
    let named = path.file_name().map(|name| parent(path).join(name));
    match fs::symlink_metadata(named.as_deref().unwrap_or(path)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return named.map_or_else(|| refused("is no name for a folder"), Ok),
        Err(error) => return refused(&format!("cannot be a folder ({error})")),
    }
    let Ok(target) = fs::canonicalize(path) else { return refused("is a link to nothing that is there") };
    let Ok(mut entries) = fs::read_dir(&target) else { return refused("is there and no folder that can be read") };
    if entries.next().is_some() {
        return refused("is there and not empty");
    }
    let current = env::current_dir().and_then(fs::canonicalize).ok();
    match fixed(&target, current.as_deref()).with_context(|| format!("cannot read {}", target.display()))? {
        Some(what) => refused(&format!("is {what}, whose place no other folder can take")),
        None => Ok(target),
    }
}

/// What keeps a folder where it is.
fn fixed(folder: &Path, current: Option<&Path>) -> io::Result<Option<&'static str>> {
    if current == Some(folder) {
        return Ok(Some("the current folder"));
    }
    let Some(parent) = folder.parent() else { return Ok(Some("the root of a disk")) };
    let is_mount_point = fs::metadata(folder)?.dev() != fs::metadata(parent)?.dev();
    Ok(is_mount_point.then_some("where a disk is mounted"))
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl<'a> Output<'a> {
    /// Looks whether there is room, and makes the folder to write to.
    pub(super) fn begin(target: &'a Path, base: &'a Base, plan: &'a FusePlan<'a>) -> anyhow::Result<Self> {
        let small_files = small_files(&base.folder)?;
        let weights = match plan {
            FusePlan::AsPublished(rewrites) => Weights::Copies(rewrites),
            FusePlan::Canonical(tensors) => {
                let of =
                    |tensor: &CanonicalTensor| ShardTensor { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone() };
                let by_name = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
                Weights::Shards(plan_shards(tensors.iter().map(of).collect(), SHARD_BYTES_MAX), by_name)
            }
        };
        let parent = parent(target);
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
        let partial = Partial::create(parent)?;
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
            copy(&self.base.folder, path, folder)?;
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
        sync(folder)?;
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
            copy(&self.base.folder, Path::new(file), folder)?;
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

/// Files of the base that go along, by their path in it, with their sizes.
fn small_files(base: &Path) -> anyhow::Result<Vec<(PathBuf, u64)>> {
    let unread = |path: &Path| format!("cannot read {}", path.display());
    let mut files = Vec::new();
    for part in [Path::new(""), Path::new(TEMPLATES_FOLDER)] {
        let folder = base.join(part);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && part == Path::new(TEMPLATES_FOLDER) => continue,
            entries => entries.with_context(|| unread(&folder))?,
        };
        for entry in entries {
            let file = part.join(entry.with_context(|| unread(&folder))?.file_name());
            if !goes_along(&file) {
                continue;
            }
            // Files of a cache are links.
            let path = base.join(&file);
            let facts = fs::metadata(&path).with_context(|| unread(&path))?;
            if facts.is_file() && facts.len() <= SMALL_FILE_BYTES_MAX {
                files.push((file, facts.len()));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// By its name. What is hidden is an editor's or the system's.
fn goes_along(file: &Path) -> bool {
    let is_hidden = file.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let kind = file.extension().and_then(|extension| extension.to_str());
    !is_hidden && file != Path::new(ADAPTER_CONFIG_FILE) && kind.is_some_and(|kind| SMALL_FILES.contains(&kind))
}

/// A copy that may be written to, whatever the original allows, at the same place in the other folder.
fn copy(from: &Path, file: &Path, to: &Path) -> anyhow::Result<()> {
    let (from, to) = (from.join(file), to.join(file));
    let copied = fs::create_dir_all(parent(&to)).and_then(|()| fs::copy(&from, &to));
    let copied = copied.and_then(|_| fs::set_permissions(&to, Permissions::from_mode(0o644)));
    copied.with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Forces a folder with all that is in it to the disk.
fn sync(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => sync(&path)?,
            false => File::open(&path).and_then(|file| file.sync_all()).with_context(|| format!("cannot write {}", path.display()))?,
        }
    }
    sync_names(folder)
}

/// Makes what a folder's entries are called last, where its disk can be asked to.
fn sync_names(folder: &Path) -> anyhow::Result<()> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error) if !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Err(error).with_context(|| format!("cannot write {}", folder.display()))
        }
        _ => Ok(()),
    }
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
    /// Its name is not made of the target's, which may be as long as names can be.
    fn create(parent: &Path) -> anyhow::Result<Self> {
        let folder = parent.join(format!(".mlx-cluster-{}.partial", Uuid::new_v4().simple()));
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder })
    }

    fn keep_as(mut self, target: &Path) -> anyhow::Result<()> {
        // Takes the place of an empty folder too, and fails for one that was filled meanwhile.
        fs::rename(&self.folder, target).with_context(|| format!("cannot rename {} to {}", self.folder.display(), target.display()))?;
        self.folder = PathBuf::new();
        sync_names(parent(target))
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
    use std::os::unix::fs::symlink;

    #[test]
    fn a_target_has_to_be_free() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = fs::canonicalize(folder.path()).expect("there");
        for (target, wanted) in [("", ""), ("new", "new"), ("new/.", "new"), ("new/", "new")] {
            assert_eq!(free_target(&place.join(target)).expect("free").components().collect::<PathBuf>(), place.join(wanted));
        }
        assert_eq!(free_target(Path::new("not-there-yet")).expect("free"), Path::new("./not-there-yet"));
        let file = place.join("file");
        fs::write(&file, "x").expect("written");
        let current = env::current_dir().expect("there");
        let long = place.join("n".repeat(300));
        for (target, cause) in [
            (&*place, "not empty"),
            (&file, "no folder"),
            (&file.join("below"), "cannot be a folder"),
            (&long, "cannot be a folder"),
            (Path::new("/.."), "folder"),
            (&place.join("new/.."), "no name"),
            (&current, "folder"),
        ] {
            let message = free_target(target).expect_err("refused").to_string();
            assert!(message.contains(cause) && message.contains("--save-path"), "{message}");
        }
    }

    #[test]
    fn a_link_leads_to_its_folder_and_one_to_nothing_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let (target, link, dangling) = (folder.path().join("target"), folder.path().join("link"), folder.path().join("dangling"));
        fs::create_dir(&target).expect("created");
        symlink(&target, &link).expect("linked");
        symlink(folder.path().join("gone"), &dangling).expect("linked");
        let target = fs::canonicalize(target).expect("there");
        for link in [link.clone(), link.join("")] {
            assert_eq!(free_target(&link).expect("free"), target);
        }
        for link in [dangling.clone(), dangling.join("")] {
            let message = free_target(&link).expect_err("refused").to_string();
            assert!(message.contains("link to nothing"), "{message}");
        }
    }

    #[test]
    fn the_current_folder_and_a_mount_point_stay_where_they_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let place = folder.path();
        let what = |folder: &Path| fixed(folder, Some(place)).expect("there");
        assert_eq!(what(place), Some("the current folder"));
        // It is mounted on every system.
        assert_eq!(what(Path::new("/dev")), Some("where a disk is mounted"));
        fs::create_dir(place.join("new")).expect("created");
        assert_eq!((what(Path::new("/")), what(&place.join("new"))), (Some("the root of a disk"), None));
    }

    #[test]
    fn a_folder_that_was_not_completed_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let partial = Partial::create(folder.path()).expect("created");
        fs::write(partial.folder.join("half"), "x").expect("written");
        drop(partial);
        assert_eq!(fs::read_dir(folder.path()).expect("read").count(), 0);
        // As long as a name can be.
        let target = folder.path().join("n".repeat(255));
        fs::create_dir(&target).expect("created");
        Partial::create(folder.path()).expect("created").keep_as(&target).expect("renamed");
        assert!(target.is_dir() && fs::read_dir(folder.path()).expect("read").count() == 1);
    }

    #[test]
    fn what_belongs_to_the_base_goes_along_and_dangling_links_of_others_do_not_matter() {
        let folder = tempfile::tempdir().expect("a folder");
        let (base, copied) = (folder.path().join("base"), folder.path().join("copied"));
        fs::create_dir_all(base.join(TEMPLATES_FOLDER)).expect("created");
        fs::create_dir(&copied).expect("created");
        let wanted = ["additional_chat_templates/tools.jinja", "config.json", "vocab.bpe"];
        for file in wanted.iter().chain(&[ADAPTER_CONFIG_FILE, "model.safetensors", ".hidden.json"]) {
            fs::write(base.join(file), "x").expect("written");
        }
        for lock in [".#lock", ".#config.json", "notes"] {
            symlink("nobody@nowhere", base.join(lock)).expect("linked");
        }
        let files = small_files(&base).expect("read");
        assert_eq!(files, wanted.map(|file| (PathBuf::from(file), 1)));
        files.iter().for_each(|(file, _)| copy(&base, file, &copied).expect("copied"));
        sync(&copied).expect("written");
        assert!(wanted.iter().all(|file| copied.join(file).is_file()));
        symlink("nothing", base.join("tokenizer.json")).expect("linked");
        let message = small_files(&base).expect_err("refused").to_string();
        assert!(message.contains("cannot read") && message.contains("tokenizer.json"), "{message}");
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

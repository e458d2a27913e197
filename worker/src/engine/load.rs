//! From a folder of files to a shard that is ready to step.

use super::{boot::Boot, ranks};
use mlx_cluster_common::{
    architectures::read_spec,
    config::parse_json,
    engine::ModelSource,
    spec::ModelSpec,
    tensor::{check_cover, rank_model},
    weights::{WeightIndex, WeightMap},
};
use mlx_cluster_lm::{LmError, group::Group, probe, shard::Shard, weights::Weights};
use std::{
    fs::File,
    time::{Duration, Instant},
};

/// Progress is reported this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Longest wait for other engines of this machine that warm up.
const WARM_UP_WAIT: Duration = Duration::from_secs(60);

/// A shard that is ready to step, and its place in the group of its stage, which forms later.
pub(super) struct Loaded {
    pub(super) shard: Shard,
    /// None when it is alone.
    pub(super) group: Option<Group>,
    /// See [`ModelSpec::part_multiple`].
    pub(super) part_multiple: u32,
}

/// What the model consists of, as far as this node has it.
pub(super) struct Opened {
    pub(super) spec: ModelSpec,
    pub(super) index: WeightIndex,
    pub(super) map: WeightMap,
}

impl Opened {
    /// An error is a sentence; trying again would not help.
    pub(super) fn open(boot: &Boot) -> Result<Self, String> {
        let folder = &boot.folder;
        let text = std::fs::read(folder.join("config.json"))
            .map_err(|error| format!("cannot read config.json in {}: {error}", folder.display()))?;
        let config = parse_json(&text).map_err(|error| format!("config.json in {} is not JSON: {error}", folder.display()))?;
        let spec = read_spec(&config).map_err(|error| error.to_string())?;
        let (index, map) = read_weight_map(boot, &spec, &text)?;
        Ok(Self { spec, index, map })
    }
}

/// Reads, checks and builds. `progress` is told bytes done and bytes in all. An error is a sentence; trying again would not help.
pub(super) fn load(boot: &Boot, mut progress: impl FnMut(u64, u64)) -> Result<Loaded, String> {
    if let Some(missing) = ranks::missing(&boot.spec) {
        return Err(missing);
    }
    let Opened { spec, index, map } = Opened::open(boot)?;
    let parts = spec.parts_of(boot.spec.layers.clone());
    let place = &boot.spec.place;
    check_cover(&spec, &map, &parts, &place.shares).map_err(|error| error.to_string())?;
    let rank = rank_model(&spec, &map, place).map_err(|error| error.to_string())?;
    let total = rank.weights.bytes(&parts);
    let mut last = Instant::now();
    let weights = Weights::load(&boot.folder, &index, &rank.weights, &parts, |done| {
        if last.elapsed() >= PROGRESS_INTERVAL || done == total {
            last = Instant::now();
            progress(done, total);
        }
    });
    let weights = weights.map_err(|error| error.to_string())?;
    let group = (!place.is_alone()).then(|| Group::new(place.clone()));
    let weights = match &group {
        Some(group) => weights.of_rank(rank.split, group.clone()),
        None => weights,
    };
    let shard = Shard::new(&rank.spec, boot.spec.layers.clone(), weights, &boot.spec.caches);
    let mut shard = shard.map_err(|error| error.to_string())?;
    if let Err(error) = prepare(boot, &mut shard) {
        tracing::warn!(%error, "decode steps run uncompiled on this machine (on Linux, MLX needs a C++ compiler at run time)");
        shard.disable_compilation();
    }
    Ok(Loaded { shard, group, part_multiple: spec.part_multiple() })
}

/// Warms up, or, where that takes other ranks, finds out whether anything can be compiled here.
fn prepare(boot: &Boot, shard: &mut Shard) -> Result<(), LmError> {
    if !boot.spec.place.is_alone() {
        return probe::compile();
    }
    let _alone = alone_on_this_machine();
    shard.warm_up()
}

/// MLX keeps compiled CPU kernels as files in the temporary folder, and a process that loads one while another still writes it fails: so
/// engines of one machine warm up one after the other (those of groups, which warm up together, have a folder each). Whoever cannot have the lock in time goes on without it.
fn alone_on_this_machine() -> Option<File> {
    let file = File::create(std::env::temp_dir().join("mlx-cluster-warm-up.lock")).ok()?;
    let start = Instant::now();
    while start.elapsed() < WARM_UP_WAIT {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    None
}

/// What the model consists of, as far as this node has it. All files of a folder are here, and all tensors have to find their place. Of a
/// hub repository only this shard's files are here; the worker compared the whole of it when it fetched them.
fn read_weight_map(boot: &Boot, spec: &ModelSpec, config: &[u8]) -> Result<(WeightIndex, WeightMap), String> {
    match &boot.spec.model {
        ModelSource::Folder(_) => {
            let index = mlx_cluster_hub::folder_weight_index(&boot.folder).map_err(|error| error.to_string())?;
            if index.fingerprint(config) != boot.spec.fingerprint {
                let (name, folder) = (&boot.node_name, boot.folder.display());
                return Err(format!(
                    "the model in {folder} on {name} is not the one that the coordinator sees: copy the same files to every worker"
                ));
            }
            let map = WeightMap::assign(spec, &index).map_err(|error| error.to_string())?;
            Ok((index, map))
        }
        ModelSource::Repo { .. } => {
            let index = mlx_cluster_hub::partial_weight_index(&boot.folder).map_err(|error| error.to_string())?;
            let parts = spec.parts_of(boot.spec.layers.clone());
            let map = WeightMap::assign_parts(spec, &index, &parts).map_err(|error| error.to_string())?;
            Ok((index, map))
        }
    }
}

//! From a folder of files to a shard that is ready to step.

use super::boot::Boot;
use mlx_cluster_common::{
    architectures::read_spec,
    engine::ModelSource,
    spec::ModelSpec,
    weights::{WeightIndex, WeightMap},
};
use mlx_cluster_hub::{HubSettings, ModelRef, ModelRefError, RepoRef, Snapshot};
use mlx_cluster_lm::{shard::Shard, weights::Weights};
use std::time::{Duration, Instant};

/// Progress is reported this often.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Reads, checks and builds. `progress` is told bytes done and bytes in all. An error is a sentence; trying again would not help.
pub(super) fn load(boot: &Boot, mut progress: impl FnMut(u64, u64)) -> Result<(Shard, ModelSpec), String> {
    let folder = &boot.folder;
    let text =
        std::fs::read(folder.join("config.json")).map_err(|error| format!("cannot read config.json in {}: {error}", folder.display()))?;
    let config = serde_json::from_slice(&text).map_err(|error| format!("config.json in {} is not JSON: {error}", folder.display()))?;
    let spec = read_spec(&config).map_err(|error| error.to_string())?;
    let index = read_index(boot)?;
    if index.fingerprint(&text) != boot.spec.fingerprint {
        let (name, folder) = (&boot.node_name, folder.display());
        return Err(format!(
            "the model in {folder} on {name} is not the one that the coordinator sees: copy the same files to every worker"
        ));
    }
    let map = WeightMap::assign(&spec, &index).map_err(|error| error.to_string())?;
    let parts = spec.parts_of(boot.spec.layers.clone());
    let total = map.bytes(&parts);
    let mut last = Instant::now();
    let weights = Weights::load(folder, &index, &map, &parts, |done| {
        if last.elapsed() >= PROGRESS_INTERVAL || done == total {
            last = Instant::now();
            progress(done, total);
        }
    });
    let mut shard =
        Shard::new(&spec, boot.spec.layers.clone(), weights.map_err(|error| error.to_string())?).map_err(|error| error.to_string())?;
    if let Err(error) = shard.warm_up() {
        tracing::warn!(%error, "decode steps run uncompiled on this machine (on Linux, MLX needs a C++ compiler at run time)");
        shard.disable_compilation();
    }
    Ok((shard, spec))
}

/// All headers of the model. Of a hub repository only this shard's files are here: the other headers are read from the hub.
fn read_index(boot: &Boot) -> Result<WeightIndex, String> {
    match &boot.spec.model {
        ModelSource::Folder(_) => mlx_cluster_hub::folder_weight_index(&boot.folder).map_err(|error| error.to_string()),
        ModelSource::Repo { id, revision } => {
            let repo: RepoRef = format!("{id}@{revision}").parse().map_err(|error: ModelRefError| error.to_string())?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
            runtime.block_on(async {
                let snapshot =
                    Snapshot::attach(&ModelRef::Repo(repo), &HubSettings::from_env()).await.map_err(|error| error.to_string())?;
                snapshot.weight_index().await.map_err(|error| error.to_string())
            })
        }
    }
}

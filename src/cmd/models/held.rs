//! `mlx-cluster models list`, `remove` and `verify`: what this machine has of models, in the weight stores of its workers and in the cache
//! that all tools share.

use crate::{
    failure::{Exit, Failure},
    home::home,
};
use mlx_cluster_common::units::Bytes;
use mlx_cluster_hub::{Descriptions, HeldModel, HubSettings, ModelStore, RepoRef, cached_models, damaged_blobs, held_models};
use mlx_cluster_worker::supervisor::weight_stores;
use serde_json::json;
use std::{path::PathBuf, time::Duration};

/// A worker that fetches just now is not waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// List the models of which this machine has weights, with their sizes.
#[derive(clap::Args)]
pub(super) struct ListArgs {
    /// One JSON object a line: model, commit, place, bytes, of_bytes, folder
    #[arg(long)]
    json: bool,
}

/// Remove a model from the weight store; with --cache also from the cache that all Hugging Face tools share.
#[derive(clap::Args)]
pub(super) struct RemoveArgs {
    /// owner/name, or owner/name@commit for one commit
    model: RepoRef,
    /// Remove it from the shared cache too, where other programs may use it
    #[arg(long)]
    cache: bool,
}

/// Read all weights and compare them with the digests that were noted when they came.
#[derive(clap::Args)]
pub(super) struct VerifyArgs {
    /// owner/name, or owner/name@commit; all models unless given
    model: Option<RepoRef>,
}

/// Where weights are.
enum Place {
    /// Of the worker of this number.
    Store {
        number: u32,
        root: PathBuf,
    },
    Cache,
}

struct Entry {
    place: Place,
    held: HeldModel,
}

/// Everything, or what belongs to one model.
fn entries(of: Option<&RepoRef>) -> anyhow::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (number, root) in weight_stores(&home()?) {
        entries.extend(held_models(&root).into_iter().map(|held| Entry { place: Place::Store { number, root: root.clone() }, held }));
    }
    let cached = cached_models(&HubSettings::from_env());
    entries.extend(cached.into_iter().map(|held| Entry { place: Place::Cache, held }));
    let wanted = |entry: &Entry| {
        of.is_none_or(|of| of.id() == entry.held.repo.id() && of.commit().is_none_or(|commit| commit == entry.held.repo.revision()))
    };
    entries.retain(wanted);
    Ok(entries)
}

impl Entry {
    fn place(&self) -> String {
        match &self.place {
            Place::Store { number: 1, .. } => "weight store".to_owned(),
            Place::Store { number, .. } => format!("weight store {number}"),
            Place::Cache => "shared cache".to_owned(),
        }
    }

    fn store(&self) -> Option<ModelStore> {
        match &self.place {
            Place::Store { root, .. } => ModelStore::new(root, &self.held.repo),
            Place::Cache => None,
        }
    }
}

pub(super) fn list(args: &ListArgs) -> anyhow::Result<()> {
    let descriptions = Descriptions::of_home(&home()?);
    let entries = entries(None)?;
    let width = entries.iter().map(|entry| entry.held.repo.id().len()).max().unwrap_or(0);
    for entry in &entries {
        let HeldModel { repo, folder, bytes } = &entry.held;
        let whole = descriptions.read(repo).map(|of| of.files.values().map(|file| file.header.file_bytes).sum::<u64>());
        if args.json {
            let (place, commit) = (entry.place(), repo.revision());
            println!(
                "{}",
                json!({"model": repo.id(), "commit": commit, "place": place, "bytes": bytes, "of_bytes": whole, "folder": folder})
            );
            continue;
        }
        let of = whole.map(|whole| format!(" of {}", Bytes(whole))).unwrap_or_default();
        println!("{:width$}  {}  {:14}  {}{of}", repo.id(), &repo.revision()[..8], entry.place(), Bytes(*bytes));
    }
    if entries.is_empty() && !args.json {
        println!("no weights on this machine; `mlx-cluster models pull OWNER/NAME` fetches some");
    }
    Ok(())
}

pub(super) async fn remove(args: &RemoveArgs) -> anyhow::Result<()> {
    let (mut removed, mut left) = (Bytes(0), false);
    for entry in entries(Some(&args.model))? {
        match entry.store() {
            Some(store) => {
                let _lock = store.lock(LOCK_PATIENCE).await?;
                std::fs::remove_dir_all(&entry.held.folder)?;
            }
            None if args.cache => mlx_cluster_hub::remove_cached(&HubSettings::from_env(), &entry.held.repo)?,
            None => {
                left = true;
                continue;
            }
        }
        removed = removed + Bytes(entry.held.bytes);
        println!("removed {} from the {}: {}", entry.held.repo, entry.place(), Bytes(entry.held.bytes));
    }
    Descriptions::of_home(&home()?).forget(&args.model)?;
    match (removed, left) {
        (Bytes(0), false) => Err(not_here(&args.model).into()),
        (Bytes(0), true) => {
            let message =
                format!("{} is in the shared cache only, where other programs may use it: add --cache to remove it there", args.model);
            Err(Failure::new(Exit::Usage, message).into())
        }
        _ => Ok(()),
    }
}

pub(super) fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let descriptions = Descriptions::of_home(&home()?);
    let (entries, mut damage) = (entries(args.model.as_ref())?, Vec::new());
    for entry in &entries {
        let repo = &entry.held.repo;
        let damaged = match entry.store() {
            Some(store) => match descriptions.read(repo) {
                Some(description) => store.verify(&description)?,
                None => {
                    println!("{repo} in the {}: cannot be checked, since it is not known here what it consists of", entry.place());
                    continue;
                }
            },
            None => damaged_blobs(&entry.held.folder)?,
        };
        match damaged.first() {
            None => println!("{repo} in the {}: {} as they came", entry.place(), Bytes(entry.held.bytes)),
            Some(first) => {
                println!("{repo} in the {}: {} damaged, the first is {first}", entry.place(), damaged.len());
                damage.push(repo.id());
            }
        }
    }
    match (damage.first(), &args.model) {
        (Some(repo), _) => {
            let message = format!("weights of {repo} are damaged: `mlx-cluster models remove {repo}`, then pull or serve it again");
            Err(Failure::new(Exit::BadFile, message).into())
        }
        (None, Some(model)) if entries.is_empty() => Err(not_here(model).into()),
        (None, _) => Ok(()),
    }
}

fn not_here(model: &RepoRef) -> Failure {
    Failure::new(Exit::BadFile, format!("nothing of {model} is on this machine: see `mlx-cluster models list`"))
}

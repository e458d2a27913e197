//! An engine that trains its layers: told what to do by a job of the coordinator (`orders`), in exchange with the stages beside it (`exchange`).
//!
//! One thread owns every array (`owner`); tasks around it move messages. What is under way belongs to an epoch, and is dropped with it.

mod exchange;
mod owner;
mod schedule;
mod service;
mod tensors;

use super::{
    boot::{Boot, BootLine},
    load::Opened,
    ranks::{self, Ranks, Seat},
    run::{end_lost, listen_and_serve, say},
    watchdog::Watchdog,
};
use exchange::Passages;
use mlx_cluster_common::{
    engine::EngineSpec,
    ids::Epoch,
    tensor::{TensorPlace, check_cover, rank_model},
    training::{Parallel, TrainingRole},
};
use mlx_cluster_lm::{
    group::Group,
    tuner::{Source, stage::TrainedStage},
};
use mlx_cluster_proto::wire::{self, engine_server::EngineServer, trainer_server::TrainerServer};
use owner::Owner;
use ranks::Join;
use service::Service;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Progress is reported this often while loading.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Orders and reports that wait.
const CHANNEL: usize = 64;

/// What the tasks hand to the thread that owns the arrays.
enum Control {
    /// A new epoch: `next` is the stage after this one.
    Link { epoch: Epoch, next: Option<Passages>, join: Option<Join> },
    /// The stage before this one has connected.
    Before { epoch: Epoch, passages: Passages },
    /// A job feeds this engine from now on.
    Open { epoch: Epoch, orders: mpsc::Receiver<wire::train_order::Order>, reports: mpsc::Sender<wire::TrainReport> },
}

/// A stage that is ready to be trained, and its place among others, which forms later.
struct Loaded {
    stage: TrainedStage,
    group: Option<Group>,
}

/// Loads and trains until stdin closes. An error is a sentence, with the exit code of the process.
pub(super) fn run(boot: Boot, role: TrainingRole) -> Result<(), (String, u8)> {
    let loaded = load(&boot, &role).map_err(|cause| (cause, 3))?;
    serve(boot, loaded).map_err(|cause| (cause, 4))
}

fn load(boot: &Boot, role: &TrainingRole) -> Result<Loaded, String> {
    let own = &boot.spec;
    if let Some(missing) = ranks::missing(own) {
        return Err(missing);
    }
    let Opened { spec, index, map } = Opened::open(boot)?;
    spec.trained(&map, &role.fine_tune, role.num_layers).map_err(|error| error.to_string())?;
    // The planner makes no such plan.
    if own.n_stages > 1 && role.trains_tied_embedding(&spec, &map) {
        return Err(format!(
            "factors of `{}` are those of the head too, and the two would be on different stages: leave it out of `keys`, or take --strategy data",
            spec.embedding.path
        ));
    }
    let parts = spec.parts_of(own.layers.clone());
    let is_split = role.parallel == Parallel::Tensor && !own.place.is_alone();
    let place = if is_split { own.place.clone() } else { TensorPlace::alone() };
    check_cover(&spec, &map, &parts, &place.shares).map_err(|error| error.to_string())?;
    let rank = rank_model(&spec, &map, &place).map_err(|error| error.to_string())?;
    let total = rank.weights.bytes(&parts);
    let group = (!own.place.is_alone()).then(|| Group::new(own.place.clone()));
    let source = Source {
        folder: &boot.folder,
        index: &index,
        spec: &spec,
        weights: &map,
        rank,
        layers: own.layers.clone(),
        role: role.clone(),
        group: group.clone(),
        is_split,
    };
    let mut last = Instant::now();
    let stage = source.load(|done_bytes| {
        if last.elapsed() >= PROGRESS_INTERVAL || done_bytes == total {
            last = Instant::now();
            say(&BootLine::Loading { done_bytes, total_bytes: total });
        }
    });
    Ok(Loaded { stage: stage.map_err(|error| error.to_string())?, group })
}

fn serve(boot: Boot, loaded: Loaded) -> Result<(), String> {
    let Loaded { stage, group } = loaded;
    let spec: EngineSpec = boot.spec.clone();
    let is_alone = spec.place.is_alone();
    let watchdog = if is_alone { Watchdog::idle() } else { Watchdog::start(spec.place.rank, end_lost) };
    let (control, receiver) = mpsc::channel(CHANNEL);
    let (progress, progressed) = watch::channel(0);
    let service = Service::new(control, spec.clone(), watchdog.clone(), progressed, boot.node_name.clone());
    let seat = (!is_alone).then(|| Seat::take(boot.listen.ip())).transpose();
    let seat = seat.map_err(|error| format!("cannot keep a port of {} for the group: {error}", boot.listen.ip()))?;
    let group_port = seat.as_ref().map_or(0, |seat| seat.port);
    let limit = mlx_cluster_proto::net::MESSAGE_BYTES_MAX;
    let trainer = TrainerServer::new(service.clone()).max_decoding_message_size(limit).max_encoding_message_size(limit);
    let runtime =
        listen_and_serve(boot.listen, group_port, |mut server| server.add_service(EngineServer::new(service)).add_service(trainer))?;
    let ranks = Ranks::new(group, spec.collective, seat, watchdog);
    Owner::new(stage, ranks, spec, runtime.handle().clone(), receiver, progress, boot.node_name).run();
    Ok(())
}

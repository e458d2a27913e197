//! `GET /v1/cluster`: everything that the coordinator knows of its cluster, for `mlx-cluster status`.

use super::{Api, adapters::adapter_json, health::cause};
use crate::serving::{ClusterStatus, EngineOn, InstanceState, JobStatus, WorkerStatus};
use axum::{Json, extract::State};
use mlx_cluster_common::{
    VERSION,
    engine::EngineState,
    ids::NodeId,
    links::{LinkFacts, best_first},
    plan::{Plan, Rank, Stage},
};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn cluster(State(api): State<Arc<Api>>) -> Json<Value> {
    let status = api.status();
    let ClusterStatus { cluster, instance, plan, adapters, jobs, workers, links, load, join_addresses } = &*status;
    let model = api.served_model().map(
        |model| json!({"id": model.id, "context_tokens": model.context_tokens, "vocab_size": model.vocab_size, "created": model.created}),
    );
    Json(json!({
        "cluster": cluster,
        "version": VERSION,
        "instance": instance_json(instance, &status),
        "model": model,
        "plan": plan.as_ref().map(plan_json),
        "adapters": adapters.iter().map(adapter_json).collect::<Vec<_>>(),
        "jobs": jobs.iter().map(|job| job_json(job, &status)).collect::<Vec<_>>(),
        "workers": workers.iter().map(|worker| worker_json(worker, &status)).collect::<Vec<_>>(),
        "links": links_json(links, workers),
        "load": {
            "running": load.running,
            "waiting": load.waiting,
            "cache_tokens_used": load.cache_tokens_used,
            "cache_tokens_max": load.cache_tokens_max,
            "hop_ns": load.hop_ns,
            "prompt_hop_ns": load.prompt_hop_ns,
            "prompt_hop_bytes": load.prompt_hop_bytes,
            "tokens_per_second": api.metrics.tokens_per_second(),
        },
        "join_addresses": join_addresses,
    }))
}

fn instance_json(instance: &InstanceState, status: &ClusterStatus) -> Value {
    let mut json = json!({"state": instance.name(), "cause": cause(instance, status)});
    if let InstanceState::WaitingForWorkers { found, wanted } = instance {
        json["workers_found"] = json!(found);
        json["workers_wanted"] = json!(wanted);
    }
    json
}

fn plan_json(plan: &Plan) -> Value {
    json!({
        "model": plan.model,
        "strategy": plan.strategy,
        "context_tokens": plan.context_tokens,
        "cache_tokens": plan.cache_tokens,
        "caches": plan.caches,
        "stages": plan.stages.iter().map(stage_json).collect::<Vec<_>>(),
        "sequences": plan.sequences,
        "why": plan.why,
        "prediction": plan.prediction,
        "alternatives": plan.alternatives,
        "text": plan.to_string(),
    })
}

fn job_json(job: &JobStatus, status: &ClusterStatus) -> Value {
    let JobStatus { instance, model, state, plan } = job;
    json!({
        "number": instance,
        "model": model,
        "instance": instance_json(state, status),
        "plan": plan.as_ref().map(plan_json),
    })
}

/// Layers from `first_layer` to `last_layer`, both included.
fn stage_json(stage: &Stage) -> Value {
    json!({
        "first_layer": stage.layers.start,
        "last_layer": stage.layers.end.saturating_sub(1),
        "ranks": stage.ranks.iter().map(rank_json).collect::<Vec<_>>(),
    })
}

fn rank_json(rank: &Rank) -> Value {
    json!({
        "worker": rank.node_name,
        "worker_id": rank.node,
        "share": rank.share,
        "weights_bytes": rank.weights,
        "cache_bytes": rank.cache,
        "working_bytes": rank.working,
        "needed_bytes": rank.needed(),
        "usable_bytes": rank.usable,
    })
}

/// The served model's part of it under the names of a worker, and the engines of all that runs there under `engines`.
fn worker_json(worker: &WorkerStatus, status: &ClusterStatus) -> Value {
    let facts = &worker.facts;
    let mut json = json!({
        "id": facts.id,
        "name": facts.name,
        "version": facts.version,
        "os": facts.os,
        "chip": facts.chip,
        "addresses": facts.addresses,
        "connected": worker.connected,
        "usable_memory_bytes": facts.usable_memory,
        "total_memory_bytes": facts.total_memory,
        "memory_bandwidth_bytes_per_s": facts.memory_bandwidth,
        "matmul_flops_per_s": facts.matmul_rate,
        "engine": worker.served_engine().map(engine_json),
        "engines": worker.engines.iter().map(|engine| engine_on_json(engine, &facts.id, status)).collect::<Vec<_>>(),
    });
    let served = place_json(status.plan.as_ref(), &facts.id);
    served.into_iter().for_each(|(name, value)| json[name] = value);
    json
}

/// An engine with its part of the model; `job` is null for the served one.
fn engine_on_json(engine: &EngineOn, node: &NodeId, status: &ClusterStatus) -> Value {
    let job = status.jobs.iter().find(|job| job.instance == engine.instance);
    let plan = job.map_or(status.plan.as_ref(), |job| job.plan.as_ref());
    let mut json = engine_json(&engine.state);
    json["job"] = json!(job.map(|job| job.instance));
    place_json(plan, node).into_iter().for_each(|(name, value)| json[name] = value);
    json
}

/// What a plan has a worker hold; nulls when it is not in the plan.
fn place_json(plan: Option<&Plan>, node: &NodeId) -> [(&'static str, Value); 6] {
    let stages = plan.into_iter().flat_map(|plan| &plan.stages);
    let places = stages.flat_map(|stage| (0..).zip(&stage.ranks).map(move |(number, rank): (u32, _)| (stage, number, rank)));
    let place = places.into_iter().find(|(_, _, rank)| rank.node == *node);
    let stage = place.map(|(stage, ..)| stage);
    [
        ("first_layer", json!(stage.map(|stage| stage.layers.start))),
        ("last_layer", json!(stage.map(|stage| stage.layers.end.saturating_sub(1)))),
        ("rank", json!(place.map(|(_, number, _)| number))),
        ("ranks", json!(stage.map(|stage| stage.ranks.len()))),
        ("share", json!(place.map(|(_, _, rank)| rank.share))),
        ("share_of", json!(stage.map(|stage| stage.shares().iter().sum::<u32>()))),
    ]
}

/// Pair by pair, the way that is taken first.
fn links_json(links: &[LinkFacts], workers: &[WorkerStatus]) -> Vec<Value> {
    let ids = || workers.iter().map(|worker| &worker.facts.id);
    let pairs = ids().flat_map(|from| ids().map(move |to| (from, to)));
    let ways = pairs.flat_map(|(from, to)| best_first(links, from, to).into_iter().enumerate());
    ways.map(|(place, link)| link_json(link, place == 0, workers)).collect()
}

fn link_json(link: &LinkFacts, is_chosen: bool, workers: &[WorkerStatus]) -> Value {
    let name = |node: &NodeId| workers.iter().find(|worker| worker.facts.id == *node).map(|worker| &worker.facts.name);
    json!({
        "from": name(&link.from),
        "from_id": link.from,
        "to": name(&link.to),
        "to_id": link.to,
        "address": link.address,
        "interface": link.interface,
        "medium": link.medium,
        "round_trip_seconds": link.round_trip_seconds,
        "bytes_per_second": link.bytes_per_second,
        "chosen": is_chosen,
    })
}

fn engine_json(engine: &EngineState) -> Value {
    match engine {
        EngineState::Fetching { file, done, total } => {
            json!({"state": "fetching", "file": file, "done_bytes": done, "total_bytes": total})
        }
        EngineState::Loading { done, total } => json!({"state": "loading", "done_bytes": done, "total_bytes": total}),
        EngineState::Ready { port, group_port, incarnation, resident } => {
            let group_port = Some(group_port).filter(|port| **port > 0);
            json!({"state": "ready", "port": port, "group_port": group_port, "incarnation": incarnation, "resident_bytes": resident})
        }
        EngineState::Failed { cause, output, retry_in_ms, lost } => {
            json!({"state": "failed", "cause": cause, "output": output, "retry_in_ms": retry_in_ms, "lost": lost})
        }
    }
}

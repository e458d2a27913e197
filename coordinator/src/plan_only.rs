//! What would happen: a plan without any engine, over the workers that are there or over machines that somebody may buy.

use crate::{
    cluster_file::ClusterFacts,
    core::{
        cluster::Cluster,
        event::Effect,
        placement::{self, PlanOptions},
        settings::Settings,
    },
    discovery::mdns::{Found, Mdns, watch as watch_mdns},
    error::CoordinatorError,
    links::{Desired, Links, Note},
    model,
};
use mlx_cluster_common::{
    cache::CacheOptions,
    engine::NodeFacts,
    ids::{ClusterName, NodeId},
    plan::{Optimize, Plan, Strategy, ToldStage},
    units::Bytes,
};
use mlx_cluster_proto::wire::Hello;
use std::time::Duration;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

/// Over which machines to plan.
#[derive(Debug, Clone, PartialEq)]
pub enum PlanNodes {
    /// Machines with so much memory for models each, named `mac-1`, `mac-2` …
    Memory(Vec<Bytes>),
    /// As measured elsewhere: by a running coordinator, or from a file.
    Facts(ClusterFacts),
    /// The free workers of a cluster that answer within the wait.
    Discover { cluster: ClusterName, wait: Duration },
}

#[derive(Debug, Clone, PartialEq)]
pub struct PlanOnlyOptions {
    /// A folder or a repository.
    pub model: String,
    pub strategy: Strategy,
    pub split: Option<Vec<u32>>,
    pub stages: Option<Vec<ToldStage>>,
    pub optimize: Optimize,
    pub context_tokens: Option<u32>,
    pub caches: CacheOptions,
    pub nodes: PlanNodes,
}

/// The plan that a coordinator would make.
pub async fn plan_only(options: PlanOnlyOptions) -> Result<Plan, CoordinatorError> {
    let facts = model::load_facts(&options.model).await?;
    let ClusterFacts { nodes, links } = match options.nodes {
        PlanNodes::Facts(facts) => facts,
        PlanNodes::Memory(memory) => {
            ClusterFacts { nodes: memory.into_iter().enumerate().map(|(i, usable)| imagined(i + 1, usable)).collect(), links: Vec::new() }
        }
        PlanNodes::Discover { cluster, wait } => discover(&cluster, wait).await?,
    };
    if nodes.is_empty() {
        return Err(CoordinatorError::NoNodes { cause: "no machine was given".into() });
    }
    let plan_options = PlanOptions {
        model: facts.name.clone(),
        strategy: options.strategy,
        split: options.split,
        stages: options.stages,
        optimize: options.optimize,
        context_tokens: options.context_tokens,
        caches: options.caches,
        min_workers: 1,
    };
    Ok(placement::plan(&facts.spec, &facts.weights, &nodes, &links, &plan_options)?)
}

fn imagined(number: usize, usable: Bytes) -> NodeFacts {
    NodeFacts {
        id: NodeId(format!("mac-{number:03}")),
        name: format!("mac-{number}"),
        version: String::new(),
        os: String::new(),
        chip: String::new(),
        usable_memory: usable,
        total_memory: usable,
        memory_bandwidth: 0.0,
        matmul_rate: 0.0,
        addresses: Vec::new(),
    }
}

/// Asks every worker that announces itself what it is, and what lies between them. A worker that another coordinator holds does not answer.
async fn discover(cluster: &ClusterName, wait: Duration) -> Result<ClusterFacts, CoordinatorError> {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let hello = Hello::new(&cluster.0, &NodeId(id.clone()), "plan");
    let (mdns, services) = Mdns::start(None).map_err(CoordinatorError::Mdns)?;
    let (found, mut found_out) = mpsc::channel(64);
    let (notes, mut notes_out) = mpsc::channel(64);
    let listening = tokio::spawn(watch_mdns(services, hello.clone(), found));
    let mut links = Links::new(hello, notes);
    // The core of a coordinator that serves nothing: it has the workers measure the ways between them.
    let mut core = Cluster::idle(settings(cluster, &id));
    let mut cause = format!("no worker of cluster `{cluster}` answered within {} s", wait.as_secs());
    let start = Instant::now();
    loop {
        let next = tokio::select! {
            found = timeout_at(start + wait, found_out.recv()) => found.map(|found| (found, None)),
            note = timeout_at(start + wait, notes_out.recv()) => note.map(|note| (None, note)),
        };
        match next {
            Err(_) => break,
            Ok((Some(Found::Worker(peer)), _)) => links.seen(peer),
            Ok((_, Some(Note::Event(event)))) => {
                for effect in core.handle(event, start.elapsed()) {
                    if let Effect::SetDesired { node, version, engines, neighbours } = effect {
                        links.set_desired(&node, Desired { version, engines, neighbours });
                    }
                }
            }
            Ok((_, Some(Note::Held { message, .. }))) => cause = message,
            Ok(_) => {}
        }
    }
    links.stop().await;
    mdns.stop().await;
    listening.abort();
    let status = core.status(&[]);
    let nodes: Vec<_> = status.workers.into_iter().filter(|worker| worker.connected).map(|worker| worker.facts).collect();
    if nodes.is_empty() { Err(CoordinatorError::NoNodes { cause }) } else { Ok(ClusterFacts { nodes, links: status.links }) }
}

fn settings(cluster: &ClusterName, id: &str) -> Settings {
    Settings { cluster: cluster.0.clone(), run: id.chars().take(8).collect(), min_workers: 1, wait: None }
}

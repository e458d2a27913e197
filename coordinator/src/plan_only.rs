//! What would happen: a plan without any engine, over the workers that are there or over machines that somebody may buy.

use crate::{
    cluster_file::ClusterFacts,
    core::placement::{self, PlanOptions},
    discovery::mdns::{Found, Mdns, watch as watch_mdns},
    error::CoordinatorError,
    links::{Links, Note},
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
use std::{collections::BTreeMap, time::Duration};
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
        PlanNodes::Discover { cluster, wait } => ClusterFacts { nodes: discover(&cluster, wait).await?, links: Vec::new() },
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

/// Asks every worker that announces itself what it is. A worker that another coordinator holds does not answer.
async fn discover(cluster: &ClusterName, wait: Duration) -> Result<Vec<NodeFacts>, CoordinatorError> {
    let hello = Hello::new(&cluster.0, &NodeId(uuid::Uuid::new_v4().simple().to_string()), "plan");
    let (mdns, services) = Mdns::start(None).map_err(CoordinatorError::Mdns)?;
    let (found, mut found_out) = mpsc::channel(64);
    let (notes, mut notes_out) = mpsc::channel(64);
    let listening = tokio::spawn(watch_mdns(services, hello.clone(), found));
    let mut links = Links::new(hello, notes);
    let (mut nodes, mut cause) = (BTreeMap::new(), format!("no worker of cluster `{cluster}` answered within {} s", wait.as_secs()));
    let until = Instant::now() + wait;
    loop {
        let next = tokio::select! {
            found = timeout_at(until, found_out.recv()) => found.map(|found| (found, None)),
            note = timeout_at(until, notes_out.recv()) => note.map(|note| (None, note)),
        };
        match next {
            Err(_) => break,
            Ok((Some(Found::Worker(peer)), _)) => links.seen(peer),
            Ok((_, Some(Note::Event(crate::core::event::Event::WorkerUp { facts, .. })))) => {
                nodes.insert(facts.id.clone(), *facts);
            }
            Ok((_, Some(Note::Held { message, .. }))) => cause = message,
            Ok(_) => {}
        }
    }
    links.stop().await;
    mdns.stop().await;
    listening.abort();
    if nodes.is_empty() { Err(CoordinatorError::NoNodes { cause }) } else { Ok(nodes.into_values().collect()) }
}

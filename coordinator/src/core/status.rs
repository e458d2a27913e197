//! What the coordinator shows of itself.

use super::{
    cluster::{Cluster, Phase},
    deployment::Deployment,
};
use crate::serving::{ClusterStatus, InstanceState, WorkerStatus};

impl Cluster {
    pub fn status(&self, join_addresses: &[String]) -> ClusterStatus {
        let worker = |member: &super::members::Member| WorkerStatus {
            facts: member.facts.clone(),
            connected: member.is_connected(),
            engine: self
                .deployment
                .as_ref()
                .and_then(|deployment| deployment.engine_on(&member.facts.id))
                .and_then(|engine| member.engines.get(&engine.id))
                .cloned(),
        };
        ClusterStatus {
            cluster: self.settings.cluster.clone(),
            instance: self.instance_state(),
            plan: self.deployment.as_ref().map(|deployment: &Deployment| deployment.plan.clone()),
            workers: self.members.iter().map(worker).collect(),
            links: self.members.links(),
            load: self.load,
            join_addresses: join_addresses.to_vec(),
        }
    }

    pub fn instance_state(&self) -> InstanceState {
        let (found, wanted) = (self.members.connected().count(), self.settings.wanted_workers());
        match &self.phase {
            Phase::Draining { .. } | Phase::Stopping { .. } | Phase::Stopped => InstanceState::Draining,
            Phase::Ready { .. } => InstanceState::Ready,
            Phase::Suspect { blame, .. } => InstanceState::Recovering { cause: blame.to_string() },
            Phase::Failed { message, .. } => InstanceState::Failed { message: message.clone() },
            Phase::Waiting if self.settings.model.is_none() && found >= wanted => InstanceState::Idle,
            Phase::Waiting | Phase::Loading { .. } | Phase::Linking { .. } | Phase::Opening { .. } | Phase::Pausing { .. } => {
                match (&self.cause, &self.phase) {
                    (Some(cause), _) => InstanceState::Recovering { cause: cause.clone() },
                    (None, Phase::Waiting) => InstanceState::WaitingForWorkers { found, wanted },
                    (None, _) => InstanceState::Loading,
                }
            }
        }
    }
}

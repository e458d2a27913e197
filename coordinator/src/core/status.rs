//! What the coordinator shows of itself.

use super::{
    cluster::{Cluster, Course},
    instance::Instance,
    members::Member,
};
use crate::serving::{AdapterState, AdapterStatus, ClusterStatus, EngineOn, InstanceState, JobStatus, WorkerStatus};
use mlx_cluster_common::{ids::InstanceId, plan::Plan};

impl Cluster {
    pub fn status(&self, join_addresses: &[String]) -> ClusterStatus {
        let served = self.instances.get(&InstanceId::SERVED);
        let jobs = self.instances.values().filter(|instance| instance.id != InstanceId::SERVED);
        ClusterStatus {
            cluster: self.settings.cluster.clone(),
            instance: self.instance_state(),
            plan: served.and_then(plan_of).cloned(),
            adapters: served.map(|served| served.adapters.status()).unwrap_or_default(),
            jobs: jobs.map(|job| self.job_status(job)).collect(),
            workers: self.members.iter().map(|member| self.worker_status(member)).collect(),
            links: self.members.links(),
            load: served.map(|served| served.load).unwrap_or_default(),
            join_addresses: join_addresses.to_vec(),
        }
    }

    /// Those of the served model that new requests can have, now or soon.
    pub fn adapters(&self) -> Vec<AdapterStatus> {
        let mut adapters = self.instances.get(&InstanceId::SERVED).map(|served| served.adapters.status()).unwrap_or_default();
        adapters.retain(|adapter| adapter.state != AdapterState::Leaving);
        adapters
    }

    fn job_status(&self, job: &Instance) -> JobStatus {
        JobStatus {
            instance: job.id,
            model: job.kind.model().name.clone(),
            state: job.state(self.members.connected().count(), &self.settings),
            plan: plan_of(job).cloned(),
        }
    }

    fn worker_status(&self, member: &Member) -> WorkerStatus {
        let engine_on = |instance: &Instance| {
            let engine = instance.wanted_engine(&member.facts.id)?;
            Some(EngineOn { instance: instance.id, state: member.engines.get(&engine.id)?.clone() })
        };
        WorkerStatus {
            facts: member.facts.clone(),
            connected: member.is_connected(),
            engines: self.instances.values().filter_map(engine_on).collect(),
        }
    }

    /// Of the served model, or of the coordinator when nothing is served.
    pub fn instance_state(&self) -> InstanceState {
        let found = self.members.connected().count();
        if self.course != Course::Running {
            return InstanceState::Draining;
        }
        match (self.instances.get(&InstanceId::SERVED), &self.not_served) {
            (Some(served), _) => served.state(found, &self.settings),
            (None, Some(message)) => InstanceState::Failed { message: message.clone() },
            (None, None) if found < self.settings.min_workers => {
                InstanceState::WaitingForWorkers { found, wanted: self.settings.min_workers }
            }
            (None, None) => InstanceState::Idle,
        }
    }
}

fn plan_of(instance: &Instance) -> Option<&Plan> {
    instance.deployment_to_run().map(|deployment| &deployment.plan)
}

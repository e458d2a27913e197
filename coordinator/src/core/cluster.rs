//! The coordinator's state machine: workers, and the models that run on them. Events in, effects out.

use super::{
    Now,
    event::{ClusterFailure, Effect, Event, Snapshot},
    instance::{Context, Counters, Instance, STOP_TIMEOUT, Situation, failed},
    members::{Desired, Members, Wanted},
    settings::{InstanceSettings, Kind, ModelFacts, Settings},
};
use crate::serving::{Admitted, InstanceState, RequestFailure};
use mlx_cluster_common::{
    engine::EngineState,
    ids::{EngineId, InstanceId, NodeId, SequenceId},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Where the coordinator itself is in its life.
#[derive(Debug, PartialEq)]
pub(super) enum Course {
    Running,
    /// Takes no new requests, and waits for those that run, and for jobs to save what they have.
    Draining {
        until: Now,
    },
    /// Waits for all engines to be gone.
    Stopping {
        until: Now,
        failure: Option<ClusterFailure>,
    },
    Stopped,
}

/// The whole state of the coordinator.
#[derive(Debug)]
pub struct Cluster {
    pub(super) settings: Settings,
    pub(super) members: Members,
    pub(super) instances: BTreeMap<InstanceId, Instance>,
    pub(super) course: Course,
    /// Why the model that was asked for last is not served.
    pub(super) not_served: Option<String>,
    counters: Counters,
    /// Changes of what engines there are.
    engine_changes: u64,
    changes: u64,
}

impl Cluster {
    /// Of a coordinator that serves nothing yet.
    pub fn idle(settings: Settings) -> Self {
        Self {
            settings,
            members: Members::default(),
            instances: BTreeMap::new(),
            course: Course::Running,
            not_served: None,
            counters: Counters::default(),
            engine_changes: 0,
            changes: 0,
        }
    }

    /// Of a coordinator that was started with a model: if that cannot start, it ends.
    pub fn serving(settings: Settings, model: Arc<ModelFacts>, own: InstanceSettings) -> Self {
        let mut cluster = Self::idle(settings);
        let mut served = Instance::new(InstanceId::SERVED, Kind::Serving(model), own, Now::ZERO);
        served.is_essential = true;
        cluster.instances.insert(InstanceId::SERVED, served);
        cluster
    }

    /// Takes one event and says what to do about it. Never waits; the same events at the same times give the same effects.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.take(event, now, &mut effects);
        // A bound, not a need: from any phase a stable one is a few steps away.
        for _ in 0..8 {
            if !self.advance(now, &mut effects) {
                break;
            }
            self.changes += 1;
        }
        effects
    }

    /// Rises whenever [`status`](Self::status) may have changed.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether this number is in use; it is until `InstanceEnded`.
    pub fn has(&self, instance: InstanceId) -> bool {
        self.instances.contains_key(&instance)
    }

    fn take(&mut self, event: Event, now: Now, effects: &mut Vec<Effect>) {
        match event {
            Event::Delivered { epoch, delivery } => {
                let changed = self.with(InstanceId::SERVED, now, effects, |served, context| served.delivered(epoch, delivery, context));
                self.changes += u64::from(changed == Some(true));
                return;
            }
            Event::Submitted { sequence, request } => return self.submitted(sequence, request, now, effects),
            Event::Abandoned { sequence } => {
                self.with(InstanceId::SERVED, now, effects, |served, context| served.abandoned(sequence, context));
                return;
            }
            Event::Tick => return,
            Event::WorkerUp { facts, reached, snapshot } => {
                let node = facts.id.clone();
                let old = self.members.get(&node).map(|member| member.engines.clone()).unwrap_or_default();
                self.members.up(*facts, reached, now);
                self.send_desired(effects);
                self.observed(&node, &old, snapshot, now);
            }
            Event::WorkerObserved { node, addresses, snapshot } => {
                let Some(old) = self.members.get(&node).map(|member| member.engines.clone()) else { return };
                if self.members.moved(&node, addresses) {
                    self.send_desired(effects);
                }
                self.observed(&node, &old, snapshot, now);
            }
            Event::WorkerDown { node, cause } => {
                self.members.down(&node, cause, now);
                self.send_desired(effects);
            }
            Event::Linked { instance, epoch, engine, result } => {
                self.with(instance, now, effects, |instance, context| instance.linked(epoch, engine, result, context));
            }
            Event::SessionOpened { epoch } => {
                self.with(InstanceId::SERVED, now, effects, |served, _| served.session_opened(epoch));
            }
            Event::LoadAdapter { adapter, facts, is_given } => {
                let taken = |served: &mut Instance, context: &mut Context<'_>| served.load_adapter(adapter, facts, is_given, context);
                if self.with(InstanceId::SERVED, now, effects, taken).is_none() {
                    effects.push(Effect::AdapterSettled { adapter, outcome: Err("no model is served".into()) });
                }
            }
            Event::DropAdapter { adapter } => {
                self.with(InstanceId::SERVED, now, effects, |served, context| served.drop_adapter(adapter, context));
            }
            Event::AdapterLoaded { epoch, engine, adapter, result } => {
                let told =
                    |served: &mut Instance, context: &mut Context<'_>| served.adapter_loaded(epoch, engine, adapter, result, context);
                self.with(InstanceId::SERVED, now, effects, told);
            }
            Event::AdapterDropped { epoch, engine, adapter } => {
                let told = |served: &mut Instance, context: &mut Context<'_>| served.adapter_dropped(epoch, engine, adapter, context);
                self.with(InstanceId::SERVED, now, effects, told);
            }
            Event::SessionBroken { instance, epoch, node, message } => {
                self.with(instance, now, effects, |instance, context| instance.session_broken(epoch, node, message, context));
            }
            Event::Start { instance, kind, settings } => self.start(instance, kind, settings, now, effects),
            Event::PlanAgain { instance, epoch } => {
                self.with(instance, now, effects, |instance, context| instance.plan_again(epoch, context));
            }
            Event::Stop { instance } => self.stop_instance(instance, now, effects),
            Event::Drain { limit } => self.drain(limit, now, effects),
        }
        self.changes += 1;
    }

    /// Lets one instance work with all that is around it, and does what follows from that; None when there is no such instance.
    fn with<T>(
        &mut self,
        id: InstanceId,
        now: Now,
        effects: &mut Vec<Effect>,
        work: impl FnOnce(&mut Instance, &mut Context<'_>) -> T,
    ) -> Option<T> {
        let mut instance = self.instances.remove(&id)?;
        let mut context = Context {
            now,
            settings: &self.settings,
            members: &self.members,
            others: &self.instances,
            counters: &mut self.counters,
            situation: Situation { members: self.members.generation, engines: self.engine_changes },
            effects: &mut *effects,
            engines_changed: false,
            fatal: None,
        };
        let result = work(&mut instance, &mut context);
        let (engines_changed, fatal) = (context.engines_changed, context.fatal);
        self.instances.insert(id, instance);
        if engines_changed {
            self.engine_changes += 1;
            self.send_desired(effects);
        }
        if let Some(failure) = fatal {
            self.stop(Some(failure), now, effects);
        }
        Some(result)
    }

    /// Moves on if anything can; false when nothing changes before the next event or [`deadline`](Self::deadline).
    fn advance(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        let instances = &self.instances;
        self.members.forget(now, |node| instances.values().any(|instance| instance.is_on(node)));
        let mut moved = false;
        for id in self.instances.keys().copied().collect::<Vec<_>>() {
            moved |= self.with(id, now, effects, Instance::advance) == Some(true);
            self.remove_if_ended(id, effects);
        }
        moved | self.advance_course(now, effects)
    }

    fn remove_if_ended(&mut self, id: InstanceId, effects: &mut Vec<Effect>) {
        let Some(failure) = self.instances.get_mut(&id).and_then(Instance::end) else { return };
        self.instances.remove(&id);
        // Its memory is free for others.
        self.engine_changes += 1;
        if id == InstanceId::SERVED {
            self.not_served = failure.as_ref().map(ClusterFailure::to_string);
        }
        effects.push(Effect::InstanceEnded { instance: id, failure });
    }

    fn advance_course(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        match &self.course {
            Course::Running | Course::Stopped => false,
            Course::Draining { until } => {
                let is_idle = |instance: &Instance| instance.requests.is_empty() && !instance.is_training();
                let over = now >= *until || self.instances.values().all(is_idle);
                if over {
                    self.stop(None, now, effects);
                }
                over
            }
            Course::Stopping { until, failure } => {
                if !(self.members.all_stopped() || now >= *until) {
                    return false;
                }
                let failure = failure.clone();
                let left = std::mem::take(&mut self.instances).into_keys();
                effects.extend(left.map(|instance| Effect::InstanceEnded { instance, failure: None }));
                effects.push(Effect::End(failure));
                self.course = Course::Stopped;
                true
            }
        }
    }

    /// `old` is what the worker's engines were before.
    fn observed(&mut self, node: &NodeId, old: &BTreeMap<EngineId, EngineState>, snapshot: Snapshot, now: Now) {
        self.members.observed(node, snapshot);
        for instance in self.instances.values_mut() {
            instance.observed(node, old, &self.members, now);
        }
    }

    fn submitted(&mut self, sequence: SequenceId, request: Admitted, now: Now, effects: &mut Vec<Effect>) {
        let state = match self.instance_state() {
            InstanceState::Ready => {
                self.with(InstanceId::SERVED, now, effects, |served, context| served.submitted(sequence, request, context));
                return;
            }
            InstanceState::Recovering { cause } => format!("it recovers ({cause})"),
            InstanceState::Failed { message } => message,
            other => other.name().replace('_', " "),
        };
        effects.push(failed(sequence, RequestFailure::NotReady { state }));
    }

    fn start(&mut self, id: InstanceId, kind: Kind, settings: InstanceSettings, now: Now, effects: &mut Vec<Effect>) {
        if self.course != Course::Running {
            effects.push(Effect::InstanceEnded { instance: id, failure: Some(ClusterFailure::Stopping) });
        } else if !self.has(id) {
            if id == InstanceId::SERVED {
                self.not_served = None;
            }
            self.instances.insert(id, Instance::new(id, kind, settings, now));
        }
    }

    fn stop_instance(&mut self, id: InstanceId, now: Now, effects: &mut Vec<Effect>) {
        if id == InstanceId::SERVED {
            self.not_served = None;
        }
        let told = RequestFailure::NotReady { state: "it is being unloaded".into() };
        self.with(id, now, effects, |instance, context| instance.stop(None, &told, context));
    }

    fn drain(&mut self, limit: Duration, now: Now, effects: &mut Vec<Effect>) {
        match &mut self.course {
            Course::Stopping { .. } | Course::Stopped => return,
            Course::Draining { until } => *until = (*until).min(now + limit),
            Course::Running => self.course = Course::Draining { until: now + limit },
        }
        let jobs = self.instances.values().filter(|instance| instance.is_training());
        effects.extend(jobs.map(|job| Effect::TrainingDrain { instance: job.id, within: limit }));
    }

    /// Stops all engines, then ends.
    fn stop(&mut self, failure: Option<ClusterFailure>, now: Now, effects: &mut Vec<Effect>) {
        self.course = Course::Stopping { until: now + STOP_TIMEOUT, failure };
        let told = RequestFailure::NotReady { state: "the coordinator is stopping".into() };
        for id in self.instances.keys().copied().collect::<Vec<_>>() {
            self.with(id, now, effects, |instance, context| instance.stop(None, &told, context));
        }
    }

    /// Has every worker run its engines of all instances and nothing else, and know all other workers.
    fn send_desired(&mut self, effects: &mut Vec<Effect>) {
        let instances = &self.instances;
        let engines = |node: &NodeId| instances.values().filter_map(|instance| instance.wanted_engine(node)).cloned().collect();
        let changed = self.members.want(engines);
        effects.extend(changed.into_iter().map(Effect::from));
    }

    /// When [`handle`](Self::handle) wants to be called with a tick, if nothing happens before.
    pub fn deadline(&self, now: Now) -> Option<Now> {
        let own = match &self.course {
            Course::Draining { until } | Course::Stopping { until, .. } => Some(*until).filter(|at| *at > now),
            Course::Running | Course::Stopped => None,
        };
        let instances = self.instances.values().filter_map(|instance| instance.deadline(&self.members, &self.settings, now));
        instances.chain(own).chain(self.members.next_loss(now)).min()
    }
}

impl From<Wanted> for Effect {
    fn from(wanted: Wanted) -> Self {
        let Desired { engines, neighbours } = wanted.desired;
        Effect::SetDesired { node: wanted.node, version: wanted.version, engines, neighbours }
    }
}

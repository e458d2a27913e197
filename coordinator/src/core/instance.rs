//! One model that the cluster runs: its plan and where it is in its life, and what it is told.

use super::{
    Now,
    adapters::Adapters,
    deployment::{Blame, Deployment},
    event::{ClusterFailure, Effect},
    life_cycle::{ATTRIBUTION, GROUP_ATTRIBUTION, LOAD_STALL},
    members::Members,
    requests::Requests,
    settings::{InstanceSettings, Kind, Settings},
};
use crate::serving::{Admitted, InstanceState, RequestEvent, RequestFailure};
use mlx_cluster_common::{
    engine::{EngineSpec, EngineState, Link},
    ids::{EngineId, Epoch, InstanceId, NodeId, SequenceId},
    request::{Delivery, EngineLoad, SessionCommand, Submission},
    units::Bytes,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// Engines answer a link, and the lead opens a session, within this.
pub const LINK_TIMEOUT: Duration = Duration::from_secs(10);
/// Engines of a group answer within this: they end the step that they are in, form the group and warm up, each with a deadline of its own.
pub const GROUP_LINK_TIMEOUT: Duration = Duration::from_secs(290);
/// Workers confirm within this that their engines are gone.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// How long an engine may take to answer this.
pub fn link_timeout(link: &Link) -> Duration {
    if link.group.is_some() { GROUP_LINK_TIMEOUT } else { LINK_TIMEOUT }
}

/// Where a model is in its life. What a phase needs, it holds; the deployment outlives phases and stands beside.
#[derive(Debug)]
pub(super) enum Phase {
    /// For workers.
    Waiting,
    /// Engines fetch and load; without any progress until `stalls_at` it is given up.
    Loading {
        stalls_at: Now,
    },
    Linking {
        epoch: Epoch,
        pending: BTreeSet<u32>,
        until: Now,
    },
    /// Engines are given the adapters that they forgot.
    Adapting {
        epoch: Epoch,
        until: Now,
    },
    /// The session of a served model.
    Opening {
        epoch: Epoch,
        until: Now,
    },
    Ready {
        epoch: Epoch,
    },
    /// The epoch broke; until the time is over a worker may say what happened.
    Suspect {
        blame: Blame,
        until: Now,
    },
    /// After a failed attempt to link.
    Pausing {
        until: Now,
    },
    /// Until another worker comes.
    Failed {
        message: String,
        members: u64,
    },
    /// Until its engines are gone; their memory counts as theirs until then.
    Stopping {
        until: Now,
        failure: Option<ClusterFailure>,
    },
    Ended {
        failure: Option<ClusterFailure>,
    },
}

/// Numbers that never come twice, whichever instance takes them.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Deployments so far.
    pub(super) generation: u64,
    pub(super) epoch: u64,
}

impl Counters {
    pub(super) fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    pub(super) fn next_epoch(&mut self) -> Epoch {
        self.epoch += 1;
        Epoch(self.epoch)
    }
}

/// What a refusal of the planner is about: nothing changes while these are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Situation {
    /// As [`Members::generation`].
    pub(super) members: u64,
    /// Changes of what the engines of all instances take.
    pub(super) engines: u64,
}

/// What is around an instance while it takes an event or moves on.
pub(super) struct Context<'a> {
    pub(super) now: Now,
    pub(super) settings: &'a Settings,
    pub(super) members: &'a Members,
    /// All instances but this one.
    pub(super) others: &'a BTreeMap<InstanceId, Instance>,
    pub(super) counters: &'a mut Counters,
    pub(super) situation: Situation,
    pub(super) effects: &'a mut Vec<Effect>,
    /// Workers have to be told what their engines are now.
    pub(super) engines_changed: bool,
    /// What ends the coordinator.
    pub(super) fatal: Option<ClusterFailure>,
}

#[derive(Debug)]
pub(super) struct Instance {
    pub(super) id: InstanceId,
    pub(super) kind: Kind,
    pub(super) settings: InstanceSettings,
    /// What fails at its first start ends the coordinator, because its user watches the start.
    pub(super) is_essential: bool,
    pub(super) started: Now,
    pub(super) phase: Phase,
    pub(super) deployment: Option<Deployment>,
    /// Of a served model.
    pub(super) requests: Requests,
    /// Of a served model.
    pub(super) adapters: Adapters,
    pub(super) load: EngineLoad,
    pub(super) epoch: Epoch,
    /// Never been ready.
    pub(super) is_first_start: bool,
    /// Why it is not ready any more.
    pub(super) cause: Option<String>,
    /// Why there is no plan, and what that is about.
    pub(super) refusal: Option<(Situation, ClusterFailure)>,
    /// The most that a plan had so far.
    pub(super) most_ranks: usize,
    /// When it was last looked whether a job could have lost workers back: a job forgets with its epoch what it was offered.
    pub(super) looked_for_more: Option<(Epoch, Situation)>,
}

impl Instance {
    pub(super) fn new(id: InstanceId, kind: Kind, settings: InstanceSettings, started: Now) -> Self {
        Self {
            id,
            kind,
            settings,
            is_essential: false,
            started,
            phase: Phase::Waiting,
            deployment: None,
            requests: Requests::default(),
            adapters: Adapters::default(),
            load: EngineLoad::default(),
            epoch: Epoch(0),
            is_first_start: true,
            cause: None,
            refusal: None,
            most_ranks: 0,
            looked_for_more: None,
        }
    }

    pub(super) fn is_training(&self) -> bool {
        matches!(self.kind, Kind::Training(_))
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready { .. })
    }

    /// How it ended, once it has.
    pub(super) fn end(&mut self) -> Option<Option<ClusterFailure>> {
        match &mut self.phase {
            Phase::Ended { failure } => Some(failure.take()),
            _ => None,
        }
    }

    /// Workers that are needed before anything is planned. A job that ran once goes on with those that are left.
    pub(super) fn wanted_workers(&self, settings: &Settings) -> usize {
        let least = if self.is_training() && !self.is_first_start { 1 } else { settings.min_workers };
        self.settings.named_workers().max(least)
    }

    /// The engine that this worker shall run.
    pub(super) fn wanted_engine(&self, node: &NodeId) -> Option<&EngineSpec> {
        self.deployment_to_run()?.engine_on(node)
    }

    pub(super) fn deployment_to_run(&self) -> Option<&Deployment> {
        self.deployment.as_ref().filter(|_| !matches!(self.phase, Phase::Stopping { .. } | Phase::Ended { .. }))
    }

    /// For messages.
    pub(super) fn name(&self) -> String {
        if self.id == InstanceId::SERVED { "the served model".into() } else { format!("job {}", self.id) }
    }

    /// What its engine may use of this worker's memory.
    pub(super) fn reserved(&self, node: &NodeId) -> Bytes {
        let engine = self.deployment.as_ref().and_then(|deployment| deployment.engine_on(node));
        engine.map_or(Bytes(0), |engine| engine.memory + self.adapters_on(&engine.layers, None))
    }

    pub(super) fn is_on(&self, node: &NodeId) -> bool {
        self.deployment.as_ref().is_some_and(|deployment| deployment.is_on(node))
    }

    /// `found` workers are connected.
    pub(super) fn state(&self, found: usize, settings: &Settings) -> InstanceState {
        match &self.phase {
            Phase::Stopping { .. } | Phase::Ended { .. } => InstanceState::Unloading,
            Phase::Ready { .. } => InstanceState::Ready,
            Phase::Suspect { blame, .. } => InstanceState::Recovering { cause: blame.to_string() },
            Phase::Failed { message, .. } => InstanceState::Failed { message: message.clone() },
            Phase::Waiting
            | Phase::Loading { .. }
            | Phase::Linking { .. }
            | Phase::Adapting { .. }
            | Phase::Opening { .. }
            | Phase::Pausing { .. } => match (&self.cause, &self.refusal) {
                (Some(cause), Some((_, why))) => InstanceState::Recovering { cause: format!("{cause}; without it: {why}") },
                (Some(cause), None) => InstanceState::Recovering { cause: cause.clone() },
                (None, Some((_, why))) if !self.is_first_start => InstanceState::Recovering { cause: why.to_string() },
                (None, _) if matches!(self.phase, Phase::Waiting) => {
                    InstanceState::WaitingForWorkers { found, wanted: self.wanted_workers(settings) }
                }
                (None, _) => InstanceState::Loading,
            },
        }
    }

    /// `old` is what the worker's engines were before.
    pub(super) fn observed(&mut self, node: &NodeId, old: &BTreeMap<EngineId, EngineState>, members: &Members, now: Now) {
        let Some(deployment) = &mut self.deployment else { return };
        let Some(id) = deployment.engine_on(node).map(|engine| engine.id.clone()) else { return };
        let new = members.get(node).and_then(|member| member.engines.get(&id));
        let moved = deployment.note(node, old.get(&id), new);
        if let (true, Phase::Loading { stalls_at }) = (moved, &mut self.phase) {
            *stalls_at = now + LOAD_STALL;
        }
    }

    pub(super) fn linked(&mut self, epoch: Epoch, engine: u32, result: Result<(), String>, context: &mut Context<'_>) {
        let Phase::Linking { epoch: current, pending, .. } = &mut self.phase else { return };
        if *current != epoch {
            return;
        }
        match result {
            Ok(()) => drop(pending.remove(&engine)),
            Err(message) => {
                let worker = self.deployment.as_ref().map(|deployment| deployment.name(engine)).unwrap_or_default();
                self.link_failed(Blame { worker, message }, context);
            }
        }
    }

    pub(super) fn session_opened(&mut self, epoch: Epoch) {
        if matches!(self.phase, Phase::Opening { epoch: current, .. } if current == epoch) {
            self.is_ready_now(epoch);
        }
    }

    pub(super) fn is_ready_now(&mut self, epoch: Epoch) {
        self.phase = Phase::Ready { epoch };
        self.is_first_start = false;
        self.cause = None;
        if let Some(deployment) = &mut self.deployment {
            deployment.forgive();
        }
    }

    pub(super) fn session_broken(&mut self, epoch: Epoch, node: Option<String>, message: String, context: &mut Context<'_>) {
        let Some(deployment) = &self.deployment else { return };
        let named = node.as_deref().and_then(|node| deployment.named(node));
        let blame = Blame { worker: named.unwrap_or_else(|| deployment.lead_name()), message };
        let attribution = if deployment.has_groups() { GROUP_ATTRIBUTION } else { ATTRIBUTION };
        match self.phase {
            Phase::Opening { epoch: current, .. } if current == epoch => self.link_failed(blame, context),
            Phase::Ready { epoch: current } if current == epoch => {
                self.close_session(context);
                self.phase = Phase::Suspect { blame, until: context.now + attribution };
            }
            _ => {}
        }
    }

    /// The job has kept what it has.
    pub(super) fn plan_again(&mut self, epoch: Epoch, context: &mut Context<'_>) {
        let is_current = matches!(self.phase, Phase::Ready { epoch: current } if current == epoch);
        if is_current && self.is_training() {
            context.effects.push(Effect::TrainingBroken { instance: self.id, epoch, cause: None });
            self.start_over(context);
        }
    }

    /// Nothing for training: a job's runner closes its streams itself once it is told that the epoch is over.
    pub(super) fn close_session(&mut self, context: &mut Context<'_>) {
        if !self.is_training() {
            context.effects.push(Effect::CloseSession);
        }
        self.load = EngineLoad::default();
    }

    /// True when the load changed.
    pub(super) fn delivered(&mut self, epoch: Epoch, delivery: Delivery, context: &mut Context<'_>) -> bool {
        if !self.is_ready() || epoch != self.epoch {
            return false;
        }
        let Delivery::Load(load) = delivery else {
            if let Some((sequence, event)) = self.requests.deliver(delivery, context.now) {
                context.effects.push(Effect::Answer { sequence, event });
            }
            return false;
        };
        let changed = self.load != load;
        self.load = load;
        let failure = RequestFailure::Broken {
            worker: self.deployment.as_ref().map(Deployment::lead_name).unwrap_or_default(),
            message: "the lead engine lost track of the request".into(),
        };
        let lost = self.requests.take_forgotten(load, context.now);
        context.effects.extend(lost.into_iter().map(|sequence| failed(sequence, failure.clone())));
        changed
    }

    /// Takes a request while it is ready.
    pub(super) fn submitted(&mut self, sequence: SequenceId, request: Admitted, context: &mut Context<'_>) {
        if let Some(failure) = self.adapters.refusal(request.adapter) {
            context.effects.push(failed(sequence, failure));
            return;
        }
        match self.requests.admit(sequence, context.now) {
            Err(failure) => context.effects.push(failed(sequence, failure)),
            Ok(()) => {
                let submission = Submission { sequence, prompt: request.prompt, params: request.params, adapter: request.adapter };
                context.effects.push(Effect::Command(SessionCommand::Submit(submission)));
            }
        }
    }

    pub(super) fn abandoned(&mut self, sequence: SequenceId, context: &mut Context<'_>) {
        if self.requests.abandon(sequence) {
            context.effects.push(Effect::Command(SessionCommand::Cancel(sequence)));
        }
    }

    /// Tells every request that this ended it.
    pub(super) fn fail_requests(&mut self, failure: &RequestFailure, context: &mut Context<'_>) {
        context.effects.extend(self.requests.take_all().into_iter().map(|sequence| failed(sequence, failure.clone())));
    }
}

pub(super) fn failed(sequence: SequenceId, failure: RequestFailure) -> Effect {
    Effect::Answer { sequence, event: RequestEvent::Failed(failure) }
}

impl From<&Blame> for RequestFailure {
    fn from(blame: &Blame) -> Self {
        RequestFailure::Broken { worker: blame.worker.clone(), message: blame.message.clone() }
    }
}

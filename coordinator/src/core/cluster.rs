//! The coordinator's state machine: workers, one model's life cycle, its requests. Events in, effects out.

use super::{
    Now,
    deployment::{Blame, Deployment},
    event::{ClusterFailure, Effect, Event, Settings, Snapshot},
    life_cycle::{ATTRIBUTION, GROUP_ATTRIBUTION, LOAD_STALL},
    members::{Desired, Members, Wanted},
    placement::WhyNot,
    requests::Requests,
};
use crate::serving::{Admitted, InstanceState, RequestEvent, RequestFailure};
use mlx_cluster_common::{
    engine::{EngineState, Link},
    ids::{EngineId, Epoch, NodeId, SequenceId},
    request::{Delivery, EngineLoad, SessionCommand, Submission},
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

/// Where the model is in its life. What a phase needs, it holds; the deployment outlives phases and stands beside.
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
    Opening {
        epoch: Epoch,
        until: Now,
    },
    Ready {
        epoch: Epoch,
    },
    /// The session broke; until the time is over a worker may say what happened.
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
    Draining {
        until: Now,
    },
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
    pub(super) phase: Phase,
    pub(super) deployment: Option<Deployment>,
    pub(super) requests: Requests,
    /// Deployments so far.
    pub(super) generation: u64,
    pub(super) epoch: Epoch,
    pub(super) load: EngineLoad,
    /// Never been ready: failures end the coordinator, because its user watches the start.
    pub(super) is_first_start: bool,
    /// Why it is not ready any more.
    pub(super) cause: Option<String>,
    /// The last refusal of the planner, and the workers (as [`Members::generation`]) it is about.
    pub(super) refusal: Option<(u64, WhyNot)>,
    changes: u64,
}

impl Cluster {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            members: Members::default(),
            phase: Phase::Waiting,
            deployment: None,
            requests: Requests::default(),
            generation: 0,
            epoch: Epoch(0),
            load: EngineLoad::default(),
            is_first_start: true,
            cause: None,
            refusal: None,
            changes: 0,
        }
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

    fn take(&mut self, event: Event, now: Now, effects: &mut Vec<Effect>) {
        match event {
            Event::Delivered { epoch, delivery } => return self.delivered(epoch, delivery, now, effects),
            Event::Submitted { sequence, request } => return self.submitted(sequence, request, now, effects),
            Event::Abandoned { sequence } => return self.abandoned(sequence, effects),
            Event::Tick => return,
            Event::WorkerUp { facts, reached, snapshot } => {
                let node = facts.id.clone();
                let old = self.members.get(&node).map(|member| member.engines.clone()).unwrap_or_default();
                self.members.up(*facts, reached, now);
                self.send_desired(effects);
                self.observed(&node, old, snapshot, now);
            }
            Event::WorkerObserved { node, addresses, snapshot } => {
                let Some(old) = self.members.get(&node).map(|member| member.engines.clone()) else { return };
                if self.members.moved(&node, addresses) {
                    self.send_desired(effects);
                }
                self.observed(&node, old, snapshot, now);
            }
            Event::WorkerDown { node, cause } => {
                self.members.down(&node, cause, now);
                self.send_desired(effects);
            }
            Event::Linked { epoch, engine, result } => self.linked(epoch, engine, result, now, effects),
            Event::SessionOpened { epoch } => self.session_opened(epoch),
            Event::SessionBroken { epoch, node, message } => self.session_broken(epoch, node, message, now, effects),
            Event::Drain { limit } => self.drain(limit, now, effects),
        }
        self.changes += 1;
    }

    /// `old` is what the worker's engines were before.
    fn observed(&mut self, node: &NodeId, old: BTreeMap<EngineId, EngineState>, snapshot: Snapshot, now: Now) {
        self.members.observed(node, snapshot);
        let Some(deployment) = &mut self.deployment else { return };
        let Some(id) = deployment.engine_on(node).map(|engine| engine.id.clone()) else { return };
        let new = self.members.get(node).and_then(|member| member.engines.get(&id));
        let moved = deployment.note(node, old.get(&id), new);
        if let (true, Phase::Loading { stalls_at }) = (moved, &mut self.phase) {
            *stalls_at = now + LOAD_STALL;
        }
    }

    fn linked(&mut self, epoch: Epoch, engine: u32, result: Result<(), String>, now: Now, effects: &mut Vec<Effect>) {
        let Phase::Linking { epoch: current, pending, .. } = &mut self.phase else { return };
        if *current != epoch {
            return;
        }
        match result {
            Ok(()) => drop(pending.remove(&engine)),
            Err(message) => {
                let worker = self.deployment.as_ref().map(|deployment| deployment.name(engine)).unwrap_or_default();
                self.link_failed(Blame { worker, message }, now, effects);
            }
        }
    }

    fn session_opened(&mut self, epoch: Epoch) {
        if !matches!(self.phase, Phase::Opening { epoch: current, .. } if current == epoch) {
            return;
        }
        self.phase = Phase::Ready { epoch };
        self.is_first_start = false;
        self.cause = None;
        if let Some(deployment) = &mut self.deployment {
            deployment.forgive();
        }
    }

    fn session_broken(&mut self, epoch: Epoch, node: Option<String>, message: String, now: Now, effects: &mut Vec<Effect>) {
        let Some(deployment) = &self.deployment else { return };
        let named = node.as_deref().and_then(|node| deployment.named(node));
        let blame = Blame { worker: named.unwrap_or_else(|| deployment.lead_name()), message };
        let attribution = if deployment.has_groups() { GROUP_ATTRIBUTION } else { ATTRIBUTION };
        match self.phase {
            Phase::Opening { epoch: current, .. } if current == epoch => self.link_failed(blame, now, effects),
            Phase::Ready { epoch: current } if current == epoch => {
                effects.push(Effect::CloseSession);
                self.load = EngineLoad::default();
                self.phase = Phase::Suspect { blame, until: now + attribution };
            }
            // What was still running cannot be finished.
            Phase::Draining { .. } if self.epoch == epoch => self.fail_requests(&blame, effects),
            _ => {}
        }
    }

    fn delivered(&mut self, epoch: Epoch, delivery: Delivery, now: Now, effects: &mut Vec<Effect>) {
        let open = matches!(self.phase, Phase::Ready { .. } | Phase::Draining { .. });
        if !open || epoch != self.epoch {
            return;
        }
        if let Delivery::Load(load) = delivery {
            self.changes += u64::from(self.load != load);
            self.load = load;
            let failure = RequestFailure::Broken {
                worker: self.deployment.as_ref().map(Deployment::lead_name).unwrap_or_default(),
                message: "the lead engine lost track of the request".into(),
            };
            let lost = self.requests.take_forgotten(load, now);
            effects.extend(lost.into_iter().map(|sequence| failed(sequence, failure.clone())));
            return;
        }
        if let Some((sequence, event)) = self.requests.deliver(delivery, now) {
            effects.push(Effect::Answer { sequence, event });
        }
    }

    fn submitted(&mut self, sequence: SequenceId, request: Admitted, now: Now, effects: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Ready { .. }) {
            let state = self.instance_state();
            let state = match &state {
                InstanceState::Recovering { cause } => format!("it recovers ({cause})"),
                InstanceState::Failed { message } => message.clone(),
                other => other.name().replace('_', " "),
            };
            return effects.push(failed(sequence, RequestFailure::NotReady { state }));
        }
        match self.requests.admit(sequence, now) {
            Err(failure) => effects.push(failed(sequence, failure)),
            Ok(()) => {
                let submission = Submission { sequence, prompt: request.prompt, params: request.params };
                effects.push(Effect::Command(SessionCommand::Submit(submission)));
            }
        }
    }

    fn abandoned(&mut self, sequence: SequenceId, effects: &mut Vec<Effect>) {
        if self.requests.abandon(sequence) {
            effects.push(Effect::Command(SessionCommand::Cancel(sequence)));
        }
    }

    fn drain(&mut self, limit: Duration, now: Now, effects: &mut Vec<Effect>) {
        match &mut self.phase {
            Phase::Stopping { .. } | Phase::Stopped => {}
            Phase::Draining { until } => *until = (*until).min(now + limit),
            Phase::Suspect { blame, .. } => {
                let blame = blame.clone();
                self.fail_requests(&blame, effects);
                self.phase = Phase::Draining { until: now + limit };
            }
            _ => self.phase = Phase::Draining { until: now + limit },
        }
    }

    /// Tells every request that `blame` ended it.
    pub(super) fn fail_requests(&mut self, blame: &Blame, effects: &mut Vec<Effect>) {
        let failure = RequestFailure::Broken { worker: blame.worker.clone(), message: blame.message.clone() };
        effects.extend(self.requests.take_all().into_iter().map(|sequence| failed(sequence, failure.clone())));
    }

    /// Has every worker run its engine of the deployment, or nothing, and know all others.
    pub(super) fn send_desired(&mut self, effects: &mut Vec<Effect>) {
        let deployment = self.deployment.as_ref();
        let changed = self.members.want(|node| deployment.and_then(|deployment| deployment.engine_on(node)).cloned());
        effects.extend(changed.into_iter().map(Effect::from));
    }
}

fn failed(sequence: SequenceId, failure: RequestFailure) -> Effect {
    Effect::Answer { sequence, event: RequestEvent::Failed(failure) }
}

impl From<Wanted> for Effect {
    fn from(wanted: Wanted) -> Self {
        let Desired { engines, neighbours } = wanted.desired;
        Effect::SetDesired { node: wanted.node, version: wanted.version, engines, neighbours }
    }
}

//! How a model moves from phase to phase: waiting, loading, linking, ready, and back when something breaks.

use super::{
    Now,
    deployment::{Blame, Deployment},
    event::{ClusterFailure, Effect},
    instance::{Context, Instance, LINK_TIMEOUT, Phase, STOP_TIMEOUT},
    members::Members,
};
use crate::serving::RequestFailure;
use mlx_cluster_common::{ids::Epoch, request::EngineLoad};
use std::{collections::BTreeSet, time::Duration};

/// Loading without any progress for so long has failed.
pub(super) const LOAD_STALL: Duration = Duration::from_secs(300);
/// After the session broke, workers get this long to say which engine died and of what.
pub(super) const ATTRIBUTION: Duration = Duration::from_millis(700);
/// The other ranks of a lead that hangs notice about when the coordinator does.
pub(super) const GROUP_ATTRIBUTION: Duration = Duration::from_secs(3);
/// Failed attempts to link before the first start is given up, or (later) the engines are replaced.
const LINK_ATTEMPTS: u32 = 6;
const LINK_PAUSE: Duration = Duration::from_millis(250);
const LINK_PAUSE_MAX: Duration = Duration::from_secs(4);
/// Deaths of one engine before the first start is given up.
const ENGINE_DEATHS: u32 = 5;

impl Instance {
    /// Moves on if it can; false when nothing changes before the next event or [`deadline`](Self::deadline).
    pub(super) fn advance(&mut self, context: &mut Context<'_>) -> bool {
        let now = context.now;
        match &self.phase {
            Phase::Waiting => self.advance_waiting(context),
            Phase::Loading { stalls_at } => self.advance_loading(*stalls_at, context),
            Phase::Linking { pending, until, epoch } => {
                let (linked, late, epoch) = (pending.is_empty(), now >= *until, *epoch);
                self.advance_linking(linked, late, epoch, context)
            }
            Phase::Adapting { epoch, until } => {
                let (late, epoch) = (now >= *until, *epoch);
                self.advance_adapting(late, epoch, context)
            }
            Phase::Opening { until, .. } => {
                let late = now >= *until;
                self.advance_opening(late, context)
            }
            Phase::Ready { .. } => self.advance_ready(context),
            Phase::Suspect { blame, until } => {
                let (told, late) = (blame.clone(), now >= *until);
                self.advance_suspect(told, late, context)
            }
            Phase::Pausing { until } => now >= *until && self.load(now),
            Phase::Failed { members, .. } => {
                let same = *members == context.members.generation;
                !same && self.start_over(context)
            }
            Phase::Stopping { until, failure } => {
                let gone = self.deployment.as_ref().is_none_or(|deployment| deployment.is_gone(context.members));
                if !(gone || now >= *until) {
                    return false;
                }
                self.phase = Phase::Ended { failure: failure.clone() };
                true
            }
            Phase::Ended { .. } => false,
        }
    }

    /// Blames the engine that a worker reports as dead, then whom the others of its group lost, then whoever was `told`.
    fn advance_suspect(&mut self, told: Blame, late: bool, context: &mut Context<'_>) -> bool {
        let Some(deployment) = &self.deployment else { return self.start_over(context) };
        let members = context.members;
        if let Some(blame) = deployment.replaced(members).or_else(|| deployment.gone(members)) {
            return self.break_off(&blame, context);
        }
        if !late {
            return false;
        }
        let lost = deployment.lost_rank(members);
        // Its worker says that it runs, but it answers nobody.
        let hangs = lost.as_ref().is_some_and(|blame| deployment.is_as_linked(members, &blame.worker));
        if hangs {
            self.replace_engines(context);
        }
        self.break_off(&lost.unwrap_or(told), context)
    }

    pub(super) fn load(&mut self, now: Now) -> bool {
        self.phase = Phase::Loading { stalls_at: now + LOAD_STALL };
        true
    }

    pub(super) fn start_over(&mut self, context: &mut Context<'_>) -> bool {
        self.deployment = None;
        context.engines_changed = true;
        self.phase = Phase::Waiting;
        true
    }

    fn advance_loading(&mut self, stalls_at: Now, context: &mut Context<'_>) -> bool {
        let (members, now) = (context.members, context.now);
        let Some(deployment) = &self.deployment else { return self.start_over(context) };
        if let Some(blame) = deployment.lost(members, now) {
            return self.wait_for_workers(&blame);
        }
        if let Some(failure) = deployment.failure(members) {
            let (worker, cause, output) = (failure.worker.to_owned(), failure.cause.to_owned(), failure.output.to_vec());
            let given_up = failure.hopeless || (self.is_first_start && failure.count >= ENGINE_DEATHS);
            if given_up {
                return self.fail(ClusterFailure::Engine { worker, cause, output }, context);
            }
        }
        if let Some(engine) = deployment.first_not_ready(members) {
            let worker = deployment.name(engine);
            return now >= stalls_at && self.fail(ClusterFailure::Stalled { worker, waited: LOAD_STALL }, context);
        }
        // Ranks that train hear of each other in collectives alone, so one that is left does not end by itself.
        if self.is_training() && deployment.has_torn_group(members) {
            self.replace_engines(context);
            return self.load(now);
        }
        self.link(context)
    }

    /// A new epoch: every engine drops what it had and connects to its next.
    fn link(&mut self, context: &mut Context<'_>) -> bool {
        let Some(deployment) = &mut self.deployment else { return false };
        let epoch = context.counters.next_epoch();
        let Some(links) = deployment.link(context.members, epoch) else { return false };
        let limit = deployment.link_timeout();
        let pending = links.iter().map(|(engine, ..)| *engine).collect::<BTreeSet<_>>();
        for (engine, addresses, link) in links {
            let name = deployment.name(engine);
            context.effects.push(Effect::Link { instance: self.id, epoch, engine, name, addresses, link });
        }
        self.epoch = epoch;
        self.load = EngineLoad::default();
        self.phase = Phase::Linking { epoch, pending, until: context.now + limit + Duration::from_secs(1) };
        true
    }

    fn advance_linking(&mut self, linked: bool, late: bool, epoch: Epoch, context: &mut Context<'_>) -> bool {
        let now = context.now;
        if self.engines_changed(context) {
            return self.load(now);
        }
        let Some(deployment) = &self.deployment else { return self.start_over(context) };
        if !linked {
            let limit = deployment.link_timeout();
            return late && self.link_late(limit, context);
        }
        if self.is_training() {
            let Some(engines) = deployment.engines_at(context.members) else { return self.load(now) };
            context.effects.push(Effect::TrainingReady { instance: self.id, epoch, engines });
            self.is_ready_now(epoch);
            return true;
        }
        self.load_adapters(epoch, context);
        true
    }

    fn advance_opening(&mut self, late: bool, context: &mut Context<'_>) -> bool {
        if self.engines_changed(context) {
            self.close_session(context);
            return self.load(context.now);
        }
        if late {
            self.close_session(context);
        }
        late && self.link_late(LINK_TIMEOUT, context)
    }

    pub(super) fn link_late(&mut self, limit: Duration, context: &mut Context<'_>) -> bool {
        let worker = self.deployment.as_ref().map(Deployment::lead_name).unwrap_or_default();
        self.link_failed(Blame { worker, message: format!("no answer within {} s", limit.as_secs()) }, context);
        true
    }

    /// Whether there is no point in going on with the current epoch.
    pub(super) fn engines_changed(&self, context: &Context<'_>) -> bool {
        self.deployment.as_ref().is_none_or(|deployment| trouble(deployment, context.members, context.now).is_some())
    }

    /// An attempt to link failed: another one follows, later each time.
    pub(super) fn link_failed(&mut self, blame: Blame, context: &mut Context<'_>) {
        let Some(deployment) = &mut self.deployment else { return };
        deployment.link_failures += 1;
        let failures = deployment.link_failures;
        if !self.is_first_start {
            self.cause = Some(blame.to_string());
        }
        let pause = LINK_PAUSE.saturating_mul(1 << failures.min(6)).min(LINK_PAUSE_MAX);
        self.phase = Phase::Pausing { until: context.now + pause };
        // The engines of a job start from its checkpoint in any case: new ones lose nothing, and one that hangs is replaced soon.
        let is_job = self.is_training() && !self.is_first_start;
        if failures < LINK_ATTEMPTS && !is_job {
            return;
        }
        if self.is_first_start {
            let failure = ClusterFailure::Link { worker: blame.worker, message: blame.message };
            self.give_up(failure, context);
        } else {
            self.replace_engines(context);
        }
    }

    /// The same plan with new engines, in the hope that they fare better.
    fn replace_engines(&mut self, context: &mut Context<'_>) {
        let Some(deployment) = &self.deployment else { return };
        let plan = deployment.plan.clone();
        self.deployment = Some(self.deployment_of(plan, context));
        context.engines_changed = true;
    }

    fn advance_ready(&mut self, context: &mut Context<'_>) -> bool {
        let Some(deployment) = &self.deployment else { return self.start_over(context) };
        let Some(blame) = trouble(deployment, context.members, context.now) else {
            self.look_for_more(context);
            return false;
        };
        self.close_session(context);
        // Who only lost another one may have been faster to say so than the other one's worker.
        self.phase = Phase::Suspect { blame, until: context.now + ATTRIBUTION };
        true
    }

    /// The epoch is over: its requests fail, or its job is told, and loading shows what is missing.
    fn break_off(&mut self, blame: &Blame, context: &mut Context<'_>) -> bool {
        self.fail_requests(&RequestFailure::from(blame), context);
        if self.is_training() {
            context.effects.push(Effect::TrainingBroken { instance: self.id, epoch: self.epoch, cause: Some(blame.to_string()) });
        }
        self.cause = Some(blame.to_string());
        self.load(context.now)
    }

    fn wait_for_workers(&mut self, blame: &Blame) -> bool {
        if !self.is_first_start {
            self.cause = Some(blame.to_string());
        }
        self.phase = Phase::Waiting;
        true
    }

    /// Nothing helps but the user. A served model stays in sight, since another worker may change that; a job ends and can be resumed.
    fn fail(&mut self, failure: ClusterFailure, context: &mut Context<'_>) -> bool {
        if self.is_first_start || self.is_training() {
            return self.give_up(failure, context);
        }
        self.phase = Phase::Failed { message: failure.to_string(), members: context.members.generation };
        true
    }

    /// Ends it, or the coordinator with it.
    pub(super) fn give_up(&mut self, failure: ClusterFailure, context: &mut Context<'_>) -> bool {
        if self.is_essential {
            context.fatal = Some(failure);
        } else {
            let told = RequestFailure::NotReady { state: failure.to_string() };
            self.stop(Some(failure), &told, context);
        }
        true
    }

    /// Stops all its engines, then ends. Its requests are `told` so.
    pub(super) fn stop(&mut self, failure: Option<ClusterFailure>, told: &RequestFailure, context: &mut Context<'_>) {
        if matches!(self.phase, Phase::Stopping { .. } | Phase::Ended { .. }) {
            return;
        }
        self.fail_requests(told, context);
        self.close_session(context);
        context.engines_changed = true;
        self.phase = Phase::Stopping { until: context.now + STOP_TIMEOUT, failure };
    }
}

/// Why the engines that were linked cannot go on.
fn trouble(deployment: &Deployment, members: &Members, now: Now) -> Option<Blame> {
    deployment.replaced(members).or_else(|| deployment.lost(members, now)).or_else(|| deployment.lost_rank(members))
}

//! How the model moves from phase to phase: waiting, loading, linking, ready, and back when something breaks.

use super::{
    Now,
    cluster::{Cluster, LINK_TIMEOUT, Phase, STOP_TIMEOUT},
    deployment::{Blame, Deployment},
    event::{ClusterFailure, Effect},
    members::Members,
    placement::{self, PlanOptions, WhyNot},
};
use mlx_cluster_common::{engine::NodeFacts, ids::Epoch, plan::Strategy, request::EngineLoad};
use std::{collections::BTreeSet, time::Duration};

/// After a worker came, others may come right behind it.
const SETTLE: Duration = Duration::from_millis(500);
/// And workers get this long to measure the ways between them; a plan is made without what is missing then.
const MEASURED_WITHIN: Duration = Duration::from_secs(2);
/// At the first start, a model that does not fit gets this long for one more worker.
const FIT_GRACE: Duration = Duration::from_secs(5);
/// Loading without any progress for so long has failed.
pub(super) const LOAD_STALL: Duration = Duration::from_secs(300);
/// After the session broke, workers get this long to say which engine died and of what.
pub(super) const ATTRIBUTION: Duration = Duration::from_millis(700);
/// The other ranks of a lead that hangs notice about when the coordinator does.
pub(super) const GROUP_ATTRIBUTION: Duration = Duration::from_secs(3);
/// Failed attempts to link before the coordinator gives up (first start) or has the engines replaced (later).
const LINK_ATTEMPTS: u32 = 6;
const LINK_PAUSE: Duration = Duration::from_millis(250);
const LINK_PAUSE_MAX: Duration = Duration::from_secs(4);
/// Deaths of one engine before the first start is given up.
const ENGINE_DEATHS: u32 = 5;

impl Cluster {
    /// Moves on if it can; false when nothing changes before the next event or [`deadline`](Self::deadline).
    pub(super) fn advance(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        let deployment = &self.deployment;
        self.members.forget(now, |node| deployment.as_ref().is_some_and(|deployment| deployment.is_on(node)));
        match &self.phase {
            Phase::Waiting => self.advance_waiting(now, effects),
            Phase::Loading { stalls_at } => self.advance_loading(now, *stalls_at, effects),
            Phase::Linking { pending, until, epoch } => {
                let (linked, late, epoch) = (pending.is_empty(), now >= *until, *epoch);
                self.advance_linking(now, linked, late, epoch, effects)
            }
            Phase::Opening { until, .. } => {
                let late = now >= *until;
                self.advance_opening(now, late, effects)
            }
            Phase::Ready { .. } => self.advance_ready(now, effects),
            Phase::Suspect { blame, until } => {
                let (told, late) = (blame.clone(), now >= *until);
                self.advance_suspect(told, late, now, effects)
            }
            Phase::Pausing { until } => now >= *until && self.load(now),
            Phase::Failed { members, .. } => {
                let same = *members == self.members.generation;
                !same && self.start_over(effects)
            }
            Phase::Draining { until } => {
                let late = now >= *until;
                self.advance_draining(now, late, effects)
            }
            Phase::Stopping { until, failure } => {
                if !(self.members.all_stopped() || now >= *until) {
                    return false;
                }
                effects.push(Effect::End(failure.clone()));
                self.phase = Phase::Stopped;
                true
            }
            Phase::Stopped => false,
        }
    }

    /// Blames the engine that a worker reports as dead, then whom the others of its group lost, then whoever was `told`.
    fn advance_suspect(&mut self, told: Blame, late: bool, now: Now, effects: &mut Vec<Effect>) -> bool {
        let Some(deployment) = &self.deployment else { return self.start_over(effects) };
        let members = &self.members;
        if let Some(blame) = deployment.replaced(members).or_else(|| deployment.gone(members)) {
            return self.break_off(&blame, now, effects);
        }
        if !late {
            return false;
        }
        let lost = deployment.lost_rank(members);
        // Its worker says that it runs, but it answers nobody.
        let hangs = lost.as_ref().is_some_and(|blame| deployment.is_as_linked(members, &blame.worker));
        if hangs {
            self.replace_engines(effects);
        }
        self.break_off(&lost.unwrap_or(told), now, effects)
    }

    fn advance_draining(&mut self, now: Now, late: bool, effects: &mut Vec<Effect>) -> bool {
        if let Some(blame) = self.deployment.as_ref().and_then(|deployment| trouble(deployment, &self.members, now)) {
            self.fail_requests(&blame, effects);
        }
        (late || self.requests.is_empty()) && self.stop(None, now, effects)
    }

    fn load(&mut self, now: Now) -> bool {
        self.phase = Phase::Loading { stalls_at: now + LOAD_STALL };
        true
    }

    fn start_over(&mut self, effects: &mut Vec<Effect>) -> bool {
        self.deployment = None;
        self.send_desired(effects);
        self.phase = Phase::Waiting;
        true
    }

    fn advance_waiting(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        if self.settings.model.is_none() {
            return false;
        }
        if self.deployment.as_ref().is_some_and(|deployment| deployment.all_connected(&self.members)) {
            return self.load(now);
        }
        let (found, wanted) = (self.members.connected().count(), self.settings.wanted_workers());
        if found < wanted {
            let waited = self.settings.wait.filter(|wait| self.is_first_start && now >= *wait);
            return match waited {
                Some(waited) => {
                    let cluster = self.settings.cluster.clone();
                    self.stop(Some(ClusterFailure::NoWorkers { cluster, found, wanted, waited }), now, effects)
                }
                None => false,
            };
        }
        let (since, measured) = (self.members.last_up, self.members.all_measured());
        now >= since + if measured { SETTLE } else { MEASURED_WITHIN } && self.deploy(now, effects)
    }

    /// Plans over who is connected, and has the workers carry it out.
    fn deploy(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        if let Some((members, why)) = &self.refusal
            && *members == self.members.generation
        {
            let given_up = self.is_first_start && now >= self.members.last_up + FIT_GRACE;
            let why = why.clone();
            return given_up && self.stop(Some(why.into()), now, effects);
        }
        let Some(model) = self.settings.model.clone() else { return false };
        let nodes: Vec<NodeFacts> = self.members.connected().map(|member| member.facts.clone()).collect();
        match placement::plan_again(
            &model.reckoned,
            &model.spec,
            &model.weights,
            &nodes,
            &self.members.links(),
            &self.plan_options(&model.name),
        ) {
            Ok(plan) => {
                self.generation += 1;
                self.refusal = None;
                effects.push(Effect::Planned(plan.clone()));
                let deployment = Deployment::new(plan, &model, &self.settings, self.generation);
                self.deployment = Some(deployment.with_weight_peers(&self.members));
                self.send_desired(effects);
                self.load(now)
            }
            Err(why) => self.refused(why, now, effects),
        }
    }

    fn refused(&mut self, why: WhyNot, now: Now, effects: &mut Vec<Effect>) -> bool {
        if self.is_first_start && why.is_usage() {
            return self.stop(Some(why.into()), now, effects);
        }
        if !self.is_first_start {
            self.cause = Some(match &self.cause {
                Some(cause) => format!("{cause}; without it: {why}"),
                None => why.to_string(),
            });
        }
        self.refusal = Some((self.members.generation, why));
        true
    }

    fn plan_options(&self, model: &str) -> PlanOptions {
        let min_workers = match self.settings.strategy {
            Strategy::Pipeline | Strategy::Tensor => self.settings.wanted_workers(),
            Strategy::Auto => 1,
        };
        PlanOptions {
            model: model.to_owned(),
            strategy: self.settings.strategy,
            split: self.settings.split.clone(),
            stages: self.settings.stages.clone(),
            optimize: self.settings.optimize,
            context_tokens: self.settings.context_tokens,
            caches: self.settings.caches,
            min_workers,
        }
    }

    fn advance_loading(&mut self, now: Now, stalls_at: Now, effects: &mut Vec<Effect>) -> bool {
        let Some(deployment) = &self.deployment else { return self.start_over(effects) };
        if let Some(blame) = deployment.lost(&self.members, now) {
            return self.wait_for_workers(&blame);
        }
        if let Some(failure) = deployment.failure(&self.members) {
            let (worker, cause, output) = (failure.worker.to_owned(), failure.cause.to_owned(), failure.output.to_vec());
            let given_up = failure.hopeless || (self.is_first_start && failure.count >= ENGINE_DEATHS);
            if given_up {
                return self.fail(ClusterFailure::Engine { worker, cause, output }, now, effects);
            }
        }
        if let Some(engine) = deployment.first_not_ready(&self.members) {
            let worker = deployment.name(engine);
            return now >= stalls_at && self.fail(ClusterFailure::Stalled { worker, waited: LOAD_STALL }, now, effects);
        }
        self.link(now, effects)
    }

    /// A new epoch: every engine drops what it had and connects to its next.
    fn link(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        let epoch = Epoch(self.epoch.0 + 1);
        let Some(deployment) = &mut self.deployment else { return false };
        let Some(links) = deployment.link(&self.members, epoch) else { return false };
        let limit = deployment.link_timeout();
        let pending = links.iter().map(|(engine, ..)| *engine).collect::<BTreeSet<_>>();
        for (engine, addresses, link) in links {
            let name = deployment.name(engine);
            effects.push(Effect::Link { epoch, engine, name, addresses, link });
        }
        self.epoch = epoch;
        self.load = EngineLoad::default();
        self.phase = Phase::Linking { epoch, pending, until: now + limit + Duration::from_secs(1) };
        true
    }

    fn advance_linking(&mut self, now: Now, linked: bool, late: bool, epoch: Epoch, effects: &mut Vec<Effect>) -> bool {
        if self.engines_changed(now) {
            return self.load(now);
        }
        let Some(deployment) = &self.deployment else { return self.start_over(effects) };
        if linked {
            let Some(addresses) = deployment.lead_addresses(&self.members) else { return self.load(now) };
            effects.push(Effect::OpenSession { epoch, name: deployment.lead_name(), addresses });
            self.phase = Phase::Opening { epoch, until: now + LINK_TIMEOUT + Duration::from_secs(1) };
            return true;
        }
        let limit = deployment.link_timeout();
        late && self.link_late(limit, now, effects)
    }

    fn advance_opening(&mut self, now: Now, late: bool, effects: &mut Vec<Effect>) -> bool {
        if self.engines_changed(now) {
            effects.push(Effect::CloseSession);
            return self.load(now);
        }
        if late {
            effects.push(Effect::CloseSession);
        }
        late && self.link_late(LINK_TIMEOUT, now, effects)
    }

    fn link_late(&mut self, limit: Duration, now: Now, effects: &mut Vec<Effect>) -> bool {
        let worker = self.deployment.as_ref().map(Deployment::lead_name).unwrap_or_default();
        self.link_failed(Blame { worker, message: format!("no answer within {} s", limit.as_secs()) }, now, effects);
        true
    }

    /// Whether there is no point in going on with the current epoch.
    fn engines_changed(&self, now: Now) -> bool {
        self.deployment.as_ref().is_none_or(|deployment| trouble(deployment, &self.members, now).is_some())
    }

    /// An attempt to link failed: another one follows, later each time.
    pub(super) fn link_failed(&mut self, blame: Blame, now: Now, effects: &mut Vec<Effect>) {
        let Some(deployment) = &mut self.deployment else { return };
        deployment.link_failures += 1;
        let failures = deployment.link_failures;
        if !self.is_first_start {
            self.cause = Some(blame.to_string());
        }
        let pause = LINK_PAUSE.saturating_mul(1 << failures.min(6)).min(LINK_PAUSE_MAX);
        self.phase = Phase::Pausing { until: now + pause };
        if failures < LINK_ATTEMPTS {
            return;
        }
        if self.is_first_start {
            let failure = ClusterFailure::Link { worker: blame.worker, message: blame.message };
            self.stop(Some(failure), now, effects);
        } else {
            self.replace_engines(effects);
        }
    }

    /// The same plan with new engines, in the hope that they fare better.
    fn replace_engines(&mut self, effects: &mut Vec<Effect>) {
        let (Some(model), Some(deployment)) = (self.settings.model.clone(), &self.deployment) else { return };
        self.generation += 1;
        let deployment = Deployment::new(deployment.plan.clone(), &model, &self.settings, self.generation);
        self.deployment = Some(deployment.with_weight_peers(&self.members));
        self.send_desired(effects);
    }

    fn advance_ready(&mut self, now: Now, effects: &mut Vec<Effect>) -> bool {
        let Some(deployment) = &self.deployment else { return self.start_over(effects) };
        let Some(blame) = trouble(deployment, &self.members, now) else { return false };
        effects.push(Effect::CloseSession);
        self.load = EngineLoad::default();
        // Who only lost another one may have been faster to say so than the other one's worker.
        self.phase = Phase::Suspect { blame, until: now + ATTRIBUTION };
        true
    }

    /// The epoch is over: its requests fail, and loading shows what is missing.
    fn break_off(&mut self, blame: &Blame, now: Now, effects: &mut Vec<Effect>) -> bool {
        self.fail_requests(blame, effects);
        self.cause = Some(blame.to_string());
        self.load(now)
    }

    fn wait_for_workers(&mut self, blame: &Blame) -> bool {
        if !self.is_first_start {
            self.cause = Some(blame.to_string());
        }
        self.phase = Phase::Waiting;
        true
    }

    /// Nothing helps but the user.
    fn fail(&mut self, failure: ClusterFailure, now: Now, effects: &mut Vec<Effect>) -> bool {
        if self.is_first_start {
            return self.stop(Some(failure), now, effects);
        }
        self.phase = Phase::Failed { message: failure.to_string(), members: self.members.generation };
        true
    }

    /// Stops all engines, then ends.
    fn stop(&mut self, failure: Option<ClusterFailure>, now: Now, effects: &mut Vec<Effect>) -> bool {
        let blame = Blame { worker: "the coordinator".into(), message: "it is stopping".into() };
        self.fail_requests(&blame, effects);
        effects.push(Effect::CloseSession);
        self.deployment = None;
        self.send_desired(effects);
        self.phase = Phase::Stopping { until: now + STOP_TIMEOUT, failure };
        true
    }

    /// When [`handle`](Self::handle) wants to be called with a tick, if nothing happens before.
    pub fn deadline(&self, now: Now) -> Option<Now> {
        let last_up = self.members.last_up;
        let phase: Vec<Now> = match &self.phase {
            Phase::Waiting => [Some(last_up + SETTLE), Some(last_up + MEASURED_WITHIN), Some(last_up + FIT_GRACE), self.settings.wait]
                .into_iter()
                .flatten()
                .collect(),
            Phase::Loading { stalls_at } => vec![*stalls_at],
            Phase::Linking { until, .. }
            | Phase::Opening { until, .. }
            | Phase::Suspect { until, .. }
            | Phase::Pausing { until }
            | Phase::Draining { until }
            | Phase::Stopping { until, .. } => vec![*until],
            Phase::Ready { .. } | Phase::Failed { .. } | Phase::Stopped => Vec::new(),
        };
        phase.into_iter().filter(|at| *at > now).chain(self.members.next_loss(now)).min()
    }
}

/// Why the engines that were linked cannot go on.
fn trouble(deployment: &Deployment, members: &Members, now: Now) -> Option<Blame> {
    deployment.replaced(members).or_else(|| deployment.lost(members, now)).or_else(|| deployment.lost_rank(members))
}

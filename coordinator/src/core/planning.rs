//! When an instance gets a plan: once its workers are there and measured, over the memory that other instances leave.

use super::{
    Now,
    deployment::Deployment,
    event::{ClusterFailure, Effect},
    instance::{Context, Instance, Phase},
    members::Members,
    placement::{self, PlanOptions, TrainingOptions, WhyNot},
    settings::{Kind, Settings, TrainingFacts, TrainingWork},
};
use mlx_cluster_common::{
    engine::NodeFacts,
    plan::{Plan, Strategy},
    training::TrainStrategy,
    units::Bytes,
};
use std::time::Duration;

/// After a worker came, others may come right behind it.
const SETTLE: Duration = Duration::from_millis(500);
/// And workers get this long to measure the ways between them; a plan is made without what is missing then.
const MEASURED_WITHIN: Duration = Duration::from_secs(2);
/// A job that lost a worker waits so long for it before it goes on without: one that is started again is soon back, and replicas that are fewer
/// would add up in another order.
const REJOIN: Duration = Duration::from_secs(10);
/// At the first start, a model that does not fit gets this long for one more worker, or for another instance to let go of memory.
const FIT_GRACE: Duration = Duration::from_secs(5);

impl Instance {
    pub(super) fn advance_waiting(&mut self, context: &mut Context<'_>) -> bool {
        let (members, now) = (context.members, context.now);
        if self.deployment.as_ref().is_some_and(|deployment| deployment.all_connected(members)) {
            self.refusal = None;
            return self.load(now);
        }
        if self.rejoin_until(members).is_some_and(|until| now < until) {
            return false;
        }
        let (found, wanted) = (members.connected().count(), self.wanted_workers(context.settings));
        if found < wanted {
            let waited = context.settings.wait.filter(|wait| self.is_first_start && now >= self.started + *wait);
            let Some(waited) = waited else { return false };
            let cluster = context.settings.cluster.clone();
            return self.give_up(ClusterFailure::NoWorkers { cluster, found, wanted, waited }, context);
        }
        let settled = members.last_up + if members.all_measured() { SETTLE } else { MEASURED_WITHIN };
        now >= settled && self.deploy(context)
    }

    /// Until when a job waits for workers that it lost.
    fn rejoin_until(&self, members: &Members) -> Option<Now> {
        let deployment = self.deployment.as_ref().filter(|_| self.is_training() && !self.is_first_start)?;
        let gone = deployment.plan.ranks().filter_map(|rank| members.get(&rank.node)?.gone_since());
        gone.max().map(|since| since + REJOIN)
    }

    /// Plans over who is connected, and has the workers carry it out.
    fn deploy(&mut self, context: &mut Context<'_>) -> bool {
        if let Some((situation, why)) = &self.refusal
            && *situation == context.situation
        {
            let given_up = self.is_first_start && context.now >= self.grace(context.members);
            let why = why.clone();
            return given_up && self.give_up(why, context);
        }
        match self.plan(context) {
            Ok(plan) => {
                self.refusal = None;
                self.most_ranks = self.most_ranks.max(plan.ranks().count());
                context.effects.push(Effect::Planned { instance: self.id, plan: plan.clone() });
                self.deployment = Some(self.deployment_of(plan, context));
                context.engines_changed = true;
                self.load(context.now)
            }
            Err(why) => self.refused(why, context),
        }
    }

    /// Tells a job that goes on with fewer workers than it had, once in each epoch and situation, when a plan would have more again.
    pub(super) fn look_for_more(&mut self, context: &mut Context<'_>) {
        let (Some(deployment), members) = (&self.deployment, context.members) else { return };
        let n = deployment.plan.ranks().count();
        let may_be = self.is_training() && n < self.most_ranks && n < members.connected().count();
        let now = Some((self.epoch, context.situation));
        if !may_be || context.now < members.last_up + MEASURED_WITHIN || self.looked_for_more == now {
            return;
        }
        self.looked_for_more = now;
        let Ok(plan) = self.plan(context) else { return };
        if plan.ranks().count() > n {
            let new = plan.ranks().filter(|rank| !deployment.is_on(&rank.node));
            let workers = new.map(|rank| rank.node_name.clone()).collect();
            context.effects.push(Effect::TrainingCouldGrow { instance: self.id, epoch: self.epoch, workers });
        }
    }

    /// Until when a model that does not fit at its first start is waited with.
    fn grace(&self, members: &Members) -> Now {
        members.last_up.max(self.started) + FIT_GRACE
    }

    fn plan(&self, context: &Context<'_>) -> Result<Plan, WhyNot> {
        let model = self.kind.model();
        let nodes: Vec<NodeFacts> = context.members.connected().map(|member| left_of(&member.facts, context)).collect();
        if let Kind::Training(facts) = &self.kind {
            let options = self.training_options(facts, context.settings);
            return placement::plan_training(&model.spec, &model.weights, &nodes, &context.members.links(), &options);
        }
        let options = self.plan_options(context.settings);
        placement::plan_again(&model.reckoned, &model.spec, &model.weights, &nodes, &context.members.links(), &options)
    }

    /// What carries out a plan, under ids that were never used.
    pub(super) fn deployment_of(&self, plan: Plan, context: &mut Context<'_>) -> Deployment {
        let run = format!("{}-{}-{}", context.settings.run, self.id, context.counters.next_generation());
        Deployment::new(plan, &self.kind, &self.settings, &run).with_weight_peers(context.members)
    }

    fn refused(&mut self, why: WhyNot, context: &mut Context<'_>) -> bool {
        if self.is_first_start && why.is_usage() {
            return self.give_up(why.into(), context);
        }
        let others = context.others.values();
        let nodes = || context.members.connected().map(|member| &member.facts.id);
        let taken = |other: &Instance| nodes().map(|node| other.reserved(node).0).sum::<u64>();
        let takers: Vec<_> = others.map(|other| (other.name(), taken(other))).filter(|(_, taken)| *taken > 0).collect();
        let failure = match why {
            WhyNot::DoesNotFit { .. }
            | WhyNot::ShareDoesNotFit { .. }
            | WhyNot::TrainingDoesNotFit { .. }
            | WhyNot::TrainingShareDoesNotFit { .. }
                if !takers.is_empty() =>
            {
                ClusterFailure::DoesNotFitBeside {
                    why,
                    taken: Bytes(takers.iter().map(|(_, taken)| taken).sum()),
                    by: takers.into_iter().map(|(name, _)| name).collect::<Vec<_>>().join(" and "),
                }
            }
            why => why.into(),
        };
        self.refusal = Some((context.situation, failure));
        true
    }

    fn plan_options(&self, settings: &Settings) -> PlanOptions {
        let own = &self.settings;
        let min_workers = match own.strategy {
            Strategy::Pipeline | Strategy::Tensor => self.wanted_workers(settings),
            Strategy::Auto => 1,
        };
        PlanOptions {
            model: self.kind.model().name.clone(),
            strategy: own.strategy,
            split: own.split.clone(),
            stages: own.stages.clone(),
            optimize: own.optimize,
            context_tokens: own.context_tokens,
            caches: own.caches,
            min_workers,
        }
    }

    fn training_options(&self, facts: &TrainingFacts, settings: &Settings) -> TrainingOptions {
        let TrainingWork { strategy, batch_size, max_seq_length, tokens_per_row_max, accumulation } = facts.work.clone();
        let min_workers = if strategy == TrainStrategy::Auto { 1 } else { self.wanted_workers(settings) };
        TrainingOptions {
            model: facts.model.name.clone(),
            role: facts.role.clone(),
            strategy,
            batch_size,
            max_seq_length,
            tokens_per_row_max,
            accumulation,
            min_workers,
            split: self.settings.split.clone(),
        }
    }

    /// When it wants to [`advance`](Self::advance), if nothing happens before.
    pub(super) fn deadline(&self, members: &Members, settings: &Settings, now: Now) -> Option<Now> {
        let last_up = members.last_up;
        let waits = match &self.phase {
            Phase::Waiting => vec![
                last_up + SETTLE,
                last_up + MEASURED_WITHIN,
                self.grace(members),
                self.rejoin_until(members).unwrap_or(Now::ZERO),
                settings.wait.map_or(Now::ZERO, |wait| self.started + wait),
            ],
            Phase::Loading { stalls_at } => vec![*stalls_at],
            Phase::Linking { until, .. }
            | Phase::Adapting { until, .. }
            | Phase::Opening { until, .. }
            | Phase::Suspect { until, .. }
            | Phase::Pausing { until }
            | Phase::Stopping { until, .. } => vec![*until],
            Phase::Ready { .. } if self.is_training() => vec![last_up + MEASURED_WITHIN],
            Phase::Ready { .. } | Phase::Failed { .. } | Phase::Ended { .. } => Vec::new(),
        };
        waits.into_iter().filter(|at| *at > now).min()
    }
}

/// A node as the planner shall see it: with the memory that the engines of other instances do not take.
fn left_of(node: &NodeFacts, context: &Context<'_>) -> NodeFacts {
    let reserved: u64 = context.others.values().map(|other| other.reserved(&node.id).0).sum();
    NodeFacts { usable_memory: Bytes(node.usable_memory.0.saturating_sub(reserved)), ..node.clone() }
}

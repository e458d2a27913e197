//! The adapters of the served model: where each is in its life, and whether it has room.
//!
//! Engines forget their adapters when they are linked, so all of them are loaded again in every epoch, before the session opens.

use super::{
    deployment::Blame,
    event::{ClusterFailure, Effect},
    instance::{Context, Instance, LINK_TIMEOUT, Phase},
};
use crate::serving::{AdapterState, AdapterStatus, RequestFailure};
use mlx_cluster_common::{
    ids::{AdapterId, Epoch},
    plan::Rank,
    spec::{ModelSpec, Part},
    units::Bytes,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

/// Adapters of a model at the same time. Each makes every step with any of them a little larger.
pub const ADAPTERS_MAX: usize = 16;
/// An engine has an adapter in place within this.
pub const ADAPTER_TIMEOUT: Duration = Duration::from_secs(120);

/// An adapter that was read and fits to the model.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFacts {
    /// As requests name it.
    pub name: String,
    /// Of the file, on the coordinator's machine.
    pub path: String,
    pub rank: u32,
    pub is_dora: bool,
    /// Matrices that it changes.
    pub modules: usize,
    /// In the engines' memory, by the part of the model.
    pub bytes: BTreeMap<Part, u64>,
}

impl AdapterFacts {
    pub fn total(&self) -> Bytes {
        Bytes(self.bytes.values().sum())
    }

    /// On an engine with these layers; ranks of a group hold at most so much.
    fn on(&self, spec: &ModelSpec, layers: &Range<u32>) -> u64 {
        spec.parts_of(layers.clone()).iter().filter_map(|part| self.bytes.get(part)).sum()
    }
}

/// Why an engine has not loaded an adapter.
#[derive(Debug, Clone, PartialEq)]
pub enum AdapterFailure {
    /// Its file, or the engine, says that it cannot be used.
    Unusable(String),
    /// The engine did not answer.
    Unreachable(String),
}

/// What became of an adapter that somebody waits for.
pub type AdapterOutcome = Result<(), String>;

#[derive(Debug)]
enum State {
    /// On these engines; on none until the engines are linked.
    Loading {
        pending: BTreeSet<u32>,
    },
    Ready,
    /// Until the engines are linked anew.
    Failed {
        message: String,
    },
    /// No request may have it any more. The lead waits for those that do, then the others drop it too.
    Leaving,
}

#[derive(Debug)]
struct Entry {
    facts: Arc<AdapterFacts>,
    state: State,
    /// Has been ready, or is tried again and again because the user gave it at the start.
    stays: bool,
}

/// All adapters of an instance.
#[derive(Debug, Default)]
pub(super) struct Adapters {
    all: BTreeMap<AdapterId, Entry>,
}

impl Adapters {
    pub(super) fn status(&self) -> Vec<AdapterStatus> {
        let status = |(id, entry): (&AdapterId, &Entry)| AdapterStatus {
            id: *id,
            facts: Arc::clone(&entry.facts),
            state: match &entry.state {
                State::Loading { .. } => AdapterState::Loading,
                State::Ready => AdapterState::Ready,
                State::Failed { message } => AdapterState::Failed { message: message.clone() },
                State::Leaving => AdapterState::Leaving,
            },
        };
        self.all.iter().map(status).collect()
    }

    /// Why a request cannot have this adapter now, if so.
    pub(super) fn refusal(&self, adapter: Option<AdapterId>) -> Option<RequestFailure> {
        let id = adapter?;
        let Some(entry) = self.all.get(&id).filter(|entry| !matches!(entry.state, State::Leaving)) else {
            return Some(RequestFailure::Refused { message: "the adapter was dropped while the request was read".into() });
        };
        let name = &entry.facts.name;
        let state = match &entry.state {
            State::Ready | State::Leaving => return None,
            State::Loading { .. } => format!("adapter `{name}` is being loaded"),
            State::Failed { message } => format!("adapter `{name}` could not be loaded: {message}"),
        };
        Some(RequestFailure::NotReady { state })
    }

    fn is_loading(&self) -> bool {
        self.all.values().any(|entry| matches!(entry.state, State::Loading { .. }))
    }
}

impl Instance {
    /// Takes an adapter in: at once when the engines are linked, else with them. `is_given` when the user gave it at the start.
    pub(super) fn load_adapter(&mut self, id: AdapterId, facts: Arc<AdapterFacts>, is_given: bool, context: &mut Context<'_>) {
        if let Some(message) = self.no_room_for(&facts, context) {
            context.effects.push(Effect::AdapterSettled { adapter: id, outcome: Err(message) });
            return;
        }
        self.adapters.all.insert(id, Entry { facts, state: State::Loading { pending: BTreeSet::new() }, stays: is_given });
        if self.is_ready() {
            self.send_adapter(id, context);
        }
    }

    /// Takes an adapter away from new requests, and its memory back when those that have it are over.
    pub(super) fn drop_adapter(&mut self, id: AdapterId, context: &mut Context<'_>) {
        let (is_ready, epoch) = (self.is_ready(), self.epoch);
        let Some(entry) = self.adapters.all.get_mut(&id) else { return };
        if !is_ready {
            self.adapters.all.remove(&id);
            context.effects.push(Effect::AdapterSettled { adapter: id, outcome: Err("it was dropped while it was loaded".into()) });
            return;
        }
        entry.state = State::Leaving;
        self.tell_to_drop(id, epoch, 0..1, context);
    }

    /// The engines were linked: all adapters are to be loaded before the session opens. False when there are none.
    pub(super) fn load_adapters(&mut self, epoch: Epoch, context: &mut Context<'_>) -> bool {
        // Engines that were linked anew have forgotten them.
        self.forget_leaving(context);
        let ids: Vec<AdapterId> = self.adapters.all.keys().copied().collect();
        for id in &ids {
            let message = self.adapters.all.get(id).and_then(|entry| self.no_room_for(&entry.facts, context));
            match message {
                None => self.send_adapter(*id, context),
                Some(message) => self.adapter_failed(*id, message, context),
            }
        }
        self.phase = Phase::Adapting { epoch, until: context.now + ADAPTER_TIMEOUT + Duration::from_secs(1) };
        !ids.is_empty()
    }

    /// True when the session can be opened.
    pub(super) fn has_adapters_in_place(&self) -> bool {
        !self.adapters.is_loading()
    }

    pub(super) fn adapter_loaded(
        &mut self,
        epoch: Epoch,
        engine: u32,
        id: AdapterId,
        result: Result<(), AdapterFailure>,
        context: &mut Context<'_>,
    ) {
        let is_current = epoch == self.epoch && matches!(self.phase, Phase::Adapting { .. } | Phase::Ready { .. });
        let Some(entry) = self.adapters.all.get_mut(&id).filter(|_| is_current) else { return };
        let State::Loading { pending } = &mut entry.state else { return };
        match result {
            Ok(()) => {
                pending.remove(&engine);
                if pending.is_empty() {
                    (entry.state, entry.stays) = (State::Ready, true);
                    context.effects.push(Effect::AdapterSettled { adapter: id, outcome: Ok(()) });
                }
            }
            Err(AdapterFailure::Unreachable(message)) if matches!(self.phase, Phase::Adapting { .. }) => {
                let worker = self.deployment.as_ref().map(|deployment| deployment.name(engine)).unwrap_or_default();
                self.link_failed(Blame { worker, message }, context);
            }
            Err(AdapterFailure::Unusable(message) | AdapterFailure::Unreachable(message)) => self.adapter_failed(id, message, context),
        }
    }

    pub(super) fn adapter_dropped(&mut self, epoch: Epoch, engine: u32, id: AdapterId, context: &mut Context<'_>) {
        let is_leaving = self.adapters.all.get(&id).is_some_and(|entry| matches!(entry.state, State::Leaving));
        if epoch != self.epoch || !is_leaving || engine != 0 {
            return;
        }
        let engines = self.deployment.as_ref().map_or(0, |deployment| deployment.engines.len() as u32);
        self.tell_to_drop(id, epoch, 1..engines, context);
        self.adapters.all.remove(&id);
        context.effects.push(Effect::AdapterSettled { adapter: id, outcome: Err("it was dropped".into()) });
    }

    /// The session opens when all adapters are there.
    pub(super) fn advance_adapting(&mut self, late: bool, epoch: Epoch, context: &mut Context<'_>) -> bool {
        if self.engines_changed(context) {
            return self.load(context.now);
        }
        if !self.has_adapters_in_place() {
            return late && self.link_late(ADAPTER_TIMEOUT, context);
        }
        let Some(deployment) = &self.deployment else { return self.start_over(context) };
        let Some(addresses) = deployment.lead_addresses(context.members) else { return self.load(context.now) };
        context.effects.push(Effect::OpenSession { epoch, name: deployment.lead_name(), addresses });
        self.phase = Phase::Opening { epoch, until: context.now + LINK_TIMEOUT + Duration::from_secs(1) };
        true
    }

    fn send_adapter(&mut self, id: AdapterId, context: &mut Context<'_>) {
        let Some(deployment) = &self.deployment else { return };
        let Some(engines) = deployment.engines_at(context.members) else { return };
        let pending = engines.iter().map(|engine| engine.number).collect();
        if let Some(entry) = self.adapters.all.get_mut(&id) {
            entry.state = State::Loading { pending };
        }
        for (engine, spec) in engines.into_iter().zip(&deployment.engines) {
            let layers = spec.layers.clone();
            context.effects.push(Effect::LoadAdapter { epoch: self.epoch, engine, layers, adapter: id });
        }
    }

    fn tell_to_drop(&self, id: AdapterId, epoch: Epoch, engines: Range<u32>, context: &mut Context<'_>) {
        let at = self.deployment.as_ref().and_then(|deployment| deployment.engines_at(context.members)).unwrap_or_default();
        let told = at.into_iter().filter(|engine| engines.contains(&engine.number));
        context.effects.extend(told.map(|engine| Effect::DropAdapter { epoch, engine, adapter: id }));
    }

    /// One that was given at the start of a coordinator that never was ready ends it; one that was ready before stays in sight.
    fn adapter_failed(&mut self, id: AdapterId, message: String, context: &mut Context<'_>) {
        let Some(entry) = self.adapters.all.get_mut(&id) else { return };
        let name = entry.facts.name.clone();
        if entry.stays {
            entry.state = State::Failed { message: message.clone() };
            if self.is_first_start && self.is_essential {
                self.give_up(ClusterFailure::Adapter { name, message }, context);
            }
            return;
        }
        self.adapters.all.remove(&id);
        let engines = self.deployment.as_ref().map_or(0, |deployment| deployment.engines.len() as u32);
        self.tell_to_drop(id, self.epoch, 0..engines, context);
        context.effects.push(Effect::AdapterSettled { adapter: id, outcome: Err(message) });
    }

    fn forget_leaving(&mut self, context: &mut Context<'_>) {
        let leaving: Vec<AdapterId> =
            self.adapters.all.iter().filter(|(_, entry)| matches!(entry.state, State::Leaving)).map(|(id, _)| *id).collect();
        for id in leaving {
            self.adapters.all.remove(&id);
            context.effects.push(Effect::AdapterSettled { adapter: id, outcome: Err("it was dropped".into()) });
        }
    }

    /// What adapters take of an engine with these layers, but for the one of this name.
    pub(super) fn adapters_on(&self, layers: &Range<u32>, but: Option<&str>) -> Bytes {
        let spec = &self.kind.model().spec;
        let counted = self.adapters.all.values().map(|entry| &entry.facts).filter(|facts| Some(facts.name.as_str()) != but);
        Bytes(counted.map(|facts| facts.on(spec, layers)).sum())
    }

    /// Why a worker has no memory for it beside the plan and the adapters that are there, if so.
    fn no_room_for(&self, facts: &AdapterFacts, context: &Context<'_>) -> Option<String> {
        let deployment = self.deployment.as_ref()?;
        let spec = &self.kind.model().spec;
        let stages = deployment.plan.stages.iter();
        let mut ranks = stages.flat_map(|stage| stage.ranks.iter().map(|rank| (rank, &stage.layers)));
        ranks.find_map(|(rank, layers): (&Rank, _)| {
            let of_others: u64 = context.others.values().map(|other| other.reserved(&rank.node).0).sum();
            let on_worker = context.members.get(&rank.node).map_or(rank.usable, |member| member.facts.usable_memory);
            let usable = Bytes(rank.usable.0.min(on_worker.0.saturating_sub(of_others)));
            let taken = self.adapters_on(layers, Some(&facts.name));
            let (wanted, free) = (facts.on(spec, layers), usable.0.saturating_sub(rank.needed().0).saturating_sub(taken.0));
            (wanted > free).then(|| {
                format!(
                    "adapter `{}` takes {} on worker {}, where {} are free beside the model ({} of {}) and other adapters ({}): \
                     start the coordinator with a shorter --context, or drop other adapters",
                    facts.name,
                    Bytes(wanted),
                    rank.node_name,
                    Bytes(free),
                    rank.needed(),
                    usable,
                    taken
                )
            })
        })
    }
}

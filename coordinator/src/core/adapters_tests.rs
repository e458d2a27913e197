//! Adapters of the served model in the pretended cluster: on all engines before anybody can ask for them, in every epoch.

use super::{
    adapters::{AdapterFacts, AdapterFailure},
    event::Event,
    world::{World, ms},
};
use crate::serving::{AdapterState, Admitted, InstanceState, RequestEvent, RequestFailure};
use mlx_cluster_common::{
    ids::{AdapterId, SequenceId},
    plan::Strategy,
    request::FinishReason,
    sampling::SamplingParams,
    spec::Part,
};
use std::{collections::BTreeMap, sync::Arc};

const ADAPTER: AdapterId = AdapterId(1);

fn facts(name: &str, bytes: u64) -> Arc<AdapterFacts> {
    let bytes = BTreeMap::from([(Part::Layer(0), bytes)]);
    Arc::new(AdapterFacts { name: name.into(), path: format!("/adapters/{name}"), rank: 4, is_dora: false, modules: 1, bytes })
}

fn load(world: &mut World, adapter: AdapterId, bytes: u64) {
    let name = format!("a{adapter}");
    world.tell(Event::LoadAdapter { adapter, facts: facts(&name, bytes), is_given: false });
}

fn ask(world: &mut World, sequence: u64, adapter: AdapterId) -> SequenceId {
    let sequence = SequenceId(sequence);
    let request = Admitted { prompt: vec![1], params: SamplingParams::default(), adapter: Some(adapter) };
    world.answers.insert(sequence, Vec::new());
    world.tell(Event::Submitted { sequence, request });
    sequence
}

fn end(world: &World, sequence: SequenceId) -> RequestEvent {
    world.ends_of(sequence).first().map(|event| (*event).clone()).expect("it ended")
}

#[test]
fn an_adapter_can_be_asked_for_once_all_engines_have_it() {
    let mut world = World::ready(2, Strategy::Pipeline, 1);
    load(&mut world, ADAPTER, 1000);
    let early = ask(&mut world, 1, ADAPTER);
    assert!(
        matches!(end(&world, early), RequestEvent::Failed(RequestFailure::NotReady { state }) if state.contains("`a1` is being loaded"))
    );
    world.run(ms(1000));
    assert_eq!((world.settled.get(&ADAPTER), world.adapters.len()), (Some(&Ok(())), 2));
    let asked = ask(&mut world, 2, ADAPTER);
    world.run(ms(1000));
    assert_eq!(end(&world, asked), RequestEvent::Finished(FinishReason::Length));
}

#[test]
fn adapters_are_back_before_requests_whatever_died() {
    for seed in 0..30 {
        let strategy = if seed % 2 == 0 { Strategy::Pipeline } else { Strategy::Tensor };
        let mut world = World::ready(3, strategy, seed);
        [1, 2].into_iter().for_each(|id| load(&mut world, AdapterId(id), 1000));
        world.run(ms(seed * 3));
        world.engine_dies(&format!("w{}", seed % 3), Some(100));
        world.run(ms(20_000));
        assert_eq!(world.state(), InstanceState::Ready, "seed {seed}");
        let there = world.cluster.adapters();
        assert!(there.iter().all(|adapter| adapter.state == AdapterState::Ready), "seed {seed}: {there:?}");
        let epoch = *world.epochs.last().expect("an epoch");
        for adapter in &there {
            assert!((0..3).all(|engine| world.adapters.get(&(adapter.id, engine)) == Some(&epoch)), "seed {seed}");
            let asked = ask(&mut world, 10 + adapter.id.0, adapter.id);
            world.run(ms(1000));
            assert_eq!(end(&world, asked), RequestEvent::Finished(FinishReason::Length), "seed {seed}");
        }
    }
}

#[test]
fn a_dropped_adapter_leaves_every_engine_and_its_requests_are_refused() {
    let mut world = World::ready(2, Strategy::Pipeline, 3);
    load(&mut world, ADAPTER, 1000);
    world.run(ms(1000));
    world.tell(Event::DropAdapter { adapter: ADAPTER });
    let late = ask(&mut world, 1, ADAPTER);
    assert!(matches!(end(&world, late), RequestEvent::Failed(RequestFailure::Refused { message }) if message.contains("dropped")));
    world.run(ms(1000));
    assert!(world.adapters.is_empty() && world.cluster.adapters().is_empty());
    assert_eq!(world.state(), InstanceState::Ready);
}

#[test]
fn what_an_engine_cannot_use_is_gone_again_and_the_model_goes_on() {
    let mut world = World::ready(2, Strategy::Pipeline, 4);
    load(&mut world, ADAPTER, 1000);
    let epoch = *world.epochs.last().expect("an epoch");
    let result = Err(AdapterFailure::Unusable("it does not like it".into()));
    world.tell(Event::AdapterLoaded { epoch, engine: 1, adapter: ADAPTER, result });
    assert_eq!(world.settled.get(&ADAPTER), Some(&Err("it does not like it".into())));
    assert!(world.cluster.adapters().is_empty());
    assert_eq!(world.state(), InstanceState::Ready);
}

#[test]
fn an_adapter_without_room_is_refused_with_numbers() {
    let mut world = World::ready(2, Strategy::Pipeline, 5);
    load(&mut world, ADAPTER, 1 << 40);
    let Some(Err(message)) = world.settled.get(&ADAPTER) else { panic!("not refused") };
    assert!(message.starts_with("adapter `a1` takes 1.10 TB on worker w0, where 3.8 GB are free beside the model"), "{message}");
}

//! The state machine's promises, one situation each.

use super::{
    event::{ClusterFailure, Event},
    settings::InstanceSettings,
    world::{Start, World, ms, start},
};
use crate::serving::{InstanceState, RequestEvent, RequestFailure};
use mlx_cluster_common::{ids::InstanceId, plan::Strategy, request::FinishReason};

#[test]
fn two_workers_come_up_serve_and_stop() {
    let mut world = World::ready(2, Strategy::Pipeline, 1);
    assert_eq!((world.plans.len(), world.plans[0].stages.len(), world.epochs.len()), (1, 2, 1));
    let sequence = world.submit(1);
    world.run(ms(1000));
    assert_eq!(world.answers[&sequence].len(), 6);
    assert_eq!(world.ends_of(sequence), [&RequestEvent::Finished(FinishReason::Length)]);
    world.tell(Event::Drain { limit: ms(1000) });
    world.run(ms(4000));
    assert_eq!(world.ended, Some(None));
}

#[test]
fn a_dead_engine_is_named_and_the_model_comes_back() {
    let mut world = World::ready(3, Strategy::Pipeline, 2);
    let sequence = world.submit(1);
    world.run(ms(5));
    world.engine_dies("w1", Some(100));
    world.run(ms(200));
    assert!(matches!(world.state(), InstanceState::Recovering { .. }));
    let expected = RequestFailure::Broken { worker: "w1".into(), message: "its engine was killed by signal 9".into() };
    assert_eq!(world.ends_of(sequence), [&RequestEvent::Failed(expected)]);
    let early = world.submit(2);
    let message = format!("{:?}", world.ends_of(early));
    assert!(message.contains("NotReady") && message.contains("w1"), "{message}");
    world.run(ms(3000));
    assert_eq!((world.state(), world.plans.len(), world.epochs.len()), (InstanceState::Ready, 1, 2));
    let sequence = world.submit(3);
    world.run(ms(1000));
    assert_eq!(world.ends_of(sequence), [&RequestEvent::Finished(FinishReason::Length)]);
}

#[test]
fn of_a_group_the_dead_engine_is_named_and_not_those_that_lost_it() {
    for seed in 0..20 {
        let mut world = World::ready(3, Strategy::Tensor, seed);
        assert_eq!((world.plans[0].stages.len(), world.plans[0].stages[0].ranks.len()), (1, 3));
        let sequence = world.submit(1);
        world.run(ms(5));
        let victim = format!("w{}", seed % 3);
        world.engine_dies(&victim, Some(100));
        world.run(ms(900));
        let expected = RequestFailure::Broken { worker: victim, message: "its engine was killed by signal 9".into() };
        assert_eq!(world.ends_of(sequence), [&RequestEvent::Failed(expected)], "seed {seed}");
        world.run(ms(3000));
        assert_eq!((world.state(), world.plans.len()), (InstanceState::Ready, 1), "seed {seed}");
    }
}

#[test]
fn a_rank_that_hangs_is_named_by_the_others_and_replaced() {
    for victim in ["w1", "w2"] {
        let mut world = World::ready(3, Strategy::Tensor, 15);
        let first = world.submit(1);
        world.engine_hangs(victim);
        world.run(ms(10_000));
        let ends = format!("{:?}", world.ends_of(first));
        assert!(ends.contains("Finished") || ends.contains(&format!("lost rank 9 of worker {victim}")), "{ends}");
        world.run(ms(4000));
        assert_eq!((world.state(), world.plans.len()), (InstanceState::Ready, 1));
    }
}

#[test]
fn a_stream_that_breaks_shortly_changes_nothing() {
    let mut world = World::ready(2, Strategy::Pipeline, 3);
    let sequence = world.submit(1);
    world.worker_down("w1", false);
    world.run(ms(1000));
    world.worker_up("w1");
    world.run(ms(3000));
    assert_eq!((world.state(), world.epochs.len()), (InstanceState::Ready, 1));
    assert_eq!(world.ends_of(sequence), [&RequestEvent::Finished(FinishReason::Length)]);
}

#[test]
fn a_lost_worker_is_waited_for_and_the_others_keep_their_engines() {
    let mut world = World::ready(2, Strategy::Pipeline, 4);
    world.worker_down("w1", true);
    world.run(ms(5000));
    let state = world.state();
    assert!(matches!(&state, InstanceState::Recovering { cause } if cause.contains("w1")), "{state:?}");
    world.worker_up("w1");
    world.run(ms(5000));
    assert_eq!((world.state(), world.plans.len()), (InstanceState::Ready, 1), "the same plan");
}

#[test]
fn another_worker_takes_the_place_of_a_lost_one() {
    let mut world = World::ready(2, Strategy::Pipeline, 5);
    world.worker_up("w2");
    world.run(ms(1000));
    assert_eq!(world.plans.len(), 1, "a new worker alone is no reason to stop serving");
    world.worker_down("w0", true);
    world.run(ms(8000));
    assert_eq!((world.state(), world.plans.len()), (InstanceState::Ready, 2));
    let names: Vec<_> = world.plans[1].stages.iter().map(|stage| stage.ranks[0].node_name.as_str()).collect();
    assert_eq!(names, ["w1", "w2"]);
}

#[test]
fn a_worker_that_is_not_used_may_go() {
    let mut world = World::ready(1, Strategy::Auto, 6);
    world.worker_up("w1");
    world.run(ms(1000));
    world.worker_down("w1", true);
    world.run(ms(5000));
    assert_eq!((world.state(), world.plans.len(), world.epochs.len()), (InstanceState::Ready, 1, 1));
}

#[test]
fn hopeless_engines_end_the_first_start_with_their_own_words() {
    let mut world = World::new(start(1, Strategy::Auto), 7);
    world.worker_up("w0");
    world.run(ms(560));
    world.engine_dies("w0", None);
    world.run(ms(5000));
    let message = world.ended.clone().flatten().expect("a failure").to_string();
    assert!(message.contains("w0") && message.contains("signal 9") && message.contains("last words"), "{message}");
}

#[test]
fn hopeless_engines_later_leave_the_coordinator_standing() {
    let mut world = World::ready(1, Strategy::Auto, 8);
    world.engine_dies("w0", None);
    world.run(ms(5000));
    assert!(matches!(world.state(), InstanceState::Failed { .. }) && world.ended.is_none());
    world.worker_up("w1");
    world.run(ms(5000));
    assert_eq!(world.state(), InstanceState::Ready);
}

#[test]
fn nobody_comes() {
    let mut world = World::new(start(2, Strategy::Auto), 9);
    world.worker_up("w0");
    world.run(ms(119_000));
    assert_eq!(world.state(), InstanceState::WaitingForWorkers { found: 1, wanted: 2 });
    world.run(ms(10_000));
    assert!(matches!(world.ended, Some(Some(ClusterFailure::NoWorkers { found: 1, wanted: 2, .. }))));
}

#[test]
fn without_a_model_it_is_idle_once_the_workers_are_there() {
    let mut world = World::new(Start { model: None, ..start(1, Strategy::Auto) }, 10);
    assert_eq!(world.state(), InstanceState::WaitingForWorkers { found: 0, wanted: 1 });
    world.run(ms(500_000));
    world.worker_up("w0");
    world.run(ms(1000));
    assert_eq!(world.state(), InstanceState::Idle);
    world.tell(Event::Drain { limit: ms(0) });
    world.run(ms(3000));
    assert_eq!(world.ended, Some(None));
}

#[test]
fn a_model_that_does_not_fit_waits_for_one_more_worker_then_says_so() {
    let two = start(2, Strategy::Pipeline);
    let too_long = Start { own: InstanceSettings { split: Some(vec![3, 4]), ..two.own }, ..two };
    let mut world = World::new(too_long, 11);
    (0..2).for_each(|i| world.worker_up(&format!("w{i}")));
    world.run(ms(1000));
    world.run(ms(4000));
    assert!(matches!(world.ended, Some(Some(ClusterFailure::DoesNotFit(_)))), "{:?}", world.state());
}

#[test]
fn too_many_waiting_requests_are_refused_and_abandoned_ones_cancelled() {
    let mut world = World::ready(1, Strategy::Auto, 12);
    let sequences: Vec<_> = (1..=257).map(|i| world.submit(i)).collect();
    assert_eq!(world.ends_of(sequences[256]), [&RequestEvent::Failed(RequestFailure::Overloaded { waiting: 256 })]);
    assert!(world.is_at_lead(sequences[0]));
    world.abandon(sequences[0]);
    assert!(!world.is_at_lead(sequences[0]));
    world.run(ms(2000));
    assert!(world.answers[&sequences[0]].is_empty());
    assert!(sequences[1..].iter().all(|sequence| world.ends_of(*sequence).len() == 1));
}

#[test]
fn draining_finishes_what_runs() {
    let mut world = World::ready(2, Strategy::Pipeline, 13);
    let running = world.submit(1);
    world.tell(Event::Drain { limit: ms(5000) });
    let late = world.submit(2);
    assert!(matches!(world.ends_of(late)[..], [RequestEvent::Failed(RequestFailure::NotReady { .. })]));
    world.run(ms(5000));
    assert_eq!(world.ends_of(running), [&RequestEvent::Finished(FinishReason::Length)]);
    assert_eq!(world.ended, Some(None));
}

#[test]
fn engines_are_told_the_better_of_two_ways_first() {
    let world = World::ready(2, Strategy::Pipeline, 5);
    assert_eq!(world.links.len(), 2);
    for link in world.links.values() {
        let addresses = &link.next.as_ref().expect("a next one").addresses;
        assert!(addresses.len() == 2 && addresses[0].starts_with("10.1.") && addresses[1].starts_with("10.0."), "{addresses:?}");
    }
    let links = world.cluster.status(&[]).links;
    assert_eq!(links.len(), 4, "two ways in each direction");
}

#[test]
fn a_plan_waits_for_measurements_but_not_for_long() {
    let started = |measures: bool| {
        let mut world = World::new(start(2, Strategy::Pipeline), 6);
        world.measures = measures;
        ["w0", "w1"].into_iter().for_each(|name| world.worker_up(name));
        world
    };
    let mut measured = started(true);
    measured.run(ms(1000));
    assert_eq!(measured.plans.len(), 1);
    let mut unmeasured = started(false);
    unmeasured.run(ms(1900));
    assert_eq!(unmeasured.plans.len(), 0);
    unmeasured.run(ms(200));
    assert_eq!(unmeasured.plans.len(), 1);
    unmeasured.run(ms(5000));
    let link = &unmeasured.links[&(InstanceId::SERVED, 0)];
    let addresses = &link.next.as_ref().expect("a next one").addresses;
    assert!(unmeasured.state() == InstanceState::Ready && addresses[0].starts_with("10.0."), "as the worker names them");
}

#[test]
fn a_worker_that_leaves_takes_its_ways_with_it() {
    let mut world = World::ready(3, Strategy::Pipeline, 7);
    assert_eq!(world.cluster.status(&[]).links.len(), 12);
    world.worker_down("w2", true);
    world.run(ms(1000));
    assert_eq!(world.cluster.status(&[]).links.len(), 4);
    world.worker_up("w2");
    world.run(ms(1000));
    assert_eq!(world.cluster.status(&[]).links.len(), 12);
}

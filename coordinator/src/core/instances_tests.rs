//! Several instances on the same workers, one situation each: they do not disturb each other, and do not take each other's memory.

use super::{
    event::{ClusterFailure, Event},
    settings::{InstanceSettings, Kind},
    world::{Start, World, facts, ms, needed_to_train, start},
};
use crate::serving::{InstanceState, RequestEvent, RequestFailure};
use mlx_cluster_common::{
    engine::EngineState,
    ids::{Epoch, InstanceId},
    plan::Strategy,
    request::FinishReason,
    training::TrainStrategy,
};

const JOB: InstanceId = InstanceId(1);

fn idle(workers: usize) -> World {
    idle_with(workers, 4_000_000_000)
}

/// Workers with so much memory, and nothing on them.
fn idle_with(workers: usize, usable: u64) -> World {
    let mut world = World::new(Start { model: None, ..start(workers, Strategy::Auto) }, 3);
    world.usable = usable;
    (0..workers).for_each(|i| world.worker_up(&format!("w{i}")));
    world.run(ms(3000));
    assert_eq!(world.state(), InstanceState::Idle);
    world
}

/// A served model and a job over the same workers.
fn both(workers: usize, seed: u64) -> World {
    let mut world = World::ready(workers, Strategy::Pipeline, seed);
    world.start_job(JOB.0, TrainStrategy::Pipeline);
    world.run(ms(5000));
    assert!(world.jobs[&JOB].ready.is_some());
    world
}

fn job_state(world: &World, job: InstanceId) -> InstanceState {
    let jobs = world.cluster.status(&[]).jobs;
    jobs.into_iter().find(|status| status.instance == job).expect("a job").state
}

#[test]
fn a_job_gets_all_its_engines_and_no_session() {
    let mut world = idle(2);
    world.start_job(1, TrainStrategy::Pipeline);
    world.run(ms(3000));
    let runner = &world.jobs[&JOB];
    let engines: Vec<_> = runner.engines.iter().map(|engine| (engine.number, engine.stage, engine.rank, engine.name.as_str())).collect();
    assert_eq!(engines, [(0, 0, 0, "w0"), (1, 1, 0, "w1")]);
    assert!(runner.engines.iter().all(|engine| engine.addresses[0].ends_with(":9")), "{engines:?}");
    let (first, last) = (&world.links[&(JOB, 0)], &world.links[&(JOB, 1)]);
    assert_eq!(first.next.as_ref().map(|peer| peer.name.as_str()), Some("w1"));
    assert_eq!((&last.next, &first.ranks, &last.group), (&None, &vec![], &None), "nothing comes back to the first stage");
    assert_eq!((world.state(), job_state(&world, JOB)), (InstanceState::Idle, InstanceState::Ready));
}

#[test]
fn ranks_that_train_get_their_batches_from_outside() {
    let mut world = idle(2);
    world.start_job(1, TrainStrategy::Tensor);
    world.run(ms(3000));
    assert_eq!(world.jobs[&JOB].engines.iter().map(|engine| (engine.stage, engine.rank)).collect::<Vec<_>>(), [(0, 0), (0, 1)]);
    for number in 0..2 {
        let link = &world.links[&(JOB, number)];
        assert_eq!((&link.next, link.ranks.len(), link.group.as_ref().map(|group| group.names.len())), (&None, 0, Some(2)));
    }
}

#[test]
fn replicas_of_a_pipeline_are_linked_rank_by_rank() {
    // Not even one row fits on one worker.
    let mut world = idle_with(4, needed_to_train(1) - 1);
    world.start_job(1, TrainStrategy::Data);
    world.run(ms(3000));
    let places: Vec<_> = world.jobs[&JOB].engines.iter().map(|engine| (engine.stage, engine.rank, engine.name.as_str())).collect();
    assert_eq!(places, [(0, 0, "w0"), (0, 1, "w1"), (1, 0, "w2"), (1, 1, "w3")]);
    let next = |number: u32| world.links[&(JOB, number)].next.as_ref().map(|peer| peer.name.clone());
    assert_eq!([next(0), next(1), next(2), next(3)], [Some("w2".into()), Some("w3".into()), None, None]);
    let names = |number: u32| world.links[&(JOB, number)].group.as_ref().map(|group| group.names.clone());
    assert_eq!((names(1), names(2)), (Some(vec!["w0".into(), "w1".into()]), Some(vec!["w2".into(), "w3".into()])));
}

#[test]
fn the_engine_of_one_instance_dies_without_the_other_noticing() {
    let mut world = both(2, 4);
    let (request, served) = (world.submit(1), world.epochs[0]);
    world.engine_of_dies(JOB, "w1", Some(100));
    world.run(ms(3000));
    assert_eq!(world.ends_of(request), [&RequestEvent::Finished(FinishReason::Length)]);
    assert_eq!(world.jobs[&JOB].causes, ["worker w1: its engine was killed by signal 9"]);
    assert_eq!((world.state(), job_state(&world, JOB)), (InstanceState::Ready, InstanceState::Ready));
    assert_eq!((world.epochs.len(), world.jobs[&JOB].plans.len(), world.jobs[&JOB].epochs.len()), (3, 1, 2));
    let trained = world.jobs[&JOB].ready;
    world.engine_dies("w0", Some(100));
    world.run(ms(3000));
    assert_eq!((world.state(), world.jobs[&JOB].ready), (InstanceState::Ready, trained));
    assert!(world.epochs[3] > served && world.jobs[&JOB].epochs.len() == 2);
}

#[test]
fn a_runner_in_trouble_gets_a_new_epoch() {
    let mut world = both(2, 5);
    let before = world.jobs[&JOB].ready.expect("ready");
    let broken = |epoch, node: Option<&str>| Event::SessionBroken {
        instance: JOB,
        epoch,
        node: node.map(str::to_owned),
        message: "no answer".into(),
    };
    world.tell(broken(Epoch(before.0 - 1), None));
    assert_eq!(world.jobs[&JOB].ready, Some(before), "that epoch is over already");
    world.tell(broken(before, Some("id-w1")));
    world.run(ms(3000));
    assert_eq!(world.jobs[&JOB].causes, ["worker w1: no answer"]);
    assert!(world.jobs[&JOB].ready > Some(before) && world.state() == InstanceState::Ready);
}

#[test]
fn stopping_one_leaves_the_other() {
    let mut world = both(2, 6);
    let request = world.submit(1);
    world.tell(Event::Stop { instance: JOB });
    assert!(world.cluster.has(JOB) && job_state(&world, JOB) == InstanceState::Unloading);
    world.run(ms(1000));
    assert_eq!((&world.jobs[&JOB].ended, world.cluster.has(JOB)), (&Some(None), false));
    assert_eq!((world.ends_of(request), world.state()), (vec![&RequestEvent::Finished(FinishReason::Length)], InstanceState::Ready));
    assert!(world.cluster.status(&[]).workers.iter().all(|worker| worker.engines.len() == 1));

    let mut world = both(2, 7);
    let (trained, request) = (world.jobs[&JOB].ready, world.submit(1));
    world.tell(Event::Stop { instance: InstanceId::SERVED });
    let refused = RequestFailure::NotReady { state: "it is being unloaded".into() };
    assert_eq!(world.ends_of(request), [&RequestEvent::Failed(refused)]);
    world.run(ms(1000));
    assert_eq!((world.state(), &world.served_ends[..]), (InstanceState::Idle, &[None][..]));
    assert_eq!((world.jobs[&JOB].ready, job_state(&world, JOB)), (trained, InstanceState::Ready));
}

#[test]
fn a_lost_worker_re_plans_both() {
    let mut world = both(2, 8);
    world.worker_up("w2");
    world.run(ms(1000));
    world.worker_down("w0", true);
    world.run(ms(15_000));
    assert_eq!((world.state(), job_state(&world, JOB)), (InstanceState::Ready, InstanceState::Ready));
    for plan in [world.plans.last(), world.jobs[&JOB].plans.last()] {
        let names: Vec<_> = plan.into_iter().flat_map(|plan| plan.ranks()).map(|rank| rank.node_name.as_str()).collect();
        assert_eq!(names, ["w1", "w2"]);
    }
}

#[test]
fn a_job_goes_on_with_fewer_workers_than_it_began_with() {
    let mut world = idle(2);
    world.start_job(1, TrainStrategy::Pipeline);
    world.run(ms(3000));
    world.worker_down("w1", true);
    world.run(ms(15_000));
    assert_eq!(job_state(&world, JOB), InstanceState::Ready);
    assert_eq!(engines_of(&world, JOB), ["w0"]);
}

fn engines_of(world: &World, job: InstanceId) -> Vec<&str> {
    world.jobs[&job].engines.iter().map(|engine| engine.name.as_str()).collect()
}

#[test]
fn a_job_takes_workers_that_it_lost_again_once_it_has_kept_what_it_has() {
    for saves in [false, true] {
        let mut world = idle(3);
        world.saves = saves;
        world.start_job(1, TrainStrategy::Pipeline);
        world.run(ms(3000));
        world.worker_down("w1", true);
        world.worker_down("w2", true);
        world.run(ms(15_000));
        assert_eq!((engines_of(&world, JOB), world.jobs[&JOB].could_have.len()), (vec!["w0"], 0));
        world.worker_up("w2");
        world.run(ms(20_000));
        // Without an answer it is told once, and nothing changes.
        assert_eq!(world.jobs[&JOB].could_have, [["w2"]]);
        assert_eq!(engines_of(&world, JOB), if saves { vec!["w0", "w2"] } else { vec!["w0"] });
        world.worker_up("w1");
        world.worker_up("w3");
        world.run(ms(20_000));
        let wanted = if saves { vec!["w0", "w1", "w2", "w3"] } else { vec!["w0"] };
        assert_eq!((engines_of(&world, JOB), job_state(&world, JOB)), (wanted, InstanceState::Ready));
        assert_eq!(world.jobs[&JOB].could_have.len(), 2);
        world.run(ms(20_000));
        assert_eq!(world.jobs[&JOB].could_have.len(), 2, "it has as many as it ever had");
    }
}

#[test]
fn what_a_job_could_have_is_told_again_when_its_epoch_is_over() {
    let mut world = idle(2);
    world.saves = false;
    world.start_job(1, TrainStrategy::Pipeline);
    world.run(ms(3000));
    world.worker_down("w1", true);
    world.run(ms(15_000));
    world.worker_up("w1");
    world.run(ms(5000));
    let epoch = world.jobs[&JOB].ready.expect("it runs");
    world.tell(Event::SessionBroken { instance: JOB, epoch, node: None, message: "no answer".into() });
    world.run(ms(5000));
    assert!(world.jobs[&JOB].ready.is_some_and(|now| now > epoch));
    assert_eq!(world.jobs[&JOB].could_have, [["w1"], ["w1"]]);
}

#[test]
fn a_job_waits_a_little_for_a_worker_that_comes_back() {
    let mut world = idle(2);
    world.start_job(1, TrainStrategy::Pipeline);
    world.run(ms(3000));
    world.worker_down("w1", true);
    world.run(ms(7000));
    world.worker_up("w1");
    world.run(ms(3000));
    assert_eq!((job_state(&world, JOB), world.jobs[&JOB].plans.len()), (InstanceState::Ready, 1));
}

#[test]
fn the_ranks_of_a_group_start_again_together() {
    let mut world = idle(2);
    world.start_job(1, TrainStrategy::Tensor);
    world.run(ms(3000));
    let processes = |world: &World| -> Vec<u64> {
        let engines = world.cluster.status(&[]).workers.into_iter().flat_map(|worker| worker.engines);
        engines
            .filter_map(|engine| if let EngineState::Ready { incarnation, .. } = engine.state { Some(incarnation) } else { None })
            .collect()
    };
    let before = processes(&world);
    // As when a rank waits for orders, the other one notices nothing.
    world.engine_of_dies_unnoticed(JOB, "w1", Some(100));
    world.run(ms(3000));
    assert_eq!((job_state(&world, JOB), world.jobs[&JOB].epochs.len()), (InstanceState::Ready, 2));
    let after = processes(&world);
    assert!(before.len() == 2 && after.len() == 2 && after.iter().all(|process| !before.contains(process)), "{before:?} {after:?}");
}

#[test]
fn memory_is_promised_once() {
    // Two jobs with all of their rows at once would take one byte more.
    let mut world = idle_with(1, 2 * needed_to_train(4) - 1);
    let rows_at_once = |world: &World, job| world.jobs[&job].plans[0].training.as_ref().expect("it trains").micro_batch_rows;
    world.start_job(1, TrainStrategy::Auto);
    world.run(ms(3000));
    let first = world.jobs[&JOB].plans[0].ranks().map(|rank| rank.needed().0).sum::<u64>();
    let second = world.start_job(2, TrainStrategy::Auto);
    world.run(ms(1000));
    assert!(world.jobs[&second].plans[0].ranks().all(|rank| rank.usable.0 == world.usable - first), "what is left");
    assert_eq!((rows_at_once(&world, JOB), rows_at_once(&world, second)), (4, 2));
    let third = world.start_job(3, TrainStrategy::Auto);
    world.run(ms(1000));
    assert_eq!(job_state(&world, third), InstanceState::WaitingForWorkers { found: 1, wanted: 1 });
    world.run(ms(6000));
    let failure = world.jobs[&third].ended.clone().flatten().expect("a failure");
    assert!(matches!(&failure, ClusterFailure::DoesNotFitBeside { .. }), "{failure}");
    let words = ["the training does not fit with --strategy auto", "w0 has", "of their memory is taken by job 1 and job 2: wait"];
    assert!(words.iter().all(|words| failure.to_string().contains(words)), "{failure}");
    assert!(world.jobs[&JOB].ready.is_some() && world.jobs[&second].ready.is_some() && world.ended.is_none());
}

#[test]
fn a_job_that_does_not_fit_any_more_waits_for_memory_and_says_so() {
    let mut world = idle_with(2, needed_to_train(4) * 11 / 10);
    world.start_job(1, TrainStrategy::Auto);
    world.run(ms(3000));
    let second = world.start_job(2, TrainStrategy::Auto);
    world.run(ms(3000));
    let on = |world: &World, job| world.jobs[&job].engines.iter().map(|engine| engine.name.clone()).collect::<Vec<_>>();
    assert_eq!((on(&world, JOB), on(&world, second)), (vec!["w0".to_owned()], vec!["w1".to_owned()]));
    world.worker_down("w1", true);
    world.run(ms(20_000));
    let InstanceState::Recovering { cause } = job_state(&world, second) else { panic!("{:?}", job_state(&world, second)) };
    assert!(cause.starts_with("worker w1: connection lost") && cause.contains("does not fit") && cause.contains("w0 has"), "{cause}");
    assert_eq!(cause.matches("does not fit").count(), 1, "{cause}");
    world.tell(Event::Stop { instance: JOB });
    world.run(ms(3000));
    assert_eq!((job_state(&world, second), on(&world, second)), (InstanceState::Ready, vec!["w0".to_owned()]));
}

#[test]
fn what_ends_a_job_ends_it_alone() {
    let mut world = both(1, 11);
    world.engine_of_dies(JOB, "w0", None);
    world.run(ms(5000));
    let message = world.jobs[&JOB].ended.clone().flatten().expect("a failure").to_string();
    assert!(message.contains("worker w0: its engine was killed by signal 9") && message.contains("last words"), "{message}");
    assert_eq!((world.state(), world.ended.is_none()), (InstanceState::Ready, true));
}

#[test]
fn a_model_that_is_loaded_later_and_fails_leaves_the_coordinator() {
    let mut world = idle(1);
    let settings = InstanceSettings { split: Some(vec![3, 4]), ..InstanceSettings::default() };
    world.tell(Event::Start { instance: InstanceId::SERVED, kind: Kind::Serving(facts()), settings });
    world.run(ms(1000));
    world.worker_up("w1");
    world.run(ms(2000));
    let InstanceState::Failed { message } = world.state() else { panic!("{:?}", world.state()) };
    assert!(message.contains("--split 3,4 adds up to 7 layers") && world.ended.is_none(), "{message}");
    world.tell(Event::Start { instance: InstanceId::SERVED, kind: Kind::Serving(facts()), settings: InstanceSettings::default() });
    world.run(ms(3000));
    assert_eq!(world.state(), InstanceState::Ready);
    let request = world.submit(1);
    world.run(ms(1000));
    assert_eq!(world.ends_of(request), [&RequestEvent::Finished(FinishReason::Length)]);
}

#[test]
fn the_coordinator_ends_all_of_them() {
    let mut world = both(2, 12);
    let request = world.submit(1);
    world.tell(Event::Drain { limit: ms(5000) });
    world.start_job(2, TrainStrategy::Auto);
    assert_eq!(world.jobs[&InstanceId(2)].ended, Some(Some(ClusterFailure::Stopping)));
    world.run(ms(3000));
    assert_eq!(world.ends_of(request), [&RequestEvent::Finished(FinishReason::Length)]);
    assert_eq!((&world.jobs[&JOB].ended, world.ended), (&Some(None), Some(None)));
}

#[test]
fn a_job_may_save_before_the_coordinator_ends_but_not_for_ever() {
    let mut world = both(1, 13);
    world.saves = false;
    world.tell(Event::Drain { limit: ms(5000) });
    world.run(ms(4900));
    assert_eq!((world.jobs[&JOB].drains, job_state(&world, JOB), world.jobs[&JOB].ready.is_some()), (1, InstanceState::Ready, true));
    world.run(ms(1000));
    assert_eq!((&world.jobs[&JOB].ended, world.ended), (&Some(None), Some(None)));
}

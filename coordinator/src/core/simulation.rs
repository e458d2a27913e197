//! Random faults in a pretended cluster: whatever happens, every request ends once, the models come back, and one does not disturb the other.

use super::{
    event::Event,
    settings::InstanceSettings,
    world::{Start, World, ms, needed, start},
};
use crate::serving::InstanceState;
use mlx_cluster_common::{
    ids::{InstanceId, SequenceId},
    plan::{Strategy, ToldStage},
    training::TrainStrategy,
};

const SEEDS: u64 = 400;

fn fault(world: &mut World, workers: u64) {
    let name = format!("w{}", world.random.below(workers));
    match world.random.below(9) {
        0 | 1 => world.engine_dies(&name, Some(100)),
        8 => world.engine_hangs(&name),
        2 => world.worker_down(&name, true),
        3 => world.worker_down(&name, false),
        _ => world.worker_up(&name),
    }
}

fn hybrid() -> Vec<ToldStage> {
    ["w0+w1:0-3", "w2:4-5"].map(|stage| stage.parse().expect("a stage")).to_vec()
}

fn simulate(seed: u64) {
    let workers = 1 + seed % 3;
    let strategy = match seed % 4 {
        0 | 2 => Strategy::Pipeline,
        1 => Strategy::Auto,
        _ => Strategy::Tensor,
    };
    let mut world = match seed % 12 {
        // A pipeline of a group and one more.
        2 | 8 => {
            let plain = start(workers as usize, strategy);
            let own = InstanceSettings { stages: Some(hybrid()), ..plain.own };
            World::ready_with(Start { own, ..plain }, workers as usize, seed)
        }
        _ => World::ready(workers as usize, strategy, seed),
    };
    let mut sequences = Vec::new();
    for i in 0..60 {
        if world.random.below(3) == 0 {
            fault(&mut world, workers + 1);
        }
        let sequence = world.submit(1000 + i);
        sequences.push(sequence);
        if world.random.below(10) == 0 && world.ends_of(sequence).is_empty() {
            world.abandon(sequence);
        }
        let pause = world.random.below(1500);
        world.run(ms(pause));
    }
    // The faults end, and everybody comes back; an engine that hangs is replaced after some attempts to link it.
    (0..workers).for_each(|i| world.worker_up(&format!("w{i}")));
    world.run(ms(150_000));
    assert_eq!(world.state(), InstanceState::Ready, "after the faults");
    let unanswered = |sequence: &&SequenceId| world.ends_of(**sequence).len() != 1 && !world.abandoned.contains(sequence);
    assert_eq!(sequences.iter().find(unanswered), None, "every request ends once");
    assert!(world.epochs.windows(2).all(|pair| pair[0] < pair[1]), "no epoch is used twice");
    world.tell(Event::Drain { limit: ms(100) });
    world.run(ms(5000));
    assert_eq!(world.ended, Some(None));
}

#[test]
fn whatever_happens_every_request_ends_once_and_the_model_comes_back() {
    for seed in 0..SEEDS {
        let outcome = std::panic::catch_unwind(|| simulate(seed));
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

/// A fault of a worker, or of the engine of one of two instances.
fn fault_of_two(world: &mut World, workers: u64, job: InstanceId) {
    let name = format!("w{}", world.random.below(workers));
    let instance = if world.random.below(2) == 0 { InstanceId::SERVED } else { job };
    match world.random.below(8) {
        0 | 1 => world.engine_of_dies(instance, &name, Some(100)),
        2 => world.engine_of_hangs(instance, &name),
        3 => world.worker_down(&name, true),
        4 => world.worker_down(&name, false),
        _ => world.worker_up(&name),
    }
}

fn simulate_two(seed: u64) {
    let workers = 1 + seed % 3;
    let (served, trained) = match seed % 4 {
        0 => (Strategy::Pipeline, TrainStrategy::Tensor),
        1 => (Strategy::Auto, TrainStrategy::Pipeline),
        2 => (Strategy::Tensor, TrainStrategy::Auto),
        _ => (Strategy::Pipeline, TrainStrategy::Pipeline),
    };
    let mut world = World::new(start(workers as usize, served), seed);
    if seed % 5 < 3 {
        // Enough for two engines, not for three.
        world.usable = needed() * 3 / 2;
    }
    (0..workers).for_each(|i| world.worker_up(&format!("w{i}")));
    world.run(ms(10_000));
    let mut jobs = vec![world.start_job(1, trained)];
    world.run(ms(5000));
    assert!(world.jobs[&jobs[0]].ready.is_some());
    let mut sequences = Vec::new();
    for i in 0..60 {
        let job = jobs[jobs.len() - 1];
        match world.random.below(12) {
            0..4 => fault_of_two(&mut world, workers + 1, job),
            4 if world.cluster.has(job) && jobs.len() < 4 => {
                world.tell(Event::Stop { instance: job });
                jobs.push(world.start_job(job.0 + 1, trained));
            }
            _ => {}
        }
        sequences.push(world.submit(1000 + i));
        let pause = world.random.below(1500);
        world.run(ms(pause));
    }
    (0..workers).for_each(|i| world.worker_up(&format!("w{i}")));
    world.run(ms(150_000));
    assert_eq!(world.state(), InstanceState::Ready, "after the faults");
    let last = jobs.pop().expect("a job");
    assert!(jobs.iter().all(|job| world.jobs[job].ended == Some(None)), "stopped ones are gone");
    let runner = &world.jobs[&last];
    // One that was started amid faults may have been given up at its first start, with a cause.
    assert!(runner.ready.is_some() || (runner.epochs.is_empty() && matches!(runner.ended, Some(Some(_)))), "{runner:?}");
    assert!(sequences.iter().all(|sequence| world.ends_of(*sequence).len() == 1), "every request ends once");
    assert!(world.epochs.windows(2).all(|pair| pair[0] < pair[1]), "no epoch is used twice");
    world.tell(Event::Drain { limit: ms(100) });
    world.run(ms(5000));
    assert_eq!(world.ended, Some(None));
    assert!(world.jobs.values().all(|runner| runner.ended.is_some()), "every runner is told the end");
}

#[test]
fn whatever_happens_a_job_comes_back_beside_the_served_model() {
    for seed in 0..SEEDS {
        let outcome = std::panic::catch_unwind(|| simulate_two(seed));
        assert!(outcome.is_ok(), "seed {seed}");
    }
}

/// Faults of one instance's engines alone: the other one keeps its engines, its epoch and its answers.
#[test]
fn whatever_happens_to_the_engines_of_one_instance_the_other_goes_on() {
    for seed in 0..SEEDS / 4 {
        let (victim, is_job) = if seed % 2 == 0 { (InstanceId(1), true) } else { (InstanceId::SERVED, false) };
        let (served, trained) = match seed % 3 {
            0 => (Strategy::Tensor, TrainStrategy::Tensor),
            _ => (Strategy::Pipeline, TrainStrategy::Pipeline),
        };
        let mut world = World::ready(2, served, seed);
        let job = world.start_job(1, trained);
        world.run(ms(5000));
        let trained = world.jobs[&job].ready;
        let mut sequences = Vec::new();
        for i in 0..20 {
            let name = format!("w{}", world.random.below(2));
            match world.random.below(6) {
                0 | 1 => world.engine_of_dies(victim, &name, Some(100)),
                2 => world.engine_of_hangs(victim, &name),
                _ => {}
            }
            sequences.push(world.submit(1000 + i));
            let pause = world.random.below(1500);
            world.run(ms(pause));
        }
        world.run(ms(150_000));
        assert_eq!((world.state(), world.jobs[&job].ready.is_some()), (InstanceState::Ready, true), "seed {seed}");
        if is_job {
            let is_answered = |sequence: &SequenceId| world.answers[sequence].len() == 6;
            assert!(sequences.iter().all(is_answered), "seed {seed}: a request broke with an engine of the job");
        } else {
            assert_eq!(world.jobs[&job].ready, trained, "seed {seed}");
        }
    }
}

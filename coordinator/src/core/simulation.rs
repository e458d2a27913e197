//! Random faults in a pretended cluster: whatever happens, every request ends once, and the model comes back.

use super::{
    event::Event,
    settings::InstanceSettings,
    world::{Start, World, ms, start},
};
use crate::serving::InstanceState;
use mlx_cluster_common::{
    ids::SequenceId,
    plan::{Strategy, ToldStage},
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

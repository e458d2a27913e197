//! Engines that come up, die, wait, are given up and are stopped, on a clock that the tests move.

use super::*;
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    engine::ModelSource,
};

fn spec(id: &str, layers_end: u32) -> EngineSpec {
    EngineSpec {
        id: id.into(),
        model: ModelSource::Folder("/models/demo".into()),
        fingerprint: 1,
        stage: 0,
        n_stages: 1,
        layers: 0..layers_end,
        place: mlx_cluster_common::tensor::TensorPlace::alone(),
        collective: mlx_cluster_common::plan::Collective::Auto,
        context_tokens: 128,
        cache_tokens: 1024,
        sequences: 16,
        memory: Bytes(1 << 20),
        caches: CacheOptions::default(),
        reservation: CacheReservation::default(),
        weight_peers: Vec::new(),
        training: None,
    }
}

fn seconds(seconds: f64) -> Time {
    Time::from_secs_f64(seconds)
}

fn want(core: &mut Supervision, version: u64, engines: Vec<EngineSpec>, now: Time) -> Vec<Effect> {
    core.handle(Event::Wanted { version, engines }, now)
}

fn fetched(core: &mut Supervision, run: u64, now: Time) -> Vec<Effect> {
    core.handle(Event::Fetched { run: Run(run), folder: "/models/demo".into() }, now)
}

fn ready(core: &mut Supervision, run: u64, now: Time) {
    core.handle(Event::Said { run: Run(run), line: BootLine::Ready { port: 4000, group_port: 0 } }, now);
}

fn exited(core: &mut Supervision, run: u64, now: Time) -> Vec<Effect> {
    core.handle(Event::Exited { run: Run(run), cause: "engine exited with code 1".into(), output: vec!["boom".into()] }, now)
}

fn state(core: &Supervision, now: Time) -> EngineState {
    core.statuses(now).pop().expect("one engine").state
}

fn retry_in_ms(core: &Supervision, now: Time) -> Option<u64> {
    match state(core, now) {
        EngineState::Failed { retry_in_ms, .. } => retry_in_ms,
        other => panic!("{other:?}"),
    }
}

/// A supervision whose engine `a` is in service as run 1 since second 0.
fn serving() -> Supervision {
    let mut core = Supervision::new(0);
    want(&mut core, 1, vec![spec("a", 4)], seconds(0.0));
    fetched(&mut core, 1, seconds(0.0));
    ready(&mut core, 1, seconds(0.0));
    core
}

#[test]
fn an_engine_is_fetched_started_and_reported() {
    let mut core = Supervision::new(0);
    let now = seconds(0.0);
    let run = Run(1);
    assert_eq!(want(&mut core, 7, vec![spec("a", 4)], now), [Effect::Fetch { run, spec: spec("a", 4) }]);
    let line = Event::Fetching { run, file: "model.safetensors".into(), done: Bytes(1), total: Bytes(9) };
    assert_eq!(core.handle(line, now), []);
    assert!(matches!(state(&core, now), EngineState::Fetching { done: Bytes(1), .. }));
    assert_eq!(fetched(&mut core, 1, now), [Effect::Start { run, spec: spec("a", 4), folder: "/models/demo".into() }]);
    core.handle(Event::Said { run, line: BootLine::Loading { done_bytes: 2, total_bytes: 3 } }, now);
    assert_eq!(state(&core, now), EngineState::Loading { done: Bytes(2), total: Bytes(3) });
    ready(&mut core, 1, now);
    core.handle(Event::Resident { run, bytes: Bytes(99) }, now);
    assert_eq!(state(&core, now), EngineState::Ready { port: 4000, group_port: 0, incarnation: 1, resident: Bytes(99) });
    assert_eq!((core.version(), core.next_deadline()), (7, None));
    // The same wish again changes nothing.
    assert_eq!(want(&mut core, 8, vec![spec("a", 4)], now), []);
    assert_eq!(core.version(), 8);
}

#[test]
fn an_engine_that_dies_is_reported_and_started_again_without_fetching() {
    let mut core = serving();
    assert_eq!(exited(&mut core, 1, seconds(5.0)), []);
    let failed =
        EngineState::Failed { cause: "engine exited with code 1".into(), output: vec!["boom".into()], retry_in_ms: Some(200), lost: None };
    assert_eq!(state(&core, seconds(5.0)), failed);
    assert_eq!(core.next_deadline(), Some(seconds(5.2)));
    assert_eq!(core.handle(Event::Tick, seconds(5.1)), []);
    let started = core.handle(Event::Tick, seconds(5.2));
    assert_eq!(started, [Effect::Start { run: Run(2), spec: spec("a", 4), folder: "/models/demo".into() }]);
    // What the first process may still say does not count.
    ready(&mut core, 1, seconds(5.2));
    assert_eq!(state(&core, seconds(5.2)), EngineState::Loading { done: Bytes(0), total: Bytes(0) });
}

#[test]
fn failures_wait_longer_each_time_until_a_minute_of_good_service() {
    let mut core = serving();
    let mut now = seconds(1.0);
    let mut waits = Vec::new();
    for run in 1..=8 {
        exited(&mut core, run, now);
        let wait = retry_in_ms(&core, now).expect("tried again");
        waits.push(wait);
        now += Duration::from_millis(wait);
        core.handle(Event::Tick, now);
        ready(&mut core, run + 1, now);
    }
    assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
    exited(&mut core, 9, now + GOOD_SERVICE);
    assert_eq!(retry_in_ms(&core, now + GOOD_SERVICE), Some(200));
}

#[test]
fn an_engine_that_dies_while_loading_has_its_files_looked_at_again() {
    let mut core = Supervision::new(0);
    want(&mut core, 1, vec![spec("a", 4)], seconds(0.0));
    fetched(&mut core, 1, seconds(0.0));
    exited(&mut core, 1, seconds(0.0));
    assert_eq!(core.handle(Event::Tick, seconds(0.2)), [Effect::Fetch { run: Run(2), spec: spec("a", 4) }]);
}

#[test]
fn what_is_hopeless_is_not_tried_again() {
    let mut core = Supervision::new(0);
    let now = seconds(0.0);
    want(&mut core, 1, vec![spec("a", 4)], now);
    fetched(&mut core, 1, now);
    core.handle(Event::Said { run: Run(1), line: BootLine::Failed { cause: "no head".into(), hopeless: true, lost: None } }, now);
    assert_eq!(state(&core, now), EngineState::Failed { cause: "no head".into(), output: vec![], retry_in_ms: None, lost: None });
    exited(&mut core, 1, now);
    assert_eq!(
        state(&core, now),
        EngineState::Failed { cause: "no head".into(), output: vec!["boom".into()], retry_in_ms: None, lost: None }
    );
    assert_eq!((core.next_deadline(), core.handle(Event::Tick, seconds(1e6))), (None, vec![]));
    // Another wish is another chance.
    assert_eq!(want(&mut core, 2, vec![spec("a", 5)], now), [Effect::Fetch { run: Run(2), spec: spec("a", 5) }]);
    let failure = Failure { hopeless: true, ..Failure::passing("no folder".into()) };
    core.handle(Event::FetchFailed { run: Run(2), failure }, now);
    assert_eq!(retry_in_ms(&core, now), None);
}

#[test]
fn a_failed_fetch_is_tried_again() {
    let mut core = Supervision::new(0);
    want(&mut core, 1, vec![spec("a", 4)], seconds(0.0));
    let failure = Failure::passing("the hub cannot be reached".into());
    core.handle(Event::FetchFailed { run: Run(1), failure }, seconds(0.0));
    assert_eq!(retry_in_ms(&core, seconds(0.0)), Some(200));
    assert_eq!(core.handle(Event::Tick, seconds(0.2)), [Effect::Fetch { run: Run(2), spec: spec("a", 4) }]);
}

#[test]
fn an_engine_that_will_not_end_is_killed() {
    let mut core = serving();
    assert_eq!(want(&mut core, 2, vec![], seconds(10.0)), [Effect::CloseStdin { run: Run(1) }]);
    assert_eq!(core.statuses(seconds(10.0)), []);
    assert!(!core.is_idle());
    assert_eq!(core.next_deadline(), Some(seconds(13.0)));
    assert_eq!(core.handle(Event::Tick, seconds(13.0)), [Effect::Kill { run: Run(1) }]);
    assert_eq!(core.handle(Event::Tick, seconds(14.0)), []);
    exited(&mut core, 1, seconds(14.0));
    assert!(core.is_idle());
}

#[test]
fn a_new_engine_waits_for_the_memory_of_the_old_one() {
    let mut core = serving();
    let effects = want(&mut core, 2, vec![spec("a", 9)], seconds(1.0));
    assert_eq!(effects, [Effect::CloseStdin { run: Run(1) }, Effect::Fetch { run: Run(2), spec: spec("a", 9) }]);
    assert_eq!(fetched(&mut core, 2, seconds(1.0)), []);
    let started = exited(&mut core, 1, seconds(2.0));
    assert_eq!(started, [Effect::Start { run: Run(2), spec: spec("a", 9), folder: "/models/demo".into() }]);
}

#[test]
fn engines_outlive_a_broken_connection_but_not_their_coordinator() {
    let mut core = serving();
    core.handle(Event::Orphaned, seconds(10.0));
    core.handle(Event::Held, seconds(12.0));
    assert_eq!((core.version(), core.next_deadline()), (0, Some(seconds(13.0))), "it has not said yet that it wants them");
    assert_eq!(core.handle(Event::Tick, seconds(12.9)), []);
    assert_eq!(want(&mut core, 1, vec![spec("a", 4)], seconds(12.9)), [], "back in time");
    assert_eq!(core.next_deadline(), None);
    core.handle(Event::Orphaned, seconds(20.0));
    assert_eq!(core.next_deadline(), Some(seconds(23.0)));
    assert_eq!(core.handle(Event::Tick, seconds(23.0)), [Effect::CloseStdin { run: Run(1) }]);
    assert_eq!(core.version(), 0);
}

#[test]
fn an_engine_that_is_stuck_while_loading_is_killed_and_tried_again() {
    let mut core = Supervision::new(0);
    want(&mut core, 1, vec![spec("a", 4)], seconds(0.0));
    fetched(&mut core, 1, seconds(0.0));
    let stuck = LOAD_SILENCE_MAX;
    assert_eq!(core.next_deadline(), Some(stuck));
    assert_eq!(core.handle(Event::Tick, stuck), [Effect::Kill { run: Run(1) }]);
    exited(&mut core, 1, stuck);
    assert!(matches!(state(&core, stuck), EngineState::Failed { cause, .. } if cause.contains("said nothing")));
    assert_eq!(retry_in_ms(&core, stuck), Some(200));
}

#[test]
fn an_engine_that_failed_but_does_not_end_is_killed() {
    let mut core = serving();
    core.handle(
        Event::Said { run: Run(1), line: BootLine::Failed { cause: "GPU lost".into(), hopeless: false, lost: None } },
        seconds(1.0),
    );
    assert_eq!(core.handle(Event::Tick, seconds(4.0)), [Effect::Kill { run: Run(1) }]);
    assert_eq!(core.next_deadline(), None);
}

#[test]
fn an_engine_that_lost_another_one_says_so_and_is_back_soon_however_often() {
    let mut core = serving();
    let mut now = seconds(1.0);
    for run in 1..6 {
        let lost = BootLine::Failed { cause: "lost rank 1 (worker b)".into(), hopeless: false, lost: Some("b".into()) };
        core.handle(Event::Said { run: Run(run), line: lost }, now);
        exited(&mut core, run, now);
        assert!(matches!(state(&core, now), EngineState::Failed { lost: Some(lost), retry_in_ms: Some(200), .. } if lost == "b"));
        now += BACKOFF_MIN;
        core.handle(Event::Tick, now);
        ready(&mut core, run + 1, now);
    }
}

#[test]
fn shutdown_ends_everything_and_takes_no_new_wishes() {
    let mut core = serving();
    want(&mut core, 2, vec![spec("a", 4), spec("b", 4)], seconds(1.0));
    let effects = core.handle(Event::Shutdown, seconds(2.0));
    assert_eq!(effects, [Effect::CloseStdin { run: Run(1) }, Effect::CancelFetch { run: Run(2) }]);
    assert_eq!(want(&mut core, 3, vec![spec("c", 4)], seconds(2.0)), []);
    exited(&mut core, 1, seconds(2.5));
    assert!(core.is_idle());
}

//! Tensor-parallel groups: ranks that die or hang while they serve.

use crate::support::{Cluster, Setup, TinyModel, is_alive, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

/// From the kill of a rank to an error that names its worker.
const NAMED_WITHIN: Duration = Duration::from_secs(2);
/// Connections without a sign of life are given up after 8 s.
const SILENCE_NOTICED_WITHIN: Duration = Duration::from_secs(15);

fn group_of_two(model: &TinyModel) -> Cluster {
    let mut cluster = Setup::new(model.path(), 2).coordinator_args(&["--strategy", "tensor"]).start();
    cluster.wait_until_ready();
    cluster
}

/// Waits for the end of a stream, which is an error.
fn error_of(cluster: &Cluster, stream: impl Iterator<Item = Value>) -> String {
    let last = stream.last().unwrap();
    last["error"]["message"].as_str().unwrap_or_else(|| panic!("no error at the end: {last}\n{}", cluster.output())).to_owned()
}

#[test]
fn a_killed_rank_is_named_soon_no_process_hangs_and_the_group_comes_back() {
    let model = TinyModel::new();
    let mut cluster = group_of_two(&model);
    let before = cluster.complete(20).text().to_owned();
    for victim in ["worker1", "worker0"] {
        let engines = cluster.engines();
        let mut stream = cluster.stream(8000);
        stream.next().unwrap();
        cluster.kill_engine_of(victim);
        let killed = Instant::now();
        let message = error_of(&cluster, stream);
        assert!(killed.elapsed() < NAMED_WITHIN, "the stream ended only after {:?}\n{}", killed.elapsed(), cluster.output());
        assert!(message.contains(victim) && message.contains("signal 9"), "{message}\n{}", cluster.output());
        let gone = wait_until(SILENCE_NOTICED_WITHIN, || !engines.iter().any(|engine| is_alive(*engine)));
        assert!(gone, "an engine of the lost group still runs\n{}", cluster.output());
        cluster.wait_until_ready();
        assert_eq!(cluster.complete(20).text(), before);
    }
}

#[test]
fn a_rank_that_hangs_is_named_and_replaced() {
    let model = TinyModel::new();
    let mut cluster = group_of_two(&model);
    let before = cluster.complete(20).text().to_owned();
    let engines = cluster.engines();
    let mut stream = cluster.stream(8000);
    stream.next().unwrap();
    cluster.signal_engine_of("worker1", Signal::STOP);
    let stopped = Instant::now();
    let message = error_of(&cluster, stream);
    assert!(stopped.elapsed() < SILENCE_NOTICED_WITHIN, "the stream ended only after {:?}\n{}", stopped.elapsed(), cluster.output());
    assert!(message.contains("lost rank 1 of worker worker1"), "{message}\n{}", cluster.output());
    cluster.wait_until_ready();
    assert_eq!(cluster.complete(20).text(), before);
    assert!(!engines.iter().any(|engine| is_alive(*engine)), "an engine of the lost group still runs\n{}", cluster.output());
}

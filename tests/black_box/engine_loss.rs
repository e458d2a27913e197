//! Engines and workers that die while they serve.

use crate::support::{Cluster, TinyModel, is_alive, wait_until};
use std::time::Duration;

/// An engine notices within this time that its worker is gone.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(10);
/// From the kill to the end of the streams that the dead engine served.
const FAILURE_TIMEOUT: Duration = Duration::from_secs(15);

#[test]
fn requests_of_a_killed_engine_end_with_its_name_and_the_model_comes_back() {
    let model = TinyModel::new();
    for victim in ["worker0", "worker1"] {
        let mut cluster = Cluster::serving(model.path(), 2);
        let before = cluster.complete(20).text().to_owned();
        let mut stream = cluster.stream(8000);
        stream.next().unwrap();
        let engines = cluster.engines();
        cluster.kill_engine_of(victim);
        let killed = std::time::Instant::now();
        let last = stream.last().unwrap();
        assert!(killed.elapsed() < FAILURE_TIMEOUT, "the stream ended only after {:?}", killed.elapsed());
        let message = last["error"]["message"].as_str().unwrap_or_else(|| panic!("no error at the end: {last}\n{}", cluster.output()));
        assert!(message.contains(victim), "{message}");
        cluster.wait_until_ready();
        assert_eq!(cluster.complete(20).text(), before);
        assert_ne!(cluster.engines(), engines);
        cluster.process("coordinator").wait_for_output(&format!("worker {victim}: engine exited with signal 9"));
    }
}

#[test]
fn a_killed_worker_leaves_no_engine_and_a_new_one_takes_its_place() {
    let model = TinyModel::new();
    let mut cluster = Cluster::serving(model.path(), 2);
    let before = cluster.complete(20).text().to_owned();
    let orphans = cluster.process("worker1").children();
    assert_eq!(orphans.len(), 1);
    cluster.kill("worker1");
    assert!(wait_until(ORPHAN_TIMEOUT, || !is_alive(orphans[0])), "engine {} outlives its worker", orphans[0]);
    let noticed = wait_until(FAILURE_TIMEOUT, || cluster.health() == Some(503));
    assert!(noticed, "still healthy without worker1\n{}", cluster.output());
    cluster.start_worker("worker1");
    cluster.wait_until_ready();
    assert_eq!(cluster.complete(20).text(), before);
}

#[test]
fn workers_outlive_their_coordinator_and_serve_the_next_one() {
    let model = TinyModel::new();
    let mut cluster = Cluster::serving(model.path(), 2);
    let before = cluster.complete(20).text().to_owned();
    cluster.kill("coordinator");
    assert!(wait_until(ORPHAN_TIMEOUT, || cluster.engines().is_empty()), "engines without a coordinator\n{}", cluster.output());
    cluster.start_coordinator("coordinator");
    cluster.wait_until_ready();
    assert_eq!(cluster.complete(20).text(), before);
}

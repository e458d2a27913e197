//! How processes end: in order, in time, and without leaving anything behind.

use crate::support::{Cluster, TinyModel, is_alive, wait_until};
use rustix::process::Signal;
use std::time::Duration;

/// What users are promised.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn the_first_ctrl_c_lets_running_requests_finish() {
    let model = TinyModel::new();
    let mut cluster = Cluster::serving(model.path(), 2);
    let whole = cluster.complete(200).text().to_owned();
    let mut stream = cluster.stream(200);
    let first = stream.next().unwrap();
    cluster.process("coordinator").signal(Signal::INT);
    let events = std::iter::once(first).chain(stream);
    let text: String = events.filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned)).collect();
    assert_eq!(text, whole);
    let status = cluster.process_mut("coordinator").wait(STOP_TIMEOUT);
    assert_eq!(status.code(), Some(0), "{}", cluster.output());
    assert!(wait_until(STOP_TIMEOUT, || cluster.engines().is_empty()), "engines are left");
}

#[test]
fn a_second_ctrl_c_ends_at_once() {
    let model = TinyModel::new();
    let mut cluster = Cluster::serving(model.path(), 1);
    let mut stream = cluster.stream(8000);
    stream.next().unwrap();
    cluster.process("coordinator").signal(Signal::INT);
    cluster.process("coordinator").wait_for_output("stopping");
    cluster.process("coordinator").signal(Signal::INT);
    let status = cluster.process_mut("coordinator").wait(Duration::from_secs(2));
    assert_eq!(status.code(), Some(130), "{}", cluster.output());
}

#[test]
fn every_process_ends_in_time_when_it_is_told_to() {
    let model = TinyModel::new();
    let mut cluster = Cluster::serving(model.path(), 2);
    let mut stream = cluster.stream(8000);
    stream.next().unwrap();
    let engines = cluster.engines();
    let names = ["worker0", "coordinator", "worker1"];
    for name in names {
        cluster.process(name).signal(Signal::TERM);
    }
    for name in names {
        let status = cluster.process_mut(name).wait(STOP_TIMEOUT);
        assert_eq!(status.code(), Some(0), "{name}\n{}", cluster.output());
    }
    assert!(engines.iter().all(|engine| !is_alive(*engine)), "engines are left");
}

//! Under which addresses an engine is reached, by the coordinator and by its neighbours.

use mlx_cluster_common::{
    engine::NodeFacts,
    links::{self, LinkFacts},
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

const LOOPBACK: &str = "127.0.0.1";
/// Ways to one worker that are measured at most.
const MEASURED_MAX: usize = 8;

/// Addresses for the coordinator: first the host that answered it before.
pub(super) fn from_coordinator(reached: &str, to: &NodeFacts, port: u32) -> Vec<String> {
    with_port(std::iter::once(host(reached)).chain(hosts(to)), port)
}

/// Addresses for the engine on `from`, best first by what was measured between the two; what was not measured comes last.
pub(super) fn between(from: &NodeFacts, to: &NodeFacts, to_reached: &str, port: u32, links: &[LinkFacts]) -> Vec<String> {
    let ways = links::best_first(links, &from.id, &to.id);
    let mut hosts = hosts_between(from, to, to_reached);
    hosts.sort_by_key(|host| ways.iter().position(|way| way.address == *host).unwrap_or(usize::MAX));
    with_port(hosts, port)
}

/// Where the worker on `to` is, for the one on `from` to measure the ways there.
pub(super) fn to_measure(from: &NodeFacts, to: &NodeFacts, to_reached: &str) -> Vec<String> {
    let mut addresses = service_port(to).map(|port| with_port(hosts_between(from, to, to_reached), port)).unwrap_or_default();
    addresses.truncate(MEASURED_MAX);
    addresses
}

/// Loopback only on one machine.
fn hosts_between(from: &NodeFacts, to: &NodeFacts, to_reached: &str) -> Vec<String> {
    let reached = host(to_reached);
    if same_machine(from, to) {
        return std::iter::once(LOOPBACK.to_owned()).chain(hosts(to)).chain([reached]).collect();
    }
    hosts(to).into_iter().chain([reached]).filter(|host| !is_loopback(host)).collect()
}

/// Addresses of the service of the worker on `to`, for the worker on `from`, best first.
pub(super) fn of_worker(from: &NodeFacts, to: &NodeFacts, to_reached: &str, links: &[LinkFacts]) -> Vec<String> {
    service_port(to).map(|port| between(from, to, to_reached, port, links)).unwrap_or_default()
}

/// Of a worker's own service, which is at the same port of all its addresses.
fn service_port(node: &NodeFacts) -> Option<u32> {
    node.addresses.iter().find_map(|address| address.rsplit_once(':')?.1.parse().ok())
}

/// Two nodes with exactly the same addresses are on one machine. Some in common is not enough: every Mac with the same virtual
/// network has that one's address.
fn same_machine(a: &NodeFacts, b: &NodeFacts) -> bool {
    let outside = |node| hosts(node).into_iter().filter(|host| !is_loopback(host)).collect::<BTreeSet<_>>();
    outside(a) == outside(b)
}

fn hosts(node: &NodeFacts) -> Vec<String> {
    node.addresses.iter().map(|address| host(address)).filter(|host| !host.is_empty()).collect()
}

/// The host of `host`, `host:port` or `[host]:port`.
pub(super) fn host(address: &str) -> String {
    if let Ok(socket) = address.parse::<SocketAddr>() {
        return socket.ip().to_string();
    }
    if address.parse::<IpAddr>().is_ok() {
        return address.to_owned();
    }
    address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']).to_owned()
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn with_port(hosts: impl IntoIterator<Item = String>, port: u32) -> Vec<String> {
    let mut addresses = Vec::new();
    for host in hosts {
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        if !host.is_empty() && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::{super::placement::tests::node, *};
    use mlx_cluster_common::links::Medium;

    fn at(name: &str, addresses: &[&str]) -> NodeFacts {
        NodeFacts { addresses: addresses.iter().map(|address| (*address).to_owned()).collect(), ..node(name, 1, 0.0) }
    }

    #[test]
    fn hosts_are_read_from_all_spellings() {
        for (address, expected) in
            [("10.0.0.1", "10.0.0.1"), ("10.0.0.1:7", "10.0.0.1"), ("[::1]:7", "::1"), ("::1", "::1"), ("mini.local:7", "mini.local")]
        {
            assert_eq!(host(address), expected);
        }
    }

    #[test]
    fn loopback_is_for_one_machine_only() {
        let (a, b) = (at("a", &["127.0.0.1:1", "10.0.0.1:1"]), at("b", &["10.0.0.1:2", "127.0.0.1:2"]));
        assert_eq!(between(&a, &b, "127.0.0.1:2", 9, &[]), ["127.0.0.1:9", "10.0.0.1:9"]);
        let other = at("c", &["127.0.0.1:1", "10.0.0.3:1", "192.168.64.1:1"]);
        assert_eq!(between(&a, &other, "10.0.0.3:1", 9, &[]), ["10.0.0.3:9", "192.168.64.1:9"]);
        assert_eq!(from_coordinator("[fe80::1]:4", &a, 9), ["[fe80::1]:9", "127.0.0.1:9", "10.0.0.1:9"]);
    }
    #[test]
    fn what_was_measured_to_be_better_comes_first_and_the_unmeasured_last() {
        let (a, b) = (at("a", &["10.0.0.1:1"]), at("b", &["10.0.0.2:1", "10.1.0.2:1", "10.2.0.2:1"]));
        let way = |address: &str, bytes_per_second| LinkFacts {
            from: a.id.clone(),
            to: b.id.clone(),
            interface: "if0".into(),
            medium: Medium::Ethernet,
            address: address.into(),
            round_trip_seconds: 1e-4,
            bytes_per_second,
        };
        let links = [way("10.1.0.2", 6e6), way("10.2.0.2", 1e8), way("10.9.0.2", 1e9)];
        assert_eq!(between(&a, &b, "10.0.0.2:1", 9, &links), ["10.2.0.2:9", "10.1.0.2:9", "10.0.0.2:9"]);
        assert_eq!(between(&b, &a, "10.0.0.1:1", 9, &links), ["10.0.0.1:9"], "the other direction was not measured");
    }

    #[test]
    fn workers_are_measured_where_their_service_is() {
        let (a, b) = (at("a", &["10.0.0.1:1"]), at("b", &["10.0.0.2:7", "[fd00::2]:7"]));
        assert_eq!(to_measure(&a, &b, "10.0.5.5:7"), ["10.0.0.2:7", "[fd00::2]:7", "10.0.5.5:7"]);
        assert_eq!(to_measure(&a, &at("a2", &["10.0.0.1:3"]), "10.0.0.1:3"), ["127.0.0.1:3", "10.0.0.1:3"]);
        assert_eq!(to_measure(&a, &at("none", &[]), ""), Vec::<String>::new());
    }
}

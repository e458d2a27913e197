//! Under which addresses an engine is reached, by the coordinator and by its neighbours.

use mlx_cluster_common::engine::NodeFacts;
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

const LOOPBACK: &str = "127.0.0.1";

/// Addresses for the coordinator: first the host that answered it before.
pub(super) fn from_coordinator(reached: &str, to: &NodeFacts, port: u32) -> Vec<String> {
    with_port(std::iter::once(host(reached)).chain(hosts(to)), port)
}

/// Addresses for the engine on `from`. Loopback only between engines of one machine.
pub(super) fn between(from: &NodeFacts, to: &NodeFacts, to_reached: &str, port: u32) -> Vec<String> {
    let reached = host(to_reached);
    if same_machine(from, to) {
        return with_port(std::iter::once(LOOPBACK.to_owned()).chain(hosts(to)).chain([reached]), port);
    }
    with_port(hosts(to).into_iter().chain([reached]).filter(|host| !is_loopback(host)), port)
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
        assert_eq!(between(&a, &b, "127.0.0.1:2", 9), ["127.0.0.1:9", "10.0.0.1:9"]);
        let other = at("c", &["127.0.0.1:1", "10.0.0.3:1", "192.168.64.1:1"]);
        assert_eq!(between(&a, &other, "10.0.0.3:1", 9), ["10.0.0.3:9", "192.168.64.1:9"]);
        assert_eq!(from_coordinator("[fe80::1]:4", &a, 9), ["[fe80::1]:9", "127.0.0.1:9", "10.0.0.1:9"]);
    }
}

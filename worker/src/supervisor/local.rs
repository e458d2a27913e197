//! Who this worker is to others: its name, its id, where it listens and under which addresses it can be reached.

use mlx_cluster_common::ids::{ClusterName, NodeId};
use mlx_cluster_proto::wire;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use sysinfo::{InterfaceOperationalState, Networks};

/// Long enough for any name, short enough for one label of DNS together with the id.
const NAME_CHARS_MAX: usize = 40;
/// Interfaces that lead to containers on this machine, or (Apple's) to no node of ours.
const INTERFACES_IGNORED: [&str; 6] = ["docker", "virbr", "br-", "awdl", "llw", "anpi"];
/// Interfaces of private networks over the internet: usable, but nothing to prefer.
const INTERFACES_SLOW: [&str; 5] = ["utun", "tun", "tap", "wg", "tailscale"];

#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) cluster: ClusterName,
    /// Where the worker's service is; its engines use the same IP address with ports of their own.
    pub(crate) listen: SocketAddr,
}

impl Local {
    pub(crate) fn hello(&self) -> wire::Hello {
        wire::Hello::new(&self.cluster.0, &self.id, &self.name)
    }

    /// `host:port` of the worker's service, best first. `proven` is an address of this machine that a peer has used.
    pub(crate) fn addresses(&self, proven: Option<IpAddr>) -> Vec<String> {
        let interfaces = match self.listen.ip().is_unspecified() {
            true => interfaces(),
            false => Vec::new(),
        };
        let ips = rank(interfaces, self.listen.ip(), proven);
        ips.into_iter().map(|ip| SocketAddr::new(ip, self.listen.port()).to_string()).collect()
    }
}

/// The addresses under which a listener at `listen` can be reached by other nodes, best first. Loopback only when nothing else is
/// there: on another machine it would lead back to that machine.
fn rank(interfaces: Vec<(String, IpAddr)>, listen: IpAddr, proven: Option<IpAddr>) -> Vec<IpAddr> {
    if !listen.is_unspecified() {
        return vec![listen];
    }
    let has = |prefixes: &[&str], name: &str| prefixes.iter().any(|prefix| name.starts_with(prefix));
    let usable = |(name, ip): &(String, IpAddr)| {
        let family = ip.is_ipv4() || listen.is_ipv6();
        let scoped = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        family && !scoped && !ip.is_loopback() && !ip.is_unspecified() && !has(&INTERFACES_IGNORED, name)
    };
    let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V4(ip) if ip.is_link_local());
    let mut found: Vec<_> = interfaces.into_iter().filter(usable).collect();
    found.sort_by_cached_key(|(name, ip)| {
        (Some(*ip) != proven, has(&INTERFACES_SLOW, name), ip.is_ipv6(), link_local(ip), name.clone(), *ip)
    });
    let mut ips: Vec<_> = found.into_iter().map(|(_, ip)| ip).collect();
    if ips.is_empty() {
        ips.push(IpAddr::from([127, 0, 0, 1]));
    }
    ips
}

/// The addresses of all interfaces that are up.
pub(crate) fn interfaces() -> Vec<(String, IpAddr)> {
    let Ok(networks) = Networks::new_with_refreshed_list() else { return Vec::new() };
    let up = networks.iter().filter(|(_, network)| !matches!(network.operational_state(), InterfaceOperationalState::Down));
    up.flat_map(|(name, network)| network.ip_networks().iter().map(|net| (name.to_string_lossy().into_owned(), net.addr))).collect()
}

/// The address of this machine from which `peer` would be reached; nothing is sent.
pub(crate) async fn address_towards(peer: &str) -> Option<IpAddr> {
    let mut peers = tokio::net::lookup_host(peer).await.ok()?;
    peers.find_map(|peer| {
        let any: IpAddr = if peer.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
        socket.connect(peer).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    })
}

/// A worker's name as the user gave it, if it can be shown and announced.
pub(crate) fn checked_name(name: &str) -> Option<String> {
    let fits = !name.is_empty() && name.chars().count() <= NAME_CHARS_MAX;
    (fits && name.chars().all(is_name_char)).then(|| name.to_owned())
}

/// A name made from the machine's; the second and later workers on a machine get a number.
pub(crate) fn default_name(host: Option<String>, number: u32) -> String {
    let host = host.unwrap_or_default();
    let label = host.split('.').next().unwrap_or_default();
    let safe: String = label.chars().map(|c| if is_name_char(c) { c } else { '-' }).take(NAME_CHARS_MAX - 4).collect();
    let base = match safe.trim_matches('-') {
        "" => "worker",
        safe => safe,
    };
    match number {
        1 => base.to_owned(),
        _ => format!("{base}-{number}"),
    }
}

/// What needs no escaping in DNS, in a terminal and in a log.
fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> Vec<IpAddr> {
        text.split_whitespace().map(|ip| ip.parse().expect("an address")).collect()
    }

    fn interfaces(text: &str) -> Vec<(String, IpAddr)> {
        let entry = |entry: &str| {
            let (name, ip) = entry.split_once('=').expect("name=ip");
            (name.to_owned(), ip.parse().expect("an address"))
        };
        text.split_whitespace().map(entry).collect()
    }

    #[test]
    fn addresses_are_ranked_and_loopback_is_the_last_resort() {
        let any: IpAddr = [0, 0, 0, 0].into();
        let mac = "lo0=127.0.0.1 lo0=::1 utun3=100.64.0.2 bridge0=169.254.3.4 en0=192.168.1.5 en0=fe80::1 en0=fd00::5 docker0=172.17.0.1";
        assert_eq!(rank(interfaces(mac), any, None), ips("192.168.1.5 169.254.3.4 100.64.0.2"));
        let proven = Some([169, 254, 3, 4].into());
        assert_eq!(rank(interfaces(mac), any, proven), ips("169.254.3.4 192.168.1.5 100.64.0.2"));
        assert_eq!(rank(interfaces(mac), any, Some([127, 0, 0, 1].into())), ips("192.168.1.5 169.254.3.4 100.64.0.2"));
        let both: IpAddr = [0u16; 8].into();
        assert_eq!(rank(interfaces(mac), both, None), ips("192.168.1.5 169.254.3.4 fd00::5 100.64.0.2"));
        assert_eq!(rank(interfaces("lo=127.0.0.1"), any, None), ips("127.0.0.1"));
        assert_eq!(rank(interfaces(mac), [127, 0, 0, 1].into(), None), ips("127.0.0.1"));
    }

    #[test]
    fn names_are_checked_and_made_from_the_host() {
        assert_eq!(checked_name("mini-2_desk").as_deref(), Some("mini-2_desk"));
        for name in ["", "Anna's Mac", "a.b", "a\u{1b}[31m", &"x".repeat(41)] {
            assert_eq!(checked_name(name), None, "{name}");
        }
        assert_eq!(default_name(Some("Annas-Mac-mini.local".into()), 1), "Annas-Mac-mini");
        assert_eq!(default_name(Some("Anna's Mac".into()), 2), "Anna-s-Mac-2");
        assert_eq!(default_name(Some("---".into()), 1), "worker");
        assert_eq!(default_name(None, 3), "worker-3");
        assert!(checked_name(&default_name(Some("x".repeat(200)), 64)).is_some());
    }

    #[tokio::test]
    async fn the_address_towards_a_peer_is_known() {
        assert_eq!(address_towards("127.0.0.1:9").await, Some([127, 0, 0, 1].into()));
        assert_eq!(address_towards("not an address").await, None);
    }
}

//! The addresses of this machine.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

/// Every address of every interface; empty when the system does not say.
pub fn own_addresses() -> BTreeSet<IpAddr> {
    if_addrs::get_if_addrs().unwrap_or_default().into_iter().map(|interface| interface.ip()).collect()
}

/// `host:port` under which others reach a listener, best first; loopback only when there is nothing else.
pub fn reachable(listener: SocketAddr, own: &BTreeSet<IpAddr>) -> Vec<String> {
    if !listener.ip().is_unspecified() {
        return vec![listener.to_string()];
    }
    let usable = |ip: &&IpAddr| !ip.is_loopback() && !is_link_local(ip) && (ip.is_ipv4() || listener.is_ipv6());
    let mut addresses: Vec<_> = own.iter().filter(usable).map(|ip| SocketAddr::new(*ip, listener.port()).to_string()).collect();
    if addresses.is_empty() {
        addresses.push(format!("127.0.0.1:{}", listener.port()));
    }
    addresses
}

/// Addresses that mean nothing without the interface they belong to.
pub fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.segments()[0] & 0xffc0 == 0xfe80,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_the_last_resort() {
        let own = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect::<BTreeSet<IpAddr>>();
        let any: SocketAddr = "0.0.0.0:7070".parse().expect("an address");
        assert_eq!(reachable(any, &own(&["127.0.0.1", "10.0.0.2", "fe80::1", "2001:db8::1"])), ["10.0.0.2:7070"]);
        assert_eq!(reachable(any, &own(&["127.0.0.1"])), ["127.0.0.1:7070"]);
        assert_eq!(reachable("127.0.0.1:5".parse().expect("an address"), &own(&["10.0.0.2"])), ["127.0.0.1:5"]);
    }
}

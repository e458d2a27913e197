//! Which interface the system sends through to an address, and what kind of way that is.

use crate::supervisor::local;
use mlx_cluster_common::links::Medium;
use std::net::{IpAddr, SocketAddr};

/// How messages to an address leave this machine.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Exit {
    /// Empty where unknown.
    pub(super) interface: String,
    pub(super) medium: Medium,
}

/// Asks the system's routes; nothing is sent.
pub(super) async fn towards(address: &str) -> Exit {
    let interfaces = local::interfaces();
    let towards = local::address_towards(address).await;
    let destination = address.parse::<SocketAddr>().ok().map(|address| address.ip());
    let name = leaving_through(&interfaces, towards, destination);
    let medium = match name.as_deref() {
        Some(_) if towards.is_some() && towards == destination => Medium::Loopback,
        Some(name) if is_loopback(&interfaces, name) => Medium::Loopback,
        Some(name) => system::medium(name).await,
        None => Medium::Unknown,
    };
    Exit { interface: name.unwrap_or_default(), medium }
}

/// The interface with the address from which the destination is reached. This machine's own addresses are reached through loopback.
fn leaving_through(interfaces: &[(String, IpAddr)], towards: Option<IpAddr>, destination: Option<IpAddr>) -> Option<String> {
    let named = |wanted: &dyn Fn(&IpAddr) -> bool| interfaces.iter().find(|(_, ip)| wanted(ip)).map(|(name, _)| name.clone());
    let towards = towards?;
    match destination == Some(towards) {
        true => named(&|ip| ip.is_loopback()),
        false => named(&|ip| *ip == towards),
    }
}

fn is_loopback(interfaces: &[(String, IpAddr)], name: &str) -> bool {
    interfaces.iter().any(|(known, ip)| known == name && ip.is_loopback())
}

#[cfg(target_os = "macos")]
use super::macos as system;

#[cfg(not(target_os = "macos"))]
mod system {
    use mlx_cluster_common::links::Medium;
    use std::path::Path;

    /// `ARPHRD_ETHER` of `linux/if_arp.h`.
    const ETHERNET: &str = "1";

    pub(super) async fn medium(interface: &str) -> Medium {
        of(Path::new("/sys/class/net"), interface)
    }

    /// What the kernel says under `root`.
    pub(super) fn of(root: &Path, interface: &str) -> Medium {
        let folder = root.join(interface);
        let is_wireless = folder.join("wireless").exists() || folder.join("phy80211").exists();
        let driver = std::fs::read_link(folder.join("device/driver")).unwrap_or_default();
        let kind = std::fs::read_to_string(folder.join("type")).unwrap_or_default();
        // A tunnel over the internet looks like Ethernet, but has its own driver.
        let is_tunnel = folder.join("tun_flags").exists();
        match driver.file_name().and_then(|name| name.to_str()) {
            _ if is_wireless => Medium::WiFi,
            Some(driver) if driver.starts_with("thunderbolt") => Medium::Thunderbolt,
            _ if kind.trim() == ETHERNET && !is_tunnel => Medium::Ethernet,
            _ => Medium::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_is_that_of_the_source_address() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let interfaces = [("lo".to_owned(), ip("127.0.0.1")), ("en0".into(), ip("10.0.0.1")), ("en1".into(), ip("10.1.0.1"))];
        let through = |from: &str, to: &str| leaving_through(&interfaces, Some(ip(from)), Some(ip(to)));
        assert_eq!(through("10.1.0.1", "10.1.0.2").as_deref(), Some("en1"));
        assert_eq!(through("10.0.0.1", "10.0.0.1").as_deref(), Some("lo"), "our own address is reached without the network");
        assert_eq!(through("10.9.0.1", "10.9.0.2"), None);
        assert_eq!(leaving_through(&interfaces, None, Some(ip("10.0.0.2"))), None);
    }

    #[tokio::test]
    async fn loopback_is_known() {
        let exit = towards("127.0.0.1:9").await;
        assert!(exit.medium == Medium::Loopback && exit.interface.starts_with("lo"), "{exit:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_kernel_says_what_an_interface_is() {
        let root = tempfile::tempdir().expect("a folder");
        let interface = |name: &str, kind: &str, inside: &str| {
            let folder = root.path().join(name);
            std::fs::create_dir_all(folder.join(inside)).expect("made");
            std::fs::write(folder.join("type"), format!("{kind}\n")).expect("written");
            folder
        };
        interface("wlan0", "1", "wireless");
        interface("eth0", "1", "");
        interface("tun0", "65534", "");
        interface("tap0", "1", "tun_flags");
        let bolt = interface("thunderbolt0", "1", "device");
        std::os::unix::fs::symlink("/sys/bus/thunderbolt/drivers/thunderbolt-net", bolt.join("device/driver")).expect("linked");
        let names = ["wlan0", "eth0", "tun0", "tap0", "thunderbolt0", "none"];
        let expected = [Medium::WiFi, Medium::Ethernet, Medium::Unknown, Medium::Unknown, Medium::Thunderbolt, Medium::Unknown];
        assert_eq!(names.map(|name| system::of(root.path(), name)), expected);
    }
}

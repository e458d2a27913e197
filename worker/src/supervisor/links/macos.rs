//! What kind of way an interface of a Mac is, by the name of its hardware port. Only the reading of the list is tested on other systems;
//! that `networksetup` is called has not been run there.

use mlx_cluster_common::links::Medium;

/// A tool that takes longer than this has no answer.
#[cfg(target_os = "macos")]
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(1);

#[cfg(target_os = "macos")]
pub(super) async fn medium(interface: &str) -> Medium {
    let mut command = tokio::process::Command::new("/usr/sbin/networksetup");
    command.arg("-listallhardwareports").stdin(std::process::Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(DEADLINE, command.output()).await {
        Ok(Ok(output)) => of(&String::from_utf8_lossy(&output.stdout), interface),
        _ => Medium::Unknown,
    }
}

/// Reads `networksetup -listallhardwareports`: blocks of `Hardware Port: NAME`, `Device: INTERFACE` and more.
fn of(ports: &str, interface: &str) -> Medium {
    let mut port = "";
    for line in ports.lines() {
        match line.split_once(": ") {
            Some(("Hardware Port", name)) => port = name.trim(),
            Some(("Device", device)) if device.trim() == interface => return of_port(port),
            _ => {}
        }
    }
    Medium::Unknown
}

fn of_port(port: &str) -> Medium {
    let has = |words: &[&str]| words.iter().any(|word| port.contains(word));
    match port {
        _ if has(&["Wi-Fi", "AirPort"]) => Medium::WiFi,
        // Also adapters on Thunderbolt: `Thunderbolt Ethernet Slot 1`.
        _ if has(&["Ethernet", "LAN", "GbE"]) => Medium::Ethernet,
        _ if has(&["Thunderbolt"]) => Medium::Thunderbolt,
        _ => Medium::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_ports_are_read() {
        let ports = "\nHardware Port: Ethernet\nDevice: en0\nEthernet Address: aa:bb\n\nHardware Port: Wi-Fi\nDevice: en1\nEthernet Address: aa:bc\n\n\
                     Hardware Port: Thunderbolt 1\nDevice: en2\n\nHardware Port: Thunderbolt Bridge\nDevice: bridge0\n\n\
                     Hardware Port: Thunderbolt Ethernet Slot 1\nDevice: en7\n\nHardware Port: iPhone USB\nDevice: en9\n\nVLAN Configurations\n====\n";
        let mediums = ["en0", "en1", "en2", "bridge0", "en7", "en9", "utun3"].map(|interface| of(ports, interface));
        let expected =
            [Medium::Ethernet, Medium::WiFi, Medium::Thunderbolt, Medium::Thunderbolt, Medium::Ethernet, Medium::Unknown, Medium::Unknown];
        assert_eq!(mediums, expected);
    }
}

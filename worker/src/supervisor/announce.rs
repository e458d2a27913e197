//! Says over multicast DNS that this worker is here, and that it leaves.

use super::local::Local;
use mdns_sd::{DaemonEvent, IfKind, ServiceDaemon, ServiceInfo};
use mlx_cluster_common::{MDNS_SERVICE, PROTOCOL_VERSION};
use std::{collections::BTreeSet, net::IpAddr, time::Duration};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const ID_CHARS_SHOWN: usize = 8;
const GOODBYE_DEADLINE: Duration = Duration::from_millis(500);
/// The daemon repeats a goodbye after 120 ms, for listeners that missed the first one.
const GOODBYE_REPEATED: Duration = Duration::from_millis(150);

/// An announcement, for as long as it stands.
pub(crate) struct Announcement {
    daemon: ServiceDaemon,
    fullname: String,
}

/// Announces the worker on every interface on which it can be reached, loopback too, so that processes on one machine find each other
/// without any network.
pub(crate) fn announce(local: &Local) -> Result<Announcement, mdns_sd::Error> {
    let daemon = ServiceDaemon::new()?;
    let info = service_info(local)?;
    let fullname = info.get_fullname().to_owned();
    // Loopback is on by default in this version; said here because nothing works on one machine without it.
    daemon.enable_interface(vec![IfKind::LoopbackV4, IfKind::LoopbackV6])?;
    daemon.register(info)?;
    Ok(Announcement { daemon, fullname })
}

/// The record: under a host label of our own, never the machine's, since macOS renames a machine whose name somebody else announces.
fn service_info(local: &Local) -> Result<ServiceInfo, mdns_sd::Error> {
    let id: String = local.id.0.chars().take(ID_CHARS_SHOWN).collect();
    let protocol = PROTOCOL_VERSION.to_string();
    let properties =
        [("cluster", local.cluster.0.as_str()), ("id", &local.id.0), ("proto", &protocol), ("role", "worker"), ("name", &local.name)];
    let (instance, host) = (format!("{}-{id}", local.name), format!("mlxc-{id}.local."));
    let new = |ip: &str| ServiceInfo::new(MDNS_SERVICE, &instance, &host, ip, local.listen.port(), &properties[..]);
    // The daemon publishes on each interface the addresses of that interface only, and follows their changes.
    match local.listen.ip() {
        ip if !ip.is_unspecified() => new(&ip.to_string()),
        IpAddr::V6(_) => Ok(new("")?.enable_addr_auto()),
        IpAddr::V4(_) => {
            let mut info = new("")?.enable_addr_auto();
            info.set_interfaces(vec![IfKind::IPv4]);
            Ok(info)
        }
    }
}

impl Announcement {
    /// Logs what the daemon complains about, each complaint once, until `stop`; then takes the record back.
    pub(crate) async fn stand(self, stop: CancellationToken) {
        if let Ok(monitor) = self.daemon.monitor() {
            let mut known = BTreeSet::new();
            while let Some(Ok(event)) = stop.run_until_cancelled(monitor.recv_async()).await {
                let complaint = match event {
                    DaemonEvent::Error(error) => error.to_string(),
                    DaemonEvent::NameChange(change) => format!("{} is taken, announced as {}", change.original, change.new_name),
                    _ => continue,
                };
                if known.len() < 100 && known.insert(complaint.clone()) {
                    tracing::warn!(complaint, "multicast DNS does not work everywhere; --join does");
                }
            }
        }
        stop.cancelled().await;
        if timeout(GOODBYE_DEADLINE, self.say_goodbye()).await.is_err() {
            tracing::debug!("the goodbye took too long; others forget this worker when its record is old");
        }
    }

    async fn say_goodbye(&self) {
        if let Ok(done) = self.daemon.unregister(&self.fullname) {
            // An error means that the daemon is gone, and the record with it.
            let _ = done.recv_async().await;
            sleep(GOODBYE_REPEATED).await;
        }
        if let Ok(done) = self.daemon.shutdown() {
            let _ = done.recv_async().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mdns_sd::{ServiceEvent, TxtProperties};
    use tokio::time::Instant;

    fn local(listen: &str) -> Local {
        Local {
            id: uuid::Uuid::new_v4().simple().to_string().as_str().into(),
            name: "mini-2".into(),
            cluster: "test".into(),
            listen: listen.parse().expect("an address"),
        }
    }

    fn text<'a>(properties: &'a TxtProperties, key: &str) -> &'a str {
        properties.get_property_val_str(key).expect("in the record")
    }

    #[test]
    fn the_record_names_the_cluster_and_not_the_host() {
        let local = local("127.0.0.1:4000");
        let info = service_info(&local).expect("valid");
        let id8 = &local.id.0[..8];
        assert_eq!(info.get_hostname(), format!("mlxc-{id8}.local."));
        assert!(info.get_fullname().ends_with(&format!("-{id8}.{MDNS_SERVICE}")), "{}", info.get_fullname());
        assert!(!info.is_addr_auto() && info.get_addresses().len() == 1);
        let properties = info.get_properties();
        assert_eq!((text(properties, "cluster"), text(properties, "role"), text(properties, "name")), ("test", "worker", "mini-2"));
        assert_eq!((text(properties, "id"), text(properties, "proto")), (local.id.0.as_str(), PROTOCOL_VERSION.to_string().as_str()));
        assert!(service_info(&self::local("0.0.0.0:4000")).expect("valid").is_addr_auto());
    }

    #[tokio::test]
    async fn a_worker_is_found_over_loopback_and_says_goodbye() {
        let local = local("127.0.0.1:4321");
        let listener = ServiceDaemon::new().expect("a daemon");
        let events = listener.browse(MDNS_SERVICE).expect("browsing");
        let announcement = announce(&local).expect("announced");
        let fullname = announcement.fullname.clone();
        let stop = CancellationToken::new();
        let standing = tokio::spawn(announcement.stand(stop.clone()));
        let deadline = Instant::now() + Duration::from_secs(20);
        let next = async |wanted: fn(&ServiceEvent) -> Option<&str>| loop {
            let event = tokio::time::timeout_at(deadline, events.recv_async()).await.expect("in time").expect("an event");
            if wanted(&event) == Some(fullname.as_str()) {
                break event;
            }
        };
        let found = next(|event| match event {
            ServiceEvent::ServiceResolved(service) => Some(&service.fullname),
            _ => None,
        })
        .await;
        let ServiceEvent::ServiceResolved(service) = found else { panic!("{found:?}") };
        let addresses: Vec<_> = service.addresses.iter().map(|address| address.to_ip_addr()).collect();
        assert_eq!((addresses, service.port), (vec![IpAddr::from([127, 0, 0, 1])], 4321));
        stop.cancel();
        standing.await.expect("no panic");
        next(|event| match event {
            ServiceEvent::ServiceRemoved(_, fullname) => Some(fullname),
            _ => None,
        })
        .await;
        let _ = listener.shutdown();
    }
}

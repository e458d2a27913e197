//! mDNS: announces this coordinator, and hears the announcements of workers and of other coordinators.

use super::{
    PEERS_MAX, Peer,
    interfaces::{is_link_local, own_addresses},
    printable,
    rivals::{self, Rank, Rival},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use mdns_sd::{Receiver, ResolvedService, ServiceDaemon, ServiceEvent, ServiceInfo};
use mlx_cluster_common::{MDNS_SERVICE, PROTOCOL_VERSION, VERSION, ids::NodeId};
use mlx_cluster_proto::wire::Hello;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};
use tokio::sync::mpsc;

const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
const ID_CHARS_MAX: usize = 64;
/// Coordinators that are asked at the same time whether they live.
const ASKED_MAX: usize = 8;

/// What discovery found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    Worker(Peer),
    /// A worker said goodbye, or its record ran out. Not a failure: a connection that stands goes on.
    WorkerGone(NodeId),
    /// Another coordinator of our cluster answers at this moment.
    Coordinator(Rival),
}

/// What this coordinator says of itself.
#[derive(Debug, Clone)]
pub struct Announcement {
    pub cluster: String,
    pub name: String,
    pub rank: Rank,
    pub listener: SocketAddr,
}

/// The running responder. Stop it, so that others hear a goodbye.
pub struct Mdns {
    daemon: ServiceDaemon,
    fullname: Option<String>,
}

impl Mdns {
    /// Starts to listen, and to announce where there is something to announce.
    pub fn start(announcement: Option<&Announcement>) -> Result<(Self, Receiver<ServiceEvent>), mdns_sd::Error> {
        let daemon = ServiceDaemon::new()?;
        let services = daemon.browse(MDNS_SERVICE)?;
        let fullname = announcement.map(|announcement| announce(&daemon, announcement)).transpose()?;
        Ok((Self { daemon, fullname }, services))
    }

    /// Says goodbye and ends the responder's thread.
    pub async fn stop(self) {
        if let Some(fullname) = &self.fullname
            && let Ok(done) = self.daemon.unregister(fullname)
        {
            drop(tokio::time::timeout(GOODBYE_TIMEOUT, done.recv_async()).await);
        }
        if let Ok(done) = self.daemon.shutdown() {
            drop(tokio::time::timeout(GOODBYE_TIMEOUT, done.recv_async()).await);
        }
    }
}

/// The record's host is ours alone: publishing the machine's own name makes macOS rename itself (mdns-sd issue 410).
fn announce(daemon: &ServiceDaemon, announcement: &Announcement) -> Result<String, mdns_sd::Error> {
    let Announcement { cluster, name, rank, listener } = announcement;
    let short: String = rank.id.0.chars().filter(char::is_ascii_alphanumeric).take(8).collect();
    let host = format!("mlxc-{short}.local.");
    let protocol = PROTOCOL_VERSION.to_string();
    let started = rank.started_ms.to_string();
    let properties = [
        ("cluster", cluster.as_str()),
        ("id", rank.id.0.as_str()),
        ("proto", protocol.as_str()),
        ("role", "coordinator"),
        ("name", name.as_str()),
        ("version", VERSION),
        ("started", started.as_str()),
    ];
    let instance = format!("coordinator-{short}");
    let addresses: Vec<IpAddr> = if listener.ip().is_unspecified() { Vec::new() } else { vec![listener.ip()] };
    let mut service = ServiceInfo::new(MDNS_SERVICE, &instance, &host, addresses.as_slice(), listener.port(), &properties[..])?;
    if addresses.is_empty() {
        service = service.enable_addr_auto();
    }
    // Ids are random, so names cannot clash, and probing would cost 0.75 s.
    service.set_requires_probe(false);
    let fullname = service.get_fullname().to_owned();
    daemon.register(service)?;
    Ok(fullname)
}

/// Reports what belongs to our cluster until the responder stops or nobody listens any more.
pub async fn watch(services: Receiver<ServiceEvent>, hello: Hello, found: mpsc::Sender<Found>) {
    let mut listing = Listing::default();
    // Asking takes seconds where nobody answers; workers must not wait for that.
    let mut asking = FuturesUnordered::new();
    loop {
        let next = tokio::select! {
            event = services.recv_async() => Next::Heard(event.ok()),
            Some(rival) = asking.next(), if !asking.is_empty() => Next::Asked(rival),
        };
        let heard = match next {
            Next::Heard(None) => return,
            Next::Heard(Some(ServiceEvent::ServiceResolved(service))) => {
                listing.resolved(&Record::read(&service, &own_addresses()), &hello)
            }
            Next::Heard(Some(ServiceEvent::ServiceRemoved(_, fullname))) => listing.removed(&fullname),
            Next::Heard(Some(_)) => None,
            Next::Asked(rival) => {
                if let Some(rival) = rival
                    && found.send(Found::Coordinator(rival)).await.is_err()
                {
                    return;
                }
                None
            }
        };
        match heard {
            Some(Found::Coordinator(rival)) if asking.len() < ASKED_MAX => asking.push(confirmed(rival, hello.clone())),
            Some(Found::Coordinator(_)) | None => {}
            Some(heard) => {
                if found.send(heard).await.is_err() {
                    return;
                }
            }
        }
    }
}

enum Next {
    Heard(Option<ServiceEvent>),
    Asked(Option<Rival>),
}

async fn confirmed(rival: Rival, hello: Hello) -> Option<Rival> {
    rivals::lives(&rival, &hello).await.then_some(rival)
}

/// A record, read but not believed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Record {
    fullname: String,
    cluster: String,
    id: String,
    protocol: String,
    version: String,
    role: String,
    name: String,
    started_ms: u64,
    addresses: Vec<String>,
}

impl Record {
    fn read(service: &ResolvedService, own: &BTreeSet<IpAddr>) -> Self {
        let text = |key: &str| service.get_property_val_str(key).unwrap_or_default().to_owned();
        let ips: BTreeSet<IpAddr> = service.addresses.iter().map(|address| address.to_ip_addr()).collect();
        Self {
            fullname: service.fullname.clone(),
            cluster: text("cluster"),
            id: text("id"),
            protocol: text("proto"),
            version: text("version"),
            role: text("role"),
            name: text("name"),
            started_ms: text("started").parse().unwrap_or(u64::MAX),
            addresses: ordered(&ips, own).into_iter().map(|ip| SocketAddr::new(ip, service.port).to_string()).collect(),
        }
    }
}

/// Loopback first when the peer is on this machine, and only then; IPv4 before IPv6; nothing that cannot be connected to.
fn ordered(ips: &BTreeSet<IpAddr>, own: &BTreeSet<IpAddr>) -> Vec<IpAddr> {
    let usable = |ip: &&IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast() && !is_link_local(ip);
    let outside: Vec<IpAddr> = ips.iter().filter(usable).copied().collect();
    let is_here = outside.iter().any(|ip| own.contains(ip)) || outside.is_empty();
    let loopback = is_here.then_some(IpAddr::V4(Ipv4Addr::LOCALHOST));
    loopback.into_iter().chain(outside).collect()
}

/// What was heard so far, bounded.
#[derive(Default)]
struct Listing {
    workers: BTreeMap<String, NodeId>,
    warned: BTreeSet<String>,
}

impl Listing {
    fn resolved(&mut self, record: &Record, hello: &Hello) -> Option<Found> {
        let id_is_sane = !record.id.is_empty() && record.id.len() <= ID_CHARS_MAX && record.id.chars().all(|c| c.is_ascii_graphic());
        if record.cluster != hello.cluster || !id_is_sane || record.id == hello.node {
            return None;
        }
        let name = printable(if record.name.is_empty() { &record.id } else { &record.name });
        if record.protocol != PROTOCOL_VERSION.to_string() {
            self.warn_of_version(record, &name);
            return None;
        }
        match record.role.as_str() {
            "worker" => {
                let known = self.workers.contains_key(&record.fullname);
                if !known && self.workers.len() >= PEERS_MAX {
                    return None;
                }
                let node = NodeId(record.id.clone());
                self.workers.insert(record.fullname.clone(), node.clone());
                Some(Found::Worker(Peer { node, name, addresses: record.addresses.clone() }))
            }
            "coordinator" => {
                let rank = Rank { started_ms: record.started_ms, id: NodeId(record.id.clone()) };
                Some(Found::Coordinator(Rival { rank, name, addresses: record.addresses.clone() }))
            }
            _ => None,
        }
    }

    fn removed(&mut self, fullname: &str) -> Option<Found> {
        self.workers.remove(fullname).map(Found::WorkerGone)
    }

    fn warn_of_version(&mut self, record: &Record, name: &str) {
        if self.warned.len() < PEERS_MAX && self.warned.insert(record.id.clone()) {
            let theirs = printable(if record.version.is_empty() { "another version" } else { &record.version });
            let protocol = printable(&record.protocol);
            tracing::warn!(
                "{name} runs mlx-cluster {theirs} (protocol {protocol}), this coordinator {VERSION} (protocol {PROTOCOL_VERSION}): \
                 install the same version on both; it is left out"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello::new("home", &"me".into(), "studio")
    }

    fn record(id: &str, role: &str) -> Record {
        Record {
            fullname: format!("{id}._mlx-cluster._tcp.local."),
            cluster: "home".into(),
            id: id.into(),
            protocol: PROTOCOL_VERSION.to_string(),
            role: role.into(),
            name: "mini\u{7}".into(),
            ..Record::default()
        }
    }

    #[test]
    fn only_peers_of_our_cluster_and_version_count() {
        let mut listing = Listing::default();
        let found = listing.resolved(&record("w", "worker"), &hello());
        assert_eq!(found, Some(Found::Worker(Peer { node: "w".into(), name: "mini\\u{7}".into(), addresses: vec![] })));
        assert!(matches!(listing.resolved(&record("c", "coordinator"), &hello()), Some(Found::Coordinator(_))));
        for (record, why) in [
            (Record { cluster: "office".into(), ..record("x", "worker") }, "cluster"),
            (Record { protocol: "99".into(), ..record("x", "worker") }, "version"),
            (record("me", "coordinator"), "ourselves"),
            (record("", "worker"), "no id"),
            (record("x", "printer"), "role"),
        ] {
            assert_eq!(listing.resolved(&record, &hello()), None, "{why}");
        }
        assert_eq!(listing.removed("w._mlx-cluster._tcp.local."), Some(Found::WorkerGone("w".into())));
        assert_eq!(listing.removed("w._mlx-cluster._tcp.local."), None);
    }

    #[test]
    fn peers_are_bounded() {
        let mut listing = Listing::default();
        let heard = (0..1000).filter(|i| listing.resolved(&record(&format!("w{i}"), "worker"), &hello()).is_some()).count();
        assert_eq!(heard, PEERS_MAX);
    }

    #[test]
    fn loopback_comes_first_for_peers_on_this_machine_only() {
        let set = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect::<BTreeSet<IpAddr>>();
        let list = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect::<Vec<IpAddr>>();
        let own = set(&["127.0.0.1", "10.0.0.2"]);
        assert_eq!(ordered(&set(&["10.0.0.2", "127.0.0.1"]), &own), list(&["127.0.0.1", "10.0.0.2"]));
        assert_eq!(ordered(&set(&["10.0.0.9", "127.0.0.1", "fe80::1"]), &own), list(&["10.0.0.9"]));
        assert_eq!(ordered(&set(&["127.0.0.1"]), &own), list(&["127.0.0.1"]));
    }
}

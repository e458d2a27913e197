//! This engine's seat in the tensor-parallel group of its stage: formed at the first link, used for as long as the process lives.

use super::watchdog::{Watchdog, Work};
use crate::{kernels, supervisor::COMMON_TEMPORARY_VARIABLE};
use mlx_cluster_common::{
    engine::{EngineSpec, GroupLink},
    plan::Collective,
};
use mlx_cluster_lm::{
    LmError, ffi,
    group::{Group, HOSTFILE_VARIABLE},
};
use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    thread,
    time::Duration,
};
use tokio::{net::TcpSocket, sync::oneshot};

/// From the first link to a group.
const FORMING: Duration = Duration::from_secs(15);
/// Kernels are compiled and weights are touched for the first time.
const WARM_UP: Duration = Duration::from_secs(240);
/// What the coordinator's call waits for at most: the end of a step of the epoch before, forming and warming up.
pub(super) const JOINING: Duration = Duration::from_secs(280);
/// A step that takes longer than this, on whatever stage, ends the epoch: something hangs.
pub(super) const STEP_DEADLINE: Duration = Duration::from_secs(180);
/// The last rank connects to the first one, and MLX waits a second after an attempt that is refused: the first one gets a head start.
const HEAD_START: Duration = Duration::from_millis(150);

/// What MLX's RDMA collectives read of the environment besides the rank, which the supervisor sets.
const JACCL_VARIABLES: [&str; 2] = ["MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"];

/// The order to form a group, or to use it again; answered when that is done.
pub(super) struct Join {
    pub(super) link: GroupLink,
    pub(super) joined: oneshot::Sender<Result<(), String>>,
}

pub(super) struct Ranks {
    group: Option<Group>,
    collective: Collective,
    /// The processes that the group was formed by.
    formed: Option<Vec<u64>>,
    seat: Option<Seat>,
    watchdog: Watchdog,
}

/// A port that is kept for the group: bound but not listened on, so that nobody is accepted by mistake.
pub(super) struct Seat {
    socket: TcpSocket,
    pub(super) port: u16,
}

impl Seat {
    /// On the address where the engine listens too. MLX's ring knows IPv4 alone.
    pub(super) fn take(listen: IpAddr) -> std::io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        let address = if listen.is_ipv4() { listen } else { IpAddr::from([0, 0, 0, 0]) };
        socket.bind(SocketAddr::new(address, 0))?;
        Ok(Self { port: socket.local_addr()?.port(), socket })
    }
}

/// Why an engine of a group cannot work on this machine whatever it tries.
pub(super) fn missing(spec: &EngineSpec) -> Option<String> {
    if spec.place.is_alone() || spec.collective != Collective::Jaccl {
        return None;
    }
    if !ffi::has_collective(c"jaccl") {
        return Some(
            "MLX has no JACCL here: it needs macOS 26.2 with RDMA over Thunderbolt enabled; `--collective ring` works everywhere".into(),
        );
    }
    let unset = JACCL_VARIABLES.into_iter().find(|name| std::env::var_os(name).is_none())?;
    Some(format!(
        "JACCL needs {} in the environment of the worker (see MLX's documentation of distributed communication), and {unset} is not set; \
         `--collective ring` works without",
        JACCL_VARIABLES.join(" and ")
    ))
}

impl Ranks {
    pub(super) fn new(group: Option<Group>, collective: Collective, seat: Option<Seat>, watchdog: Watchdog) -> Self {
        Self { group, collective, formed: None, seat, watchdog }
    }

    /// Forms the group and warms up together with the other ranks, or finds that it stands already. Ends the process when neither is possible.
    pub(super) fn join(&mut self, join: Option<Join>, warm_up: impl FnOnce() -> Result<(), LmError>) {
        let Some(Join { link, joined }) = join else { return };
        let result = match &self.formed {
            None => self.form(&link, warm_up),
            Some(formed) if *formed == link.incarnations => Ok(()),
            Some(_) => Err("a process can be in one group in its life, and other ranks of its group were started again".to_owned()),
        };
        let failure = result.as_ref().err().cloned();
        // The coordinator may have stopped waiting.
        drop(joined.send(result));
        if let Some(cause) = failure {
            self.watchdog.give_up(&cause);
        }
    }

    fn form(&mut self, link: &GroupLink, warm_up: impl FnOnce() -> Result<(), LmError>) -> Result<(), String> {
        let group = self.group.as_ref().ok_or("an engine that is alone has no group to join")?;
        let work = self.watchdog.begin("forming the group", FORMING);
        if group.rank() as usize + 1 == group.size() {
            thread::sleep(HEAD_START);
        }
        drop(self.seat.take().map(|seat| seat.socket));
        let formed = group.form(self.collective, &link.addresses);
        if let Some(hostfile) = std::env::var_os(HOSTFILE_VARIABLE) {
            // MLX has read it; one that stays behind does no harm.
            drop(std::fs::remove_file(hostfile));
        }
        formed.map_err(|error| format!("{error}, with {}", listed(link)))?;
        drop(work);
        let _work = self.watchdog.begin("warming up", WARM_UP);
        warm_up().map_err(|error| format!("cannot warm up: {error}"))?;
        give_kernels();
        self.formed = Some(link.incarnations.clone());
        Ok(())
    }

    pub(super) fn is_alone(&self) -> bool {
        self.group.is_none()
    }

    /// Other ranks have to take part in what follows, until the value is dropped.
    pub(super) fn step(&self) -> Work {
        self.watchdog.begin("a step", STEP_DEADLINE)
    }

    /// Ends the process of a group, whose ranks may be out of step after an error; nothing else to an engine that is alone.
    pub(super) fn check<T, E: ToString>(&self, result: Result<T, E>) -> Result<T, String> {
        result.map_err(|error| {
            let message = error.to_string();
            self.watchdog.give_up(&message);
            message
        })
    }
}

fn listed(link: &GroupLink) -> String {
    let rank = |((number, name), address): ((usize, &String), &String)| format!("rank {number} on {name} at {address}");
    link.names.iter().enumerate().zip(&link.addresses).map(rank).collect::<Vec<_>>().join(", ")
}

/// So that the next engine need not compile them again.
fn give_kernels() {
    let Some(common) = std::env::var_os(COMMON_TEMPORARY_VARIABLE) else { return };
    if let Err(error) = kernels::give(&std::env::temp_dir(), Path::new(&common)) {
        tracing::debug!(%error, "compiled kernels are not shared");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn a_seat_is_nobody_elses_until_it_is_left() {
        let seat = Seat::take(Ipv4Addr::LOCALHOST.into()).expect("a port");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, seat.port));
        assert!(TcpListener::bind(address).is_err());
        assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens yet");
        drop(seat);
        TcpListener::bind(address).expect("free again");
    }
}

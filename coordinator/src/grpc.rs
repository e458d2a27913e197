//! The coordinator's own service: where workers say where they are when multicast does not reach them.

use crate::discovery::{Peer, printable};
use mlx_cluster_common::ids::NodeId;
use mlx_cluster_proto::{
    WireError, net,
    wire::{
        Hello, JoinReply, JoinRequest,
        cluster_server::{Cluster, ClusterServer},
    },
};
use std::net::{IpAddr, SocketAddr};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

const ADDRESSES_MAX: usize = 16;
const ADDRESS_CHARS_MAX: usize = 256;
const REQUEST_BYTES_MAX: usize = 64 << 10;

struct Join {
    hello: Hello,
    peers: mpsc::Sender<Peer>,
}

/// Serves until `stop`. Workers that announce themselves go to `peers`.
pub(crate) async fn serve(
    listener: TcpListener,
    hello: Hello,
    peers: mpsc::Sender<Peer>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let service = ClusterServer::new(Join { hello, peers }).max_decoding_message_size(REQUEST_BYTES_MAX);
    net::server().add_service(service).serve_with_incoming_shutdown(net::incoming(listener), stop.cancelled_owned()).await
}

#[tonic::async_trait]
impl Cluster for Join {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let remote = request.remote_addr().map(|address| address.ip());
        let JoinRequest { hello, addresses } = request.into_inner();
        let hello = hello.ok_or(WireError::Missing("hello"))?;
        hello.check(&self.hello.cluster)?;
        // Another coordinator that only asks whether we live gives no address.
        if !addresses.is_empty() {
            let peer = peer(&hello, addresses, remote)?;
            self.peers.send(peer).await.map_err(|_| Status::unavailable("the coordinator is stopping"))?;
        }
        Ok(Response::new(JoinReply { hello: Some(self.hello.clone()) }))
    }
}

/// Checks what a worker says of itself. The address that it came from is tried with its port, first when it is loopback.
fn peer(hello: &Hello, addresses: Vec<String>, remote: Option<IpAddr>) -> Result<Peer, WireError> {
    if addresses.len() > ADDRESSES_MAX || addresses.iter().any(|address| address.len() > ADDRESS_CHARS_MAX) {
        return Err(WireError::Invalid { field: "addresses", value: format!("{} entries", addresses.len()) });
    }
    if hello.node.is_empty() || hello.node.len() > ADDRESS_CHARS_MAX {
        return Err(WireError::Invalid { field: "hello.node", value: format!("{} characters long", hello.node.len()) });
    }
    let port = addresses.iter().find_map(|address| address.rsplit_once(':')?.1.parse::<u16>().ok());
    let came_from = remote.zip(port).map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port));
    let is_here = came_from.is_some_and(|address| address.ip().is_loopback());
    let meaningful = |address: &String| match address.parse::<SocketAddr>() {
        Ok(socket) => !socket.ip().is_unspecified() && (is_here || !socket.ip().is_loopback()),
        Err(_) => true,
    };
    let mut ordered: Vec<String> = addresses.into_iter().filter(meaningful).collect();
    if let Some(came_from) = came_from.map(|address| address.to_string()) {
        ordered.retain(|address| *address != came_from);
        let place = if is_here { 0 } else { ordered.len() };
        ordered.insert(place, came_from);
    }
    Ok(Peer { node: NodeId(hello.node.clone()), name: printable(&hello.name), addresses: ordered })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_that_a_worker_came_from_is_tried_too() {
        let hello = Hello::new("home", &"w".into(), "mini");
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let given = texts(&["10.0.0.5:70", "127.0.0.1:70", "0.0.0.0:70"]);
        let of = |remote: &str| peer(&hello, given.clone(), remote.parse().ok()).expect("valid").addresses;
        assert_eq!(of("127.0.0.1"), texts(&["127.0.0.1:70", "10.0.0.5:70"]));
        assert_eq!(of("192.168.1.9"), texts(&["10.0.0.5:70", "192.168.1.9:70"]));
        assert!(peer(&hello, vec!["x".repeat(300)], None).is_err());
    }
}

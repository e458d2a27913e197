//! The one place where connections between nodes are made and accepted, so that mutual TLS can be put here.

use socket2::{SockRef, TcpKeepalive};
use std::{io, net::SocketAddr, time::Duration};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::{Stream, StreamExt, wrappers::TcpListenerStream};
use tonic::transport::{Channel, Endpoint, Server};

/// A peer that does not accept a connection in this time is taken for unreachable.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 pings go out this often on every connection, and one without an answer for as long again ends it.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Windows for links of 10 to 80 Gb/s: a prefill chunk's activations fit into one.
const WINDOW_BYTES: u32 = 32 << 20;
const FRAME_BYTES: u32 = 1 << 20;
/// Largest message that a node accepts: a prefill chunk of 4,096 tokens, 16,384 wide, in f32, and some.
pub const MESSAGE_BYTES_MAX: usize = 320 << 20;

/// Why no connection stands.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{name} has no address to connect to")]
    NoAddress { name: String },
    #[error("`{address}` is not host:port")]
    Address { address: String },
    #[error("cannot reach {name} at {address}: {cause}")]
    Unreachable { name: String, address: String, cause: String },
}

/// Connects to the first of these `host:port` addresses that answers. `name` is for messages.
pub async fn connect(name: &str, addresses: &[String]) -> Result<Channel, ConnectError> {
    let mut failure = ConnectError::NoAddress { name: name.to_owned() };
    for address in addresses {
        let endpoint = endpoint(address)?;
        match tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect()).await {
            Ok(Ok(channel)) => return Ok(channel),
            Ok(Err(error)) => failure = unreachable(name, address, &root_cause(&error)),
            Err(_) => failure = unreachable(name, address, &format!("no answer within {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }
    Err(failure)
}

fn unreachable(name: &str, address: &str, cause: &str) -> ConnectError {
    ConnectError::Unreachable { name: name.to_owned(), address: address.to_owned(), cause: cause.to_owned() }
}

/// What happened to a call or a stream: what the peer said, or what broke the connection.
pub fn cause_of(status: &tonic::Status) -> String {
    match std::error::Error::source(status).map(root_cause) {
        // What h2 says when hyper drops a connection, whose reason it keeps to itself.
        Some(cause) if cause.contains("broken pipe") => {
            format!("the connection broke, or was silent for {} s", (KEEP_ALIVE + KEEP_ALIVE_TIMEOUT).as_secs())
        }
        Some(cause) => cause,
        None => status.message().to_owned(),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn endpoint(address: &str) -> Result<Endpoint, ConnectError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| ConnectError::Address { address: address.to_owned() })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A gRPC server with the settings that all nodes use.
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// Binds a listener for [`server`].
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// The connections that a listener accepts, made ready for small messages.
pub fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    TcpListenerStream::new(listener).map(|stream| {
        let stream = stream?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE_TIMEOUT))?;
        Ok(stream)
    })
}

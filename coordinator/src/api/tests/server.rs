//! Real connections: clients that leave, bodies without end, pings and the end of the server.

use super::{
    super::serve,
    fake::{Fake, Step},
};
use mlx_cluster_common::request::FinishReason;
use serde_json::json;
use std::{net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

struct Server {
    address: SocketAddr,
    shutdown: CancellationToken,
    task: JoinHandle<std::io::Result<()>>,
}

async fn start(fake: &Fake) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(serve(listener, fake.serving.clone(), fake.jobs.clone(), shutdown.clone()));
    Server { address, shutdown, task }
}

impl Server {
    async fn send(&self, head: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("connected");
        // A server that refuses early may not take all of it.
        let _ = stream.write_all(format!("{head}\r\nhost: localhost\r\n\r\n{body}").as_bytes()).await;
        stream
    }

    async fn post(&self, body: &str) -> TcpStream {
        self.send(&format!("POST /v1/completions HTTP/1.1\r\ncontent-length: {}", body.len()), body).await
    }
}

async fn read_until(stream: &mut TcpStream, mark: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&text).contains(mark) {
        let count = stream.read(&mut buffer).await.expect("read");
        assert_ne!(count, 0, "it ended before {mark}: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&buffer[..count]);
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request() {
    let fake = Fake::new(|_| vec![Step::Say("a"), Step::Hang]);
    let server = start(&fake).await;
    for (number, stream) in [false, true].into_iter().enumerate() {
        let mut connection = server.post(&json!({"prompt": "a", "stream": stream}).to_string()).await;
        fake.asked().await;
        if stream {
            read_until(&mut connection, "\"text\":\"a\"").await;
        }
        drop(connection);
        assert_eq!(fake.cancelled().await, number);
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_with_an_answer() {
    let fake = Fake::saying("x", FinishReason::Length);
    let server = start(&fake).await;
    let chunk = " ".repeat(1 << 20);
    // Announced, and sent by a client that reads only afterwards.
    let mut announced = server.send("POST /v1/completions HTTP/1.1\r\ncontent-length: 104857600", "").await;
    for _ in 0..100 {
        announced.write_all(chunk.as_bytes()).await.expect("taken");
    }
    let answer = read_until(&mut announced, "body_too_large").await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("connection: close"), "{answer}");
    // Not announced.
    let mut chunked = server.send("POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked", "").await;
    for _ in 0..20 {
        chunked.write_all(format!("100000\r\n{chunk}\r\n").as_bytes()).await.expect("taken");
    }
    chunked.write_all(b"0\r\n\r\n").await.expect("taken");
    assert!(read_until(&mut chunked, "body_too_large").await.starts_with("HTTP/1.1 413"));
    // A client that asks first is told at once.
    let mut asking = server.send("POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 104857600", "").await;
    assert!(read_until(&mut asking, "body_too_large").await.starts_with("HTTP/1.1 413"));
}

#[tokio::test]
async fn headers_are_bounded() {
    let fake = Fake::saying("x", FinishReason::Length);
    let server = start(&fake).await;
    let mut long = server.send(&format!("GET /health HTTP/1.1\r\nx-long: {}", "a".repeat(200_000)), "").await;
    let answer = read_until(&mut long, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many: String = (0..101).map(|i| format!("\r\nx-{i}: a")).collect();
    let mut many = server.send(&format!("GET /health HTTP/1.1{many}"), "").await;
    assert!(read_until(&mut many, "\r\n\r\n").await.starts_with("HTTP/1.1 431"));
    let mut twice = server.send("GET /health HTTP/1.1\r\nhost: localhost", "").await;
    assert!(read_until(&mut twice, "\r\n\r\n").await.starts_with("HTTP/1.1 400"));
}

#[tokio::test(start_paused = true)]
async fn headers_that_do_not_arrive_end_the_connection() {
    let fake = Fake::saying("x", FinishReason::Length);
    let server = start(&fake).await;
    let mut slow = TcpStream::connect(server.address).await.expect("connected");
    slow.write_all(b"GET /health HT").await.expect("sent");
    let mut rest = Vec::new();
    slow.read_to_end(&mut rest).await.expect("ended");
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&rest));
}

#[tokio::test(start_paused = true)]
async fn pings_are_sent_while_nothing_else_is() {
    let fake = Fake::new(|_| vec![Step::Hang]);
    let router = fake.router();
    let post = super::fake::request("POST", "/v1/completions").body(axum::body::Body::from(r#"{"prompt": "a", "stream": true}"#));
    let response = super::fake::send(router, post.expect("a request")).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let start = tokio::time::Instant::now();
    let mut body = response.into_body().into_data_stream();
    for i in 1..4 {
        let data = futures_util::StreamExt::next(&mut body).await.expect("data").expect("no error");
        assert_eq!(data, ": ping\n\n");
        assert!(start.elapsed() <= Duration::from_secs(10 * i));
    }
}

#[tokio::test(start_paused = true)]
async fn open_answers_are_cut_off_some_time_after_the_shutdown() {
    let fake = Fake::new(|_| vec![Step::Say("a"), Step::Hang]);
    let server = start(&fake).await;
    let mut whole = server.post(r#"{"prompt": "a"}"#).await;
    fake.asked().await;
    let mut streamed = server.post(r#"{"prompt": "a", "stream": true}"#).await;
    read_until(&mut streamed, "\"text\":\"a\"").await;
    server.shutdown.cancel();
    assert!(read_until(&mut streamed, "stopping").await.contains("data: {\"error\""));
    assert!(read_until(&mut whole, "stopping").await.starts_with("HTTP/1.1 503"));
    server.task.await.expect("no panic").expect("no error");
    assert!(TcpStream::connect(server.address).await.is_err());
}

#[tokio::test]
async fn the_shutdown_lets_answers_finish() {
    let fake = Fake::saying("x", FinishReason::Length);
    let server = start(&fake).await;
    let mut connection = server.post(r#"{"prompt": "a", "stream": true}"#).await;
    fake.asked().await;
    server.shutdown.cancel();
    assert!(read_until(&mut connection, "[DONE]").await.contains("\"text\":\"x\""));
    server.task.await.expect("no panic").expect("no error");
}

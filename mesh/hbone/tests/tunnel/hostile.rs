//! Peers that behave as no proxy does. Their connections end; other peers are not affected.

use std::sync::Arc;
use std::time::Duration;

use ambit_hbone::{PoolSettings, ServeError, ServerSettings};
use ambit_identity::unnamed_server;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::harness::*;

/// An HTTP/2 connection without the checks of our client.
async fn raw(world: &World, node: &Node) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let tls = world.certificate("client").client_tls().dangerous_expecting_anyone();
    let socket = TcpStream::connect(node.address).await.unwrap();
    let stream = tokio_rustls::TlsConnector::from(tls).connect(unnamed_server(), socket).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.max_concurrent_reset_streams(100_000).initial_max_send_streams(100_000);
    let (sender, connection) = builder.handshake(stream).await.unwrap();
    (sender, tokio::spawn(connection))
}

fn connect(authority: &str) -> Request<()> {
    Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap()
}

/// A bystander on a connection of its own is served.
pub(crate) async fn bystander(world: &World, node: &Node) {
    let client = Client::new(world, "client", PoolSettings::default());
    let (mut socket, _task) = client.application(node.address, echo().await).await;
    socket.write_all(b"x").await.unwrap();
    soon("the bystander's echo", socket.read_u8()).await.unwrap();
}

#[tokio::test]
async fn requests_that_open_no_tunnel_are_answered_with_400() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let (sender, _connection) = raw(&world, &node).await;
    let get = Request::builder().uri("https://10.0.0.1:80/").body(()).unwrap();
    for request in [get, connect("10.0.0.1:0"), connect("no-port"), connect("10.0.0.300:80")] {
        let sender = soon("readiness", sender.clone().ready()).await;
        let (answer, _send) = sender.unwrap().send_request(request, true).unwrap();
        let answer = soon("the answer", answer).await.unwrap();
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    }
    assert!(node.seen.requests.lock().is_empty());
}

#[tokio::test]
async fn rapid_reset_ends_the_connection_and_nobody_elses() {
    let world = World::new();
    let settings = ServerSettings { max_abandoned: 50, ..ServerSettings::default() };
    let node = Node::start(&world, "server", settings).await;
    let (sender, connection) = raw(&world, &node).await;
    let flood = async {
        for round in 0..100_000 {
            let Ok(mut sender) = sender.clone().ready().await else { return round };
            let Ok((answer, send)) = sender.send_request(connect("127.0.0.1:2"), false) else { return round };
            drop((answer, send));
            // Lets the server take each one up before it is reset.
            if round % 4 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        panic!("100,000 requests were opened and abandoned");
    };
    soon("the end of the flood", flood).await;
    assert!(soon("the connection's end", connection).await.unwrap().is_err());
    until("the server's verdict", || node.seen.connections_ended() == 1).await;
    assert!(matches!(
        node.seen.ended.lock().first(),
        Some(Err(ServeError::Abandoned { .. } | ServeError::Http2 { .. }))
    ));
    bystander(&world, &node).await;
}

#[tokio::test]
async fn a_flood_of_headers_is_refused() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let (sender, _connection) = raw(&world, &node).await;
    let mut request = connect("127.0.0.1:2");
    for number in 0..600 {
        let name = http::HeaderName::try_from(format!("x-{number}")).unwrap();
        request.headers_mut().insert(name, "x".repeat(100).parse().unwrap());
    }
    let (answer, _send) = sender.clone().ready().await.unwrap().send_request(request, false).unwrap();
    // RFC 9113 §10.5.1: 431, or the stream or connection is reset.
    match soon("the refusal", answer).await {
        Ok(answer) => assert_ne!(answer.status(), StatusCode::OK),
        Err(error) => assert!(error.is_reset() || error.is_go_away() || error.is_io(), "{error}"),
    }
    assert!(node.seen.requests.lock().is_empty());
    bystander(&world, &node).await;
}

#[tokio::test]
async fn more_streams_than_allowed_are_not_opened() {
    let world = World::new();
    let node =
        Node::start(&world, "server", ServerSettings { max_streams: 10, ..ServerSettings::default() }).await;
    let (sender, _connection) = raw(&world, &node).await;
    let mut held = Vec::new();
    for _ in 0..100 {
        if let Ok(mut sender) = sender.clone().ready().await {
            held.push(sender.send_request(connect("127.0.0.1:2"), false));
        }
    }
    bystander(&world, &node).await;
    until("the first ten", || node.seen.requests.lock().len() >= 10).await;
    let asked = node.seen.requests.lock().iter().filter(|r| r.authority.port() == 2).count();
    assert_eq!(asked, 10);
}

#[tokio::test]
async fn tiny_frames_for_a_stalled_application_harm_nobody() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let stalled = application(|socket| async move {
        std::future::pending::<()>().await;
        drop(socket);
    })
    .await;
    let (sender, connection) = raw(&world, &node).await;
    let mut sender = sender.ready().await.unwrap();
    let (answer, mut send) = sender.send_request(connect(&stalled.to_string()), false).unwrap();
    assert_eq!(soon("the answer", answer).await.unwrap().status(), StatusCode::OK);
    let frames = async {
        for round in 0..60_000 {
            send.reserve_capacity(16);
            while send.capacity() < 16 {
                std::future::poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
            }
            send.send_data(Bytes::from_static(&[7; 16]), false).unwrap();
            if round % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
    };
    soon("60,000 frames", frames).await;
    // The same connection still opens tunnels.
    let target = echo().await.to_string();
    let sender = soon("readiness", sender.ready()).await;
    let (answer, _send) = sender.unwrap().send_request(connect(&target), false).unwrap();
    assert_eq!(soon("the second answer", answer).await.unwrap().status(), StatusCode::OK);
    assert!(!connection.is_finished());
}

#[tokio::test]
async fn a_peer_that_sends_no_preface_is_given_up() {
    let world = World::new();
    let node = Node::start(&world, "server", quick_server()).await;
    let tls: Arc<rustls::ClientConfig> =
        world.certificate("client").client_tls().dangerous_expecting_anyone();
    let socket = TcpStream::connect(node.address).await.unwrap();
    let mut stream = tokio_rustls::TlsConnector::from(tls).connect(unnamed_server(), socket).await.unwrap();
    stream.write_all(b"PRI * HT").await.unwrap();
    until("the server's end", || node.seen.connections_ended() == 1).await;
    assert!(matches!(node.seen.ended.lock().first(), Some(Err(ServeError::HandshakeTimeout(_)))));
    bystander(&world, &node).await;
}

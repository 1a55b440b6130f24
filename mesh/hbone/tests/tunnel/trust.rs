//! Peers that are no longer trusted, because they expired or their root was removed, and peers that do not trust us.

use std::time::{Duration, SystemTime};

use ambit_hbone::{
    ConnectionSettings, Fault, OpenError, PoolSettings, Server, ServerSettings, TunnelStream, WindowBudget,
};
use ambit_identity::Trust;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::*;

async fn echoes(stream: &mut TunnelStream) {
    stream.write_all(b"x").await.unwrap();
    soon("the echo", stream.read_u8()).await.unwrap();
}

/// Client settings whose connections never spread.
fn one_connection() -> PoolSettings {
    PoolSettings { max_connections: 1, ..PoolSettings::default() }
}

async fn passed(end: SystemTime) {
    while SystemTime::now() < end + Duration::from_secs(1) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn soon_expired() -> SystemTime {
    SystemTime::now() + Duration::from_secs(3)
}

/// A server of this trust, whose own certificate the world has issued.
async fn node(world: &World, trust: Trust, settings: ServerSettings) -> Node {
    let server = Server::new(settings, trust.clone(), WindowBudget::default());
    let end = SystemTime::now() + Duration::from_secs(3600);
    Node::serve(world.certificate_until("server", end, &trust), server).await
}

#[tokio::test]
async fn a_client_whose_root_was_removed_opens_no_more_tunnels() {
    let (world, other) = (World::new(), World::new());
    let trust = World::trusting(&[world.root(), other.root()]);
    let node = node(&world, trust.clone(), ServerSettings::default()).await;
    let client = Client::new(&world, "client", one_connection());
    let target = echo().await;
    let mut kept = client.open(node.address, target).await.unwrap().into_stream();
    echoes(&mut kept).await;
    trust.set_roots(other.root().as_bytes()).unwrap();
    let error = client.open(node.address, target).await.unwrap_err();
    assert!(error.never_processed(), "{error}");
    assert_eq!(node.seen.requests.lock().len(), 1, "the handler saw it");
    // The caller decides when to close open tunnels.
    echoes(&mut kept).await;
    let error = client.open(node.address, target).await.unwrap_err();
    assert_eq!((error.fault(), client.dials()), (Fault::Identity, 2), "{error}");
    drop(kept);
    until("the first connection's end", || node.seen.connections_ended() == 2).await;
}

#[tokio::test]
async fn a_client_whose_certificate_expired_opens_no_more_tunnels() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let end = soon_expired();
    let certificate = world.certificate_until("client", end, &world.trust);
    let client = Client::trusting(certificate, world.trust.clone(), one_connection());
    let target = echo().await;
    let mut kept = client.open(node.address, target).await.unwrap().into_stream();
    passed(end).await;
    let error = client.open(node.address, target).await.unwrap_err();
    assert!(error.never_processed(), "{error}");
    echoes(&mut kept).await;
    let error = client.open(node.address, target).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Identity, "{error}");
}

#[tokio::test]
async fn an_idle_connection_of_an_expired_client_gets_goaway() {
    let world = World::new();
    let ping_interval = Duration::from_millis(200);
    let settings = server_with(ConnectionSettings { ping_interval, ..ConnectionSettings::default() });
    let node = Node::start(&world, "server", settings).await;
    let end = soon_expired();
    let certificate = world.certificate_until("client", end, &world.trust);
    let client = Client::trusting(certificate, world.trust.clone(), one_connection());
    client.open(node.address, echo().await).await.unwrap();
    assert_eq!(client.pool.connections(), 1);
    // Without tunnels, GOAWAY ends it.
    until("the end of the connection", || client.pool.connections() == 0).await;
    assert!(SystemTime::now() >= end);
    until("the server's end", || node.seen.connections_ended() == 1).await;
}

#[tokio::test]
async fn a_connection_to_an_expired_server_takes_no_tunnel() {
    let world = World::new();
    let end = soon_expired();
    let server = Server::new(ServerSettings::default(), world.trust.clone(), WindowBudget::default());
    let node = Node::serve(world.certificate_until("server", end, &world.trust), server).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let mut kept = client.open(node.address, target).await.unwrap().into_stream();
    passed(end).await;
    let error = client.open(node.address, target).await.unwrap_err();
    assert_eq!((error.fault(), client.dials()), (Fault::Identity, 2), "{error}");
    echoes(&mut kept).await;
}

#[tokio::test]
async fn a_connection_under_a_removed_root_takes_no_tunnel() {
    let (world, other) = (World::new(), World::new());
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let trust = World::trusting(&[world.root(), other.root()]);
    let end = SystemTime::now() + Duration::from_secs(3600);
    let certificate = world.certificate_until("client", end, &trust);
    let client = Client::trusting(certificate, trust.clone(), PoolSettings::default());
    let target = echo().await;
    let _kept = client.open(node.address, target).await.unwrap();
    trust.set_roots(other.root().as_bytes()).unwrap();
    let error = client.open(node.address, target).await.unwrap_err();
    assert_eq!((error.fault(), client.dials()), (Fault::Identity, 2), "{error}");
}

#[tokio::test]
async fn a_server_that_rejects_our_certificate_is_an_identity_error() {
    let (world, other) = (World::new(), World::new());
    let node = node(&world, World::trusting(&[other.root()]), ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    for round in 1..=20 {
        let error = client.open(node.address, node.address).await.unwrap_err();
        assert!(matches!(error, OpenError::Tls { .. }), "{error:?}");
        assert_eq!((error.fault(), error.never_processed()), (Fault::Identity, false), "{error}");
        assert_eq!(client.dials(), round, "a handshake for each request");
    }
}

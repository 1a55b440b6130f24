//! A tunnel inside a tunnel, as between networks.

use ambit_hbone::{Authority, ConnectRequest, OpenError, Settings, client};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::*;

async fn open_inner(
    world: &World,
    gateway: &Node,
    node: &Node,
    expected: &str,
    target: std::net::SocketAddr,
) -> Result<ambit_hbone::Tunnel, OpenError> {
    let outside = Client::new(world, "client", Settings::default());
    let outer = outside.open(gateway.address, node.address).await?;
    let request = ConnectRequest {
        forwarded_network: Some("east".into()),
        ..ConnectRequest::new(Authority::Address(target))
    };
    let tls = world.certificate("client").client_tls();
    let expected = [World::id(expected)];
    let settings = Settings::default();
    soon("the inner tunnel", client::open_within(outer, gateway.address, tls, &expected, &request, &settings))
        .await
}

#[tokio::test]
async fn the_inner_tunnel_is_authenticated_by_itself_and_carries_bytes() {
    let world = World::new();
    let gateway = Node::start(&world, "server", Settings::default()).await;
    let node = Node::start(&world, "inner", Settings::default()).await;
    let target = echo().await;
    let tunnel = open_inner(&world, &gateway, &node, "inner", target).await.unwrap();
    assert_eq!(tunnel.peer(), &World::id("inner"));
    assert_eq!(
        node.seen.requests.lock().first().and_then(|request| request.forwarded_network.clone()),
        Some("east".into())
    );
    let data = pattern(3 * 1024 * 1024);
    let (mut reader, mut writer) = tokio::io::split(tunnel.into_stream());
    let send = async {
        writer.write_all(&data).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = soon("the echo", async { tokio::join!(send, reader.read_to_end(&mut got)) }).await;
    read.unwrap();
    assert!(got == data, "the echo differs");
    drop((reader, writer));
    until("the inner connection's end", || node.seen.connections_ended() == 1).await;
    assert!(node.seen.ended.lock().iter().all(Result::is_ok));
}

#[tokio::test]
async fn an_inner_server_that_is_somebody_else_gets_no_request() {
    let world = World::new();
    let gateway = Node::start(&world, "server", Settings::default()).await;
    let node = Node::start(&world, "impostor", Settings::default()).await;
    let target = echo().await;
    let opened = open_inner(&world, &gateway, &node, "inner", target).await;
    assert!(matches!(opened, Err(OpenError::Identity { .. })));
    assert!(node.seen.requests.lock().is_empty());
}

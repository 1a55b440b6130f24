//! A tunnel inside a tunnel, as between networks.

use ambit_hbone::client::{self, Target};
use ambit_hbone::{Authority, ClientSettings, ConnectRequest, OpenError, PoolSettings, ServerSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

async fn open_inner(
    world: &World,
    gateway: &Node,
    node: &Node,
    expected: &str,
    target: std::net::SocketAddr,
) -> Result<ambit_hbone::Tunnel, OpenError> {
    let outside = Client::new(world, "client", PoolSettings::default());
    let outer = outside.open(gateway.address, node.address).await?;
    let request = ConnectRequest {
        forwarded_network: Some("east".into()),
        ..ConnectRequest::new(Authority::Address(target))
    };
    let tls = world.certificate("client").client_tls();
    let expected = [World::id(expected)];
    let target = Target { address: gateway.address, source: outside.source, tls: &tls, expected: &expected };
    let settings = ClientSettings::default();
    soon("the inner tunnel", client::open_within(outer, target, &request, &settings)).await
}

#[tokio::test]
async fn an_inner_tunnel_is_authenticated_and_carries_bytes() {
    let world = World::new();
    let gateway = Node::start(&world, "server", ServerSettings::default()).await;
    let node = Node::start(&world, "inner", ServerSettings::default()).await;
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
async fn inner_tunnels_share_a_pooled_connection() {
    let world = World::new();
    let gateway = Node::start(&world, "server", ServerSettings::default()).await;
    let node = Node::start(&world, "inner", ServerSettings::default()).await;
    let outside = Client::new(&world, "client", PoolSettings::default());
    let inside = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let tls = inside.certificate.client_tls();
    let (key, expected) = (inside.key(gateway.address), [World::id("inner")]);
    let mut tunnels = Vec::new();
    for _ in 0..5 {
        let within =
            Target { address: gateway.address, source: inside.source, tls: &tls, expected: &expected };
        let dial = || {
            let (pool, tls, key) = (outside.pool.clone(), tls.clone(), outside.key(gateway.address));
            let (source, address) = (outside.source, node.address);
            async move {
                let expected = [World::id("server")];
                let through = Target { address: key.address, source, tls: &tls, expected: &expected };
                let (address, request) = (key.address, ConnectRequest::new(address));
                let outer = pool.open(&key, through, &request, || TcpStream::connect(address)).await;
                Ok(outer.map_err(std::io::Error::other)?.into_transport())
            }
        };
        let request = ConnectRequest::new(target);
        let opened = inside.pool.open(&key, within, &request, dial);
        tunnels.push(soon("an inner tunnel", opened).await.unwrap());
    }
    assert_eq!((gateway.seen.accepted(), gateway.seen.requests.lock().len()), (1, 1));
    assert_eq!(node.seen.requests.lock().len(), 5);
    for mut stream in tunnels.into_iter().map(ambit_hbone::Tunnel::into_stream) {
        stream.write_all(b"x").await.unwrap();
        soon("the echo", stream.read_u8()).await.unwrap();
    }
}

#[tokio::test]
async fn an_inner_server_that_is_somebody_else_gets_no_request() {
    let world = World::new();
    let gateway = Node::start(&world, "server", ServerSettings::default()).await;
    let node = Node::start(&world, "impostor", ServerSettings::default()).await;
    let target = echo().await;
    let opened = open_inner(&world, &gateway, &node, "inner", target).await;
    assert!(matches!(opened, Err(OpenError::Identity { .. })));
    assert!(node.seen.requests.lock().is_empty());
}

//! One peer that takes all the window that it can get, and another that needs little.

use std::net::IpAddr;
use std::time::Duration;

use ambit_hbone::{ConnectionSettings, PoolSettings, Server, WindowBudget};
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const GREEDY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2));
const MODEST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 3));

/// A client at an address of its own, with one connection.
fn client(world: &World, source: IpAddr) -> Client {
    let settings = PoolSettings { max_connections: 1, spread: 1, ..PoolSettings::default() };
    Client { source, ..Client::new(world, "client", settings) }
}

/// Writes until nothing more is taken.
async fn fill(socket: &mut TcpStream) {
    let chunk = vec![7; 64 * 1024];
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), socket.write(&chunk)).await {
        written.unwrap();
    }
}

#[tokio::test]
async fn slow_readers_of_one_peer_leave_windows_for_another() {
    let world = World::new();
    let budget = WindowBudget::new(12 << 20);
    let connection = ConnectionSettings { stream_window: 1 << 20, ..ConnectionSettings::default() };
    let server = Server::new(server_with(connection), world.trust.clone(), budget.clone());
    let node = Node::serve(world.certificate("server"), server).await;
    let unread = application(|socket| async move {
        std::future::pending::<()>().await;
        drop(socket);
    })
    .await;
    let greedy = client(&world, GREEDY);
    let mut held = join_all((0..40).map(|_| greedy.application(node.address, unread))).await;
    join_all(held.iter_mut().map(|(socket, _)| fill(socket))).await;
    assert!(budget.left() >= 8 << 20, "{} bytes are left by one peer", budget.left());
    assert!(budget.refused() > 0, "the peer did not need more than its share");

    // Another peer needs window for its own slow reader, and for what passes beside it.
    let modest = client(&world, MODEST);
    let (mut slow, _slow_task) = modest.application(node.address, unread).await;
    fill(&mut slow).await;
    let (mut socket, _task) = modest.application(node.address, echo().await).await;
    let (mut reader, mut writer) = socket.split();
    let data = pattern(4 << 20);
    let mut back = vec![0; data.len()];
    let echoed = async { tokio::join!(writer.write_all(&data), reader.read_exact(&mut back)) };
    let (sent, received) = soon("the echo beside a slow reader", echoed).await;
    sent.unwrap();
    received.unwrap();
    assert!(back == data);
    assert_eq!((greedy.dials(), modest.dials()), (1, 1));
}

//! Ends, resets, and bytes in between.

use std::future::poll_fn;
use std::io::{ErrorKind, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ambit_hbone::{PoolSettings, ServerSettings};
use ambit_net::relay::RelayError;
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};

use crate::harness::*;

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let server = application(|mut socket| async move {
        socket.write_all(b"220 ready\r\n").await.unwrap();
        let mut command = [0; 4];
        socket.read_exact(&mut command).await.unwrap();
        socket.write_all(b"221 bye\r\n").await.unwrap();
    })
    .await;
    let (mut socket, task) = client.application(node.address, server).await;
    let mut line = [0; 11];
    soon("the greeting", socket.read_exact(&mut line)).await.unwrap();
    assert_eq!(&line, b"220 ready\r\n");
    socket.write_all(b"QUIT").await.unwrap();
    let mut rest = Vec::new();
    soon("the end", socket.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"221 bye\r\n");
    drop(socket);
    let (ended, sent, received) = soon("the relay's end", task).await.unwrap();
    ended.unwrap();
    assert_eq!((sent, received), (4, 20));
}

#[tokio::test]
async fn a_half_close_is_passed_on_and_the_other_direction_goes_on() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    // The server answers only when it has seen the client's end.
    let server = application(|mut socket| async move {
        let mut request = Vec::new();
        socket.read_to_end(&mut request).await.unwrap();
        request.reverse();
        socket.write_all(&request).await.unwrap();
    })
    .await;
    let (mut socket, task) = client.application(node.address, server).await;
    let request = pattern(700_000);
    let (mut reader, mut writer) = socket.split();
    let send = async {
        writer.write_all(&request).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut answer = Vec::new();
    let (_, read) = soon("the answer", async { tokio::join!(send, reader.read_to_end(&mut answer)) }).await;
    read.unwrap();
    answer.reverse();
    assert!(answer == request, "the answer differs");
    drop(socket);
    soon("the relay's end", task).await.unwrap().0.unwrap();
    until("the server's relay", || node.seen.relayed.lock().len() == 1).await;
    assert!(node.seen.relayed.lock().iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_clients_reset_reaches_the_server_as_a_reset() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let (report, mut reports) = mpsc::unbounded_channel();
    let server = application(move |mut socket| {
        let report = report.clone();
        async move {
            let mut byte = [0];
            socket.read_exact(&mut byte).await.unwrap();
            socket.write_all(&byte).await.unwrap();
            report.send(socket.read(&mut byte).await.map_err(|error| error.kind())).unwrap();
        }
    })
    .await;
    let (mut socket, task) = client.application(node.address, server).await;
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
    assert_eq!(soon("the server's notice", reports.recv()).await.unwrap(), Err(ErrorKind::ConnectionReset));
    assert!(soon("the relay's end", task).await.unwrap().0.is_err());
}

#[tokio::test]
async fn a_servers_reset_reaches_the_client_as_a_reset() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let server = application(|mut socket| async move {
        socket.read_u8().await.unwrap();
        socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    let (mut socket, task) = client.application(node.address, server).await;
    socket.write_all(b"x").await.unwrap();
    let read = soon("the reset", socket.read_u8()).await;
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (ended, ..) = soon("the relay's end", task).await.unwrap();
    assert!(matches!(ended, Err(RelayError::Read { .. })));
}

#[tokio::test]
async fn a_proxy_that_is_killed_resets_its_tunnels() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let (mut socket, _task) = client.application(node.address, echo().await).await;
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    node.kill();
    let read = soon("the reset", socket.read_u8()).await;
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    until("the pool's notice", || client.pool.connections() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_arrives_byte_for_byte_both_ways_at_once() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let (socket, task) = client.application(node.address, echo().await).await;
    let data = Arc::new(pattern(48 * 1024 * 1024));
    let (mut reader, mut writer) = socket.into_split();
    let sent = Arc::clone(&data);
    tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut got = Vec::new();
    soon("all of it", reader.read_to_end(&mut got)).await.unwrap();
    assert!(got == *data, "{} bytes came back, altered", got.len());
    let (ended, sent, received) = soon("the relay's end", task).await.unwrap();
    ended.unwrap();
    assert_eq!((sent, received), (data.len() as u64, data.len() as u64));
}

#[tokio::test]
async fn readers_that_stall_hold_only_themselves_back() {
    let world = World::new();
    // One connection only, so that the small stream shares it with the stalled ones.
    let settings = PoolSettings { spread: 1, max_connections: 1, ..PoolSettings::default() };
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", settings);
    let (proceed, stalled) = watch::channel(false);
    let (report, mut reports) = mpsc::unbounded_channel();
    let server = application(move |mut socket| {
        let (mut stalled, report) = (stalled.clone(), report.clone());
        async move {
            stalled.wait_for(|proceed| *proceed).await.unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).await.unwrap();
            report.send(all).unwrap();
        }
    })
    .await;
    let data = Arc::new(pattern(24 * 1024 * 1024));
    let progress = Arc::new(AtomicUsize::new(0));
    let mut senders = Vec::new();
    // Their windows together exceed the window of the connection.
    for _ in 0..5 {
        let (mut bulk, _task) = client.application(node.address, server).await;
        let (data, progress) = (Arc::clone(&data), Arc::clone(&progress));
        senders.push(tokio::spawn(async move {
            for chunk in data.chunks(64 * 1024) {
                bulk.write_all(chunk).await.unwrap();
                progress.fetch_add(1, Ordering::SeqCst);
            }
            bulk.shutdown().await.unwrap();
            bulk
        }));
    }
    // Bulk continues between the exchanges of a small stream until the windows are full.
    let (mut beside, _beside_task) = client.application(node.address, echo().await).await;
    let mut before = 0;
    while before == 0 || progress.load(Ordering::SeqCst) != before {
        before = progress.load(Ordering::SeqCst);
        for round in 0..100_u32 {
            beside.write_u32(round).await.unwrap();
            assert_eq!(soon("the stream beside", beside.read_u32()).await.unwrap(), round);
        }
    }
    assert!(senders.iter().all(|sender| !sender.is_finished()), "a stalled reader did not stop its sender");
    let (mut small, _small_task) = client.application(node.address, echo().await).await;
    for round in 0..200_u32 {
        small.write_all(&round.to_be_bytes()).await.unwrap();
        assert_eq!(soon("the small stream", small.read_u32()).await.unwrap(), round);
    }
    proceed.send(true).unwrap();
    for _ in 0..5 {
        let all = soon("the stalled bytes", reports.recv()).await.unwrap();
        assert!(all == *data, "the stalled bytes differ");
    }
    assert_eq!(client.dials(), 1);
    for sender in senders {
        soon("the sender", sender).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_moves_whole_pieces_and_writes_vectored() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let mut stream = client.open(node.address, echo().await).await.unwrap().into_stream();
    let first = pattern(100_000);
    poll_fn(|cx| stream.poll_ready(cx)).await.unwrap();
    stream.send(Bytes::from(first.clone())).unwrap();
    let parts = [IoSlice::new(b"one"), IoSlice::new(b""), IoSlice::new(b"two")];
    assert_eq!(stream.write_vectored(&parts).await.unwrap(), 6);
    stream.shutdown().await.unwrap();
    let mut got = Vec::new();
    // A read of a part leaves the rest of its piece to the next.
    got.push(soon("the first byte", stream.read_u8()).await.unwrap());
    while let Some(piece) = soon("a piece", poll_fn(|cx| stream.poll_data(cx))).await {
        got.extend_from_slice(&piece.unwrap());
    }
    assert!(got == [&first[..], b"onetwo"].concat(), "{} bytes came back, altered", got.len());
}

#[tokio::test]
async fn bulk_in_a_stream_is_avoided_by_new_tunnels() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let sink = application(|mut socket| async move {
        let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
    })
    .await;
    let mut stream = client.open(node.address, sink).await.unwrap().into_stream();
    let busy = tokio::spawn(async move {
        let chunk = pattern(1024 * 1024);
        while stream.write_all(&chunk).await.is_ok() {}
    });
    let target = echo().await;
    let spread = async {
        while client.dials() < 2 {
            client.open(node.address, target).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a second connection", spread).await;
    busy.abort();
}

#[tokio::test]
async fn hundreds_of_tunnels_at_once_each_carry_their_own_bytes() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Arc::new(Client::new(&world, "client", PoolSettings::default()));
    let target = echo().await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..500_usize {
        let (client, address) = (Arc::clone(&client), node.address);
        tasks.spawn(async move {
            let (socket, task) = client.application(address, target).await;
            let data: Vec<u8> = pattern(20_000 + number).iter().map(|byte| byte ^ number as u8).collect();
            let (mut reader, mut writer) = socket.into_split();
            let mut got = Vec::new();
            let send = async {
                for chunk in data.chunks(100 + number % 3000) {
                    writer.write_all(chunk).await.unwrap();
                }
                writer.shutdown().await.unwrap();
            };
            let (_, read) =
                soon("the echo", async { tokio::join!(send, reader.read_to_end(&mut got)) }).await;
            read.unwrap();
            assert!(got == data, "tunnel {number} got other bytes");
            soon("the relay's end", task).await.unwrap().0.unwrap();
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    assert_eq!(client.pool.tunnels(), 0);
    assert!(client.dials() <= 4, "{} connections for 500 tunnels", client.dials());
}

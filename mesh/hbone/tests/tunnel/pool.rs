//! When tunnels of one pool share a connection, and when they do not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ambit_hbone::client::Target;
use ambit_hbone::{
    ClientSettings, ConnectRequest, ConnectionSettings, InFlight, OpenError, PoolSettings, ServerSettings,
};
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::io::InspectReader;

use crate::harness::*;

#[tokio::test]
async fn many_first_tunnels_share_one_connection() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let opened = join_all((0..50).map(|_| client.open(node.address, target))).await;
    assert!(opened.iter().all(Result::is_ok));
    assert_eq!((client.dials(), node.seen.accepted()), (1, 1));
    assert_eq!(client.counters.shared.get(), 49);
    assert_eq!(client.pool.tunnels(), 50);
    drop(opened);
    assert_eq!(client.pool.tunnels(), 0);
}

#[tokio::test]
async fn waiters_see_the_failure_of_the_shared_dial() {
    let world = World::new();
    let client = Client::new(&world, "client", PoolSettings::default());
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let opened = join_all((0..20).map(|_| client.open(nobody, nobody))).await;
    assert!(opened.iter().all(|opened| matches!(opened, Err(OpenError::Dial { .. }))));
    assert_eq!(client.dials(), 1);
    // A later one tries again.
    assert!(client.open(nobody, nobody).await.is_err());
    assert_eq!(client.dials(), 2);
}

#[tokio::test]
async fn a_dial_survives_the_caller_that_started_it() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (tls, expected) = (client.certificate.client_tls(), [World::id("server")]);
    let (request, key, address) = (ConnectRequest::new(target), client.key(node.address), node.address);
    let gate = Arc::new(Notify::new());
    let slow = || {
        let gate = Arc::clone(&gate);
        async move {
            gate.notified().await;
            TcpStream::connect(address).await
        }
    };
    let target_of = Target { address, source: client.source, tls: &tls, expected: &expected };
    let first = client.pool.open(&key, target_of, &request, slow);
    assert!(tokio::time::timeout(Duration::from_millis(50), first).await.is_err());
    let second = client.open(node.address, target);
    let (opened, ()) = tokio::join!(second, async {
        until("the second's waiting", || client.counters.shared.get() == 1).await;
        gate.notify_one();
    });
    opened.unwrap();
    assert_eq!(client.dials(), 0, "the second one dialled");
}

#[tokio::test]
async fn full_connections_are_added_to_up_to_the_limit() {
    let world = World::new();
    let settings = PoolSettings { max_streams: 2, max_connections: 2, spread: 1, ..PoolSettings::default() };
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", settings);
    let target = echo().await;
    let mut tunnels = Vec::new();
    for _ in 0..4 {
        tunnels.push(client.open(node.address, target).await.unwrap());
    }
    assert_eq!(client.dials(), 2);
    assert!(matches!(
        client.open(node.address, target).await,
        Err(OpenError::Exhausted { connections: 2, .. })
    ));
    tunnels.pop();
    client.open(node.address, target).await.unwrap();
}

#[tokio::test]
async fn the_peers_limit_of_streams_is_kept() {
    let world = World::new();
    let node =
        Node::start(&world, "server", ServerSettings { max_streams: 3, ..ServerSettings::default() }).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    // The first connection reports the peer's limit.
    let mut tunnels = vec![client.open(node.address, target).await.unwrap()];
    for _ in 0..8 {
        tunnels.push(client.open(node.address, target).await.unwrap());
    }
    assert_eq!(client.dials(), 3);
}

#[tokio::test]
async fn a_tunnel_beside_bulk_gets_another_connection() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let sink = application(|mut socket| async move {
        let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
    })
    .await;
    let (mut bulk, _task) = client.application(node.address, sink).await;
    let busy = tokio::spawn(async move {
        let chunk = pattern(1024 * 1024);
        while bulk.write_all(&chunk).await.is_ok() {}
    });
    let target = echo().await;
    let spread = async {
        // After 10 MiB of traffic.
        while client.dials() < 2 {
            client.open(node.address, target).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a second connection", spread).await;
    let one = client.open(node.address, target).await.unwrap();
    let two = client.open(node.address, target).await.unwrap();
    assert_eq!(client.dials(), 2, "tunnels spread although a quiet connection was there");
    drop((one, two));
    busy.abort();
}

#[tokio::test]
async fn a_second_connection_that_hangs_holds_no_tunnel_up() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    // A wire that carries one connection and lets others hang.
    let wire = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (middle, far) = (wire.local_addr().unwrap(), node.address);
    let forwarding = tokio::spawn(async move {
        let (mut near, _) = wire.accept().await.unwrap();
        let mut far = TcpStream::connect(far).await.unwrap();
        let _ = copy_bidirectional(&mut near, &mut far).await;
        drop(wire);
    });
    let sink = application(|mut socket| async move {
        let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
    })
    .await;
    let (mut bulk, _task) = client.application(middle, sink).await;
    let busy = tokio::spawn(async move {
        let chunk = pattern(1024 * 1024);
        while bulk.write_all(&chunk).await.is_ok() {}
    });
    let target = echo().await;
    let mut slowest = Duration::ZERO;
    let spread = async {
        while client.dials() < 2 {
            client.open(middle, target).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for _ in 0..5 {
            let start = Instant::now();
            client.open(middle, target).await.unwrap();
            slowest = slowest.max(start.elapsed());
        }
    };
    soon("tunnels beside the hanging connection", spread).await;
    assert!(slowest < Duration::from_secs(5), "a tunnel waited {slowest:?}");
    busy.abort();
    forwarding.abort();
}

#[tokio::test]
async fn eviction_keeps_new_tunnels_off_and_lets_open_ones_finish() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (mut socket, task) = client.application(node.address, target).await;
    let key = client.key(node.address);
    client.pool.evict(|other| *other == key, InFlight::Finish);
    assert_eq!(client.counters.evicted.get(), 1);
    assert_eq!(client.pool.connections_of(&key), 0);
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    client.open(node.address, target).await.unwrap();
    assert_eq!(client.dials(), 2);
    drop(socket);
    soon("the relay's end", task).await.unwrap().0.unwrap();
    until("the evicted connection's end", || node.seen.connections_ended() == 1).await;
    assert!(node.seen.ended.lock().iter().all(Result::is_ok));
}

#[tokio::test]
async fn pods_of_one_identity_do_not_share_connections() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (mut socket, _task) = client.application(node.address, target).await;
    let mut other = client.key(node.address);
    other.origin = "another-pod-uid";
    client.request_as(&other, &[World::id("server")], &ConnectRequest::new(target)).await.unwrap();
    assert_eq!(node.seen.accepted(), 2);
    client.pool.evict(|key| key.origin == "pod-uid", InFlight::Finish);
    assert_eq!(client.pool.connections_of(&client.key(node.address)), 0);
    assert_eq!(client.pool.connections_of(&other), 1);
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
}

#[tokio::test]
async fn eviction_can_cut_and_other_workloads_are_unharmed() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (mut gone, task) = client.application(node.address, target).await;
    let mut other_key = client.key(node.address);
    other_key.destination = "other-uid";
    let request = ConnectRequest::new(target);
    let other = client.request_as(&other_key, &[World::id("server")], &request).await.unwrap();
    client.pool.evict(|key| key.destination == "server-uid", InFlight::Cut);
    soon("the cut", gone.read_u8()).await.unwrap_err();
    assert!(soon("the relay's end", task).await.unwrap().0.is_err());
    let mut other = other.into_stream();
    other.write_all(b"x").await.unwrap();
    soon("the other's echo", other.read_u8()).await.unwrap();
}

#[tokio::test]
async fn eviction_reaches_a_connection_that_is_being_made() {
    let world = World::new();
    let client = Client::new(&world, "client", PoolSettings::default());
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let open = client.open(address, address);
    let evict = async {
        until("the dial", || client.dials() == 1).await;
        tokio::task::yield_now().await;
        client.pool.evict(|key| key.destination == "server-uid", InFlight::Finish);
    };
    let (opened, ()) = tokio::join!(open, evict);
    assert!(matches!(opened, Err(OpenError::Abandoned { .. } | OpenError::Evicted { .. })), "{opened:?}");
}

#[tokio::test]
async fn after_a_renewal_new_tunnels_use_the_new_certificate() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let mut client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let mut old = client.open(node.address, target).await.unwrap().into_stream();
    client.certificate = world.certificate("client");
    client.open(node.address, target).await.unwrap();
    assert_eq!(client.dials(), 2);
    old.write_all(b"x").await.unwrap();
    soon("the old one's echo", old.read_u8()).await.unwrap();
    drop(old);
    until("the old connection's end", || node.seen.connections_ended() == 1).await;
}

#[tokio::test]
async fn a_peer_that_is_not_accepted_any_more_is_cut() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let (mut socket, _task) = client.application(node.address, echo().await).await;
    client.pool.retain(|_| true);
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    client.pool.retain(|peer| peer.identity() != &World::id("server"));
    soon("the cut", socket.read_u8()).await.unwrap_err();
    until("the pool's notice", || client.pool.connections() == 0).await;
}

#[tokio::test]
async fn goaway_lets_open_tunnels_finish_and_sends_new_ones_elsewhere() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (mut socket, task) = client.application(node.address, target).await;
    node.drain();
    let moved = async {
        while client.dials() < 2 {
            if let Err(error) = client.open(node.address, target).await {
                assert!(error.never_processed(), "{error}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a new connection", moved).await;
    for _ in 0..10 {
        socket.write_all(b"x").await.unwrap();
        soon("the echo", socket.read_u8()).await.unwrap();
    }
    drop(socket);
    soon("the relay's end", task).await.unwrap().0.unwrap();
    until("the drained connection's end", || node.seen.connections_ended() == 1).await;
    assert!(node.seen.ended.lock().iter().all(Result::is_ok));
}

#[tokio::test]
async fn while_a_server_drains_requests_fail_as_never_processed() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let opened = AtomicUsize::new(0);
    let load = async {
        for _ in 0..300 {
            // The pool leaves retries to its caller.
            while let Err(error) = client.open(node.address, target).await {
                assert!(error.never_processed(), "{error}");
            }
            opened.fetch_add(1, Ordering::SeqCst);
        }
    };
    let drains = async {
        while opened.load(Ordering::SeqCst) < 300 {
            node.drain();
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    soon("the load", Box::pin(async { tokio::join!(load, drains) })).await;
    assert!(client.dials() > 2, "no drain took effect");
}

/// A relay to `node` that is reset at the next byte from the client once the switch is set.
async fn cutting(node: SocketAddr) -> (SocketAddr, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, switch) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let cut = Arc::clone(&switch);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let cut = Arc::clone(&cut);
            tokio::spawn(async move {
                let mut server = TcpStream::connect(node).await.unwrap();
                let (mut sent, mut answered) = (vec![0; 16_384], vec![0; 16_384]);
                loop {
                    tokio::select! {
                        read = client.read(&mut sent) => match read {
                            Ok(n @ 1..) if !cut.swap(false, Ordering::SeqCst) => {
                                server.write_all(&sent[..n]).await.unwrap();
                            }
                            _ => return,
                        },
                        read = server.read(&mut answered) => match read {
                            Ok(n @ 1..) => client.write_all(&answered[..n]).await.unwrap(),
                            _ => return,
                        },
                    }
                }
            });
        }
    });
    (address, switch)
}

#[tokio::test]
async fn a_connect_that_is_lost_is_reported_and_not_sent_again() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (address, switch) = cutting(node.address).await;
    let _first = client.open(address, target).await.unwrap();
    switch.store(true, Ordering::SeqCst);
    let error = client.open(address, target).await.unwrap_err();
    assert!(matches!(error, OpenError::Lost { .. }) && !error.never_processed(), "{error}");
    assert!(!switch.load(Ordering::SeqCst), "the CONNECT met the cut");
    assert_eq!(client.dials(), 1);
    client.open(address, target).await.expect("on a connection of its own");
}

#[tokio::test]
async fn a_connection_without_tunnels_is_closed_after_the_idle_time() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let idle_timeout = Duration::from_millis(200);
    let settings = pool_with(ConnectionSettings { idle_timeout, ..ConnectionSettings::default() });
    let client = Client::new(&world, "client", settings.clone());
    let target = echo().await;
    let tunnel = client.open(node.address, target).await.unwrap();
    // Another's idle time begins later and passes.
    let idle = Client::new(&world, "client", settings);
    drop(idle.open(node.address, target).await.unwrap());
    until("the idle close of another", || idle.pool.connections() == 0).await;
    assert_eq!(client.pool.connections(), 1, "closed under an open tunnel");
    drop(tunnel);
    until("the idle close", || client.pool.connections() == 0).await;
    until("the server's ends", || node.seen.connections_ended() == 2).await;
    assert!(node.seen.ended.lock().iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_server_closes_an_idle_connection_as_well() {
    let world = World::new();
    let idle_timeout = Duration::from_millis(200);
    let settings = server_with(ConnectionSettings { idle_timeout, ..ConnectionSettings::default() });
    let node = Node::start(&world, "server", settings).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    client.open(node.address, echo().await).await.unwrap();
    until("the server's end", || node.seen.connections_ended() == 1).await;
    until("the pool's notice", || client.pool.connections() == 0).await;
}

#[tokio::test]
async fn a_path_that_goes_silent_is_noticed_by_ping() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let settings = pool_with(ConnectionSettings {
        ping_interval: Duration::from_millis(100),
        ping_timeout: Duration::from_millis(300),
        ..ConnectionSettings::default()
    });
    let client = Client::new(&world, "client", settings);
    // A wire that can be cut without an end noticing.
    let wire = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (middle, far) = (wire.local_addr().unwrap(), node.address);
    let cut = Arc::new(Notify::new());
    let cut_here = Arc::clone(&cut);
    let (answers, answered) = tokio::sync::watch::channel(0);
    let forwarding = tokio::spawn(async move {
        let (mut near, _) = wire.accept().await.unwrap();
        let far = TcpStream::connect(far).await.unwrap();
        let mut far = InspectReader::new(far, |_: &[u8]| answers.send_modify(|count| *count += 1));
        tokio::select! {
            _ = copy_bidirectional(&mut near, &mut far) => {}
            () = cut_here.notified() => {}
        }
        std::future::pending::<()>().await;
    });
    let (mut socket, _task) = client.application(middle, echo().await).await;
    // Nothing else is sent than pings and their answers.
    let before = *answered.borrow();
    until("several pings", || *answered.borrow() >= before + 5).await;
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    cut.notify_one();
    soon("the notice", socket.read_u8()).await.unwrap_err();
    assert_eq!(client.counters.ping_timeouts.get(), 1);
    assert_eq!(client.pool.connections(), 0);
    forwarding.abort();
}

/// A relay to `node` whose first connection goes silent on demand, without an end noticing. Later connections are relayed.
async fn silencing(node: SocketAddr) -> (SocketAddr, Arc<Notify>) {
    let wire = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, silence) = (wire.local_addr().unwrap(), Arc::new(Notify::new()));
    let mut first = Some(Arc::clone(&silence));
    tokio::spawn(async move {
        while let Ok((mut near, _)) = wire.accept().await {
            let silence = first.take();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(node).await.unwrap();
                let carry = copy_bidirectional(&mut near, &mut far);
                let Some(silence) = silence else { return drop(carry.await) };
                tokio::select! {
                    _ = carry => {}
                    () = silence.notified() => {}
                }
                std::future::pending::<()>().await;
            });
        }
    });
    (address, silence)
}

#[tokio::test]
async fn a_drained_connection_without_tunnels_is_not_waited_for() {
    let world = World::new();
    let drain_idle = Duration::from_millis(200);
    let settings = server_with(ConnectionSettings { drain_idle, ..ConnectionSettings::default() });
    let node = Node::start(&world, "server", settings).await;
    let target = echo().await;
    let (address, silence) = silencing(node.address).await;
    let idle = Client::new(&world, "client", PoolSettings::default());
    drop(idle.open(address, target).await.unwrap());
    until("the tunnel's end", || idle.pool.tunnels() == 0).await;
    let busy = Client::new(&world, "client", PoolSettings::default());
    let (mut socket, _task) = busy.application(node.address, target).await;
    silence.notify_one();
    let start = Instant::now();
    node.drain();
    until("the end of the silent one", || node.seen.connections_ended() == 1).await;
    assert!(start.elapsed() < Duration::from_secs(5), "after {:?}", start.elapsed());
    tokio::time::sleep(drain_idle * 3).await;
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    drop(socket);
    until("the end of the busy one", || node.seen.connections_ended() == 2).await;
    assert!(node.seen.ended.lock().iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_silent_connection_takes_no_new_tunnel_and_keeps_open_ones() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let probe_timeout = Duration::from_millis(200);
    let settings = ClientSettings { probe_timeout, ..ClientSettings::default() };
    let settings = PoolSettings { client: settings, ..PoolSettings::default() };
    let client = Client::new(&world, "client", settings);
    let target = echo().await;
    let (address, silence) = silencing(node.address).await;
    let (mut kept, _task) = client.application(address, target).await;
    silence.notify_one();
    let start = Instant::now();
    let error = client.open(address, target).await.unwrap_err();
    assert!(matches!(error, OpenError::Silent { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "after {:?}", start.elapsed());
    client.open(address, target).await.expect("on a connection of its own");
    assert_eq!((client.dials(), client.counters.silent.get()), (2, 1));
    assert_eq!(client.pool.connections(), 2, "the silent one may yet speak again");
    let ended = tokio::time::timeout(probe_timeout, kept.read_u8()).await;
    assert!(ended.is_err(), "an open tunnel was cut: {ended:?}");
}

#[tokio::test]
async fn a_slow_application_is_not_taken_for_a_silent_peer() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let mut settings = quick();
    settings.client.probe_timeout = Duration::from_millis(50);
    let client = Client::new(&world, "client", settings);
    let error = client.open(node.address, "127.0.0.1:2".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, OpenError::ConnectTimeout { .. }), "{error}");
    client.open(node.address, echo().await).await.unwrap();
    assert_eq!((client.dials(), client.counters.silent.get()), (1, 0));
}

#[tokio::test]
async fn a_draining_pool_refuses_new_tunnels() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    let (mut socket, _task) = client.application(node.address, target).await;
    client.pool.drain();
    assert!(matches!(client.open(node.address, target).await, Err(OpenError::Draining)));
    socket.write_all(b"x").await.unwrap();
    soon("the echo", socket.read_u8()).await.unwrap();
    client.pool.cut();
    soon("the cut", socket.read_u8()).await.unwrap_err();

    let second = Client::new(&world, "client", PoolSettings::default());
    second.open(node.address, target).await.unwrap();
    drop(second);
    until("both ends", || node.seen.connections_ended() == 2).await;
}

//! Namespaces, stocks of sockets and connections between them. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use ambit_net::connect::ConnectError;
use ambit_net::listen::{Options, bind_udp, listen_tcp};
use ambit_net::sockdiag::{self, Kind};
use ambit_net::{Family, Netns, NetnsError, PROXY_MARK, SocketStock, connect, connect_local};
use rtnetlink::LinkUnspec;
use tokio::net::{TcpListener, TcpStream};

const SOON: Duration = Duration::from_secs(5);

/// A namespace with its loopback device up.
async fn namespace() -> Netns {
    let netns = Netns::create().expect("these tests need root: creating a network namespace failed");
    let runtime = tokio::runtime::Handle::current();
    let (driver, handle, _) = netns
        .run(move || {
            let _on = runtime.enter();
            rtnetlink::new_connection()
        })
        .await
        .unwrap()
        .unwrap();
    let driver = tokio::spawn(driver);
    handle.link().set(LinkUnspec::new_with_index(1).up().build()).execute().await.unwrap();
    driver.abort();
    netns
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

#[tokio::test]
async fn code_runs_inside_and_the_caller_stays_outside() {
    let inside = namespace().await;
    let before = Netns::current().unwrap().id();
    let seen = inside.run(|| Netns::current().unwrap().id()).await.unwrap();
    assert_eq!(seen, inside.id());
    assert_ne!(seen, before);
    assert_eq!(inside.run_blocking(|| Netns::current().unwrap().id()).unwrap(), inside.id());
    let thread = inside.thread("inside", || Netns::current().unwrap().id()).unwrap();
    assert_eq!(thread.join().unwrap().unwrap(), inside.id());
    assert_eq!(Netns::current().unwrap().id(), before);
}

#[tokio::test]
async fn two_namespaces_take_turns_on_the_helper_thread() {
    let (one, two) = (namespace().await, namespace().await);
    for _ in 0..50 {
        for netns in [&one, &two] {
            assert_eq!(netns.run(|| Netns::current().unwrap().id()).await.unwrap(), netns.id());
        }
    }
}

#[tokio::test]
async fn a_panic_inside_is_an_error_of_its_caller_only() {
    let inside = namespace().await;
    let outcome: Result<(), NetnsError> = inside.run(|| panic!("on purpose")).await;
    assert!(matches!(outcome, Err(NetnsError::Panicked(id)) if id == inside.id()));
    assert_eq!(inside.run(|| 7).await.unwrap(), 7);
}

#[tokio::test]
async fn a_descriptor_of_something_else_is_no_namespace() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Netns::from_fd(file.into()), Err(NetnsError::NotANamespace(_))));
    let mount = std::fs::File::open("/proc/self/ns/mnt").unwrap();
    assert!(matches!(Netns::from_fd(mount.into()), Err(NetnsError::NotANamespace(_))));
    assert!(matches!(Netns::open("/nowhere"), Err(NetnsError::Open { .. })));
}

#[tokio::test]
async fn a_stock_has_marked_sockets_and_refills_itself() {
    let inside = namespace().await;
    let listener = listen_tcp(&inside, loopback(8080), Options::default()).await.unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let stock = SocketStock::new(inside.clone(), Some(PROXY_MARK));
    assert!(stock.is_empty());
    let mut open = Vec::new();
    for _ in 0..20 {
        open.push(connect(&stock, loopback(8080), SOON).await.unwrap());
        open.push(listener.accept().await.unwrap().0);
    }
    let connections = sockdiag::list(&inside, Kind::TcpConnections).await.unwrap();
    let marked = connections.iter().filter(|c| c.mark == PROXY_MARK && c.remote.port() == 8080);
    assert_eq!(marked.count(), 20);
    let deadline = Instant::now() + SOON;
    while stock.is_empty() {
        assert!(Instant::now() < deadline, "the stock was not refilled");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(stock.try_take(Family::V4).is_some());
}

#[tokio::test]
async fn a_burst_never_outgrows_the_stocks_limit() {
    let inside = namespace().await;
    let stock = SocketStock::new(inside, Some(PROXY_MARK));
    for _ in 0..2000 {
        stock.take(Family::V4).await.unwrap();
        assert!(stock.len() <= ambit_net::stock::MAX_STOCK);
    }
}

#[tokio::test]
async fn failed_connections_say_where_to_and_why() {
    let inside = namespace().await;
    let stock = SocketStock::new(inside.clone(), Some(PROXY_MARK));
    let refused = connect(&stock, loopback(9), SOON).await.unwrap_err();
    assert!(matches!(&refused, ConnectError::Refused { .. }), "{refused}");
    assert!(refused.to_string().contains("127.0.0.1:9"), "{refused}");
    let foreign = Some("[::1]:0".parse().unwrap());
    let other_family = connect_local(&stock, foreign, loopback(9), SOON).await.unwrap_err();
    assert!(matches!(other_family, ConnectError::Bind { .. }), "{other_family}");
    // A full queue answers nothing: the kernel drops the SYN.
    let full = listen_tcp(&inside, loopback(7), Options::default()).await.unwrap();
    socket2::SockRef::from(&full).listen(0).unwrap();
    let limit = Duration::from_millis(200);
    let mut held = Vec::new();
    let late = loop {
        match connect(&stock, loopback(7), limit).await {
            Ok(stream) if held.len() < 10 => held.push(stream),
            Ok(_) => panic!("the queue is never full"),
            Err(error) => break error,
        }
    };
    assert!(matches!(late, ConnectError::TimedOut { .. }), "{late}");
}

async fn listen(inside: &Netns, port: u16) -> TcpListener {
    let listener = listen_tcp(inside, loopback(port), Options::default()).await.unwrap();
    TcpListener::from_std(listener).unwrap()
}

/// A client's address. Loopback devices accept all of 127.0.0.0/8, so answers arrive.
fn client(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(127, 9, 9, 9), port))
}

#[tokio::test]
async fn a_local_connection_has_the_clients_port_where_possible() {
    let inside = namespace().await;
    let stock = SocketStock::new(inside.clone(), Some(PROXY_MARK));
    let (one, other) = (listen(&inside, 8080).await, listen(&inside, 8081).await);
    let dial = |source: SocketAddr, to: SocketAddr| {
        let stock = stock.clone();
        async move { connect_local(&stock, Some(source), to, SOON).await.unwrap() }
    };
    let seen = |accepted: &TcpStream| accepted.peer_addr().unwrap();

    let first = dial(client(40_000), loopback(8080)).await;
    let accepted = one.accept().await.unwrap().0;
    assert_eq!(seen(&accepted), client(40_000));
    let elsewhere = dial(client(40_000), loopback(8081)).await;
    assert_eq!(seen(&other.accept().await.unwrap().0), client(40_000), "towards another port it is free");

    // A second connection can't have the same four-tuple, so it gets another port. The same holds for a minute after the first
    // has ended.
    let _second = dial(client(40_000), loopback(8080)).await;
    let second = one.accept().await.unwrap().0;
    assert_eq!(seen(&second).ip(), client(0).ip());
    assert_ne!(seen(&second).port(), 40_000);
    drop(first);
    accepted.readable().await.unwrap();
    drop(accepted);
    let _third = dial(client(40_000), loopback(8080)).await;
    let third = one.accept().await.unwrap().0;
    assert_eq!(seen(&third).ip(), client(0).ip());

    // Ports below the ephemeral range are left to applications.
    let _low = dial(client(9090), loopback(8080)).await;
    assert_ne!(seen(&one.accept().await.unwrap().0).port(), 9090);
    let wide = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 40_000));
    listen_tcp(&inside, wide, Options::default())
        .await
        .expect("a server finds its port free beside a connection");
    drop(elsewhere);
}

#[tokio::test]
async fn client_ports_stay_free_for_the_namespace() {
    const PORTS: std::ops::Range<u16> = 40_000..40_020;
    let inside = namespace().await;
    let range = format!("{} {}", PORTS.start, PORTS.end - 1);
    inside
        .run(move || std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range))
        .await
        .unwrap()
        .unwrap();
    let stock = SocketStock::new(inside.clone(), Some(PROXY_MARK));
    let (one, other) = (listen(&inside, 8080).await, listen(&inside, 8081).await);
    // All ports but one were used by this client and are in TIME_WAIT.
    for port in PORTS.skip(1) {
        let dialled = connect_local(&stock, Some(client(port)), loopback(8080), SOON).await.unwrap();
        let accepted = one.accept().await.unwrap().0;
        assert_eq!(accepted.peer_addr().unwrap(), client(port));
        drop(dialled);
        accepted.readable().await.unwrap();
    }
    let taken = client(PORTS.start + 7);
    connect_local(&stock, Some(taken), loopback(8080), SOON).await.expect("the port that is left");
    assert_eq!(one.accept().await.unwrap().0.peer_addr().unwrap(), client(PORTS.start));
    for _ in PORTS {
        let own =
            connect(&stock, loopback(8081), SOON).await.expect("a port for the namespace's own connection");
        drop((own, other.accept().await.unwrap()));
    }
}

#[tokio::test]
async fn listed_sockets_are_those_of_the_namespace() {
    let inside = namespace().await;
    let tcp = listen_tcp(&inside, loopback(8080), Options::marked(PROXY_MARK)).await.unwrap();
    let udp = bind_udp(&inside, "[::1]:5353".parse().unwrap(), Options::default()).await.unwrap();
    let listeners = sockdiag::list(&inside, Kind::TcpListeners).await.unwrap();
    assert_eq!(listeners.len(), 1);
    assert_eq!((listeners[0].local, listeners[0].mark), (loopback(8080), PROXY_MARK));
    let datagrams = sockdiag::list(&inside, Kind::Udp).await.unwrap();
    assert_eq!(datagrams.len(), 1);
    assert_eq!(datagrams[0].local, udp.local_addr().unwrap());
    let inode = std::os::unix::fs::MetadataExt::ino(
        &std::fs::File::from(std::os::fd::OwnedFd::from(tcp.try_clone().unwrap())).metadata().unwrap(),
    );
    assert_eq!(u64::from(listeners[0].inode), inode);
    drop((tcp, udp));
    assert_eq!(sockdiag::list(&inside, Kind::TcpListeners).await.unwrap(), []);
}

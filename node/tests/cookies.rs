//! Connections that a listener makes from a SYN cookie, in real namespaces. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ambit_net::{PROXY_MARK, SocketStock, connect_local, original_dst};
use ambit_node::redirect::{self, FormerSettings, Stage};
use common::raw::{self, SYN, Wire};
use common::traffic::{Proxy, SOON, accept, apply, dial, listen, set, talk};
use common::{Host, pair};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

const APPLICATION: u16 = 9080;
const COOKIES: &str = "net/ipv4/tcp_syncookies";
const BACKLOG: i32 = 5;
const CLIENTS: usize = 40;
/// How long a client waits: a SYN that a full queue drops is sent again after 1, 3 and 7 s.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn answers_of_a_connection_made_from_a_cookie_go_to_the_proxy() {
    let (outside, pod) = pair().await;
    set(&pod, COOKIES, 2).await;
    apply(&pod, Stage::In).await;
    let mut wire = Wire::open(&outside.netns).await;
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, APPLICATION);
        let application = listen(&pod.netns, to).await;
        for client in [client, stranger(client)] {
            proxied(&pod, client, to, &application).await;
        }
    }
    assert!(of_application(&mut wire).is_empty());
}

/// The default of `tcp_syncookies`: only a listener whose queue is full makes cookies.
#[tokio::test]
async fn a_full_queue_of_the_application_sends_nothing_past_the_proxy() {
    let (outside, pod) = pair().await;
    set(&pod, COOKIES, 1).await;
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, APPLICATION);
        let application = small(&pod, to).await;
        // Neighbours find each other first: what is sent before may come late.
        talk(&mut dial(&outside.netns, to).await, &mut accept(&application).await.0).await;
        // Clients that say no more than this fill the queue, before the pod enters the mesh.
        for port in 0..4 * BACKLOG as u16 {
            let silent = SocketAddr::new(stranger(client), 30_000 + port);
            let first = raw::whole(silent.ip(), own, &raw::tcp(silent, to, SYN, &[], b""));
            raw::send(&outside.netns, own, vec![first]).await;
        }
        apply(&pod, Stage::In).await;
        let mut wire = Wire::open(&outside.netns).await;
        let before = cookies_sent(&pod).await;
        proxied(&pod, client, to, &application).await;
        assert!(cookies_sent(&pod).await > before, "the queue of {to} was not full");
        let leaked: Vec<_> =
            of_application(&mut wire).into_iter().filter(|seen| seen.to.ip() == client).collect();
        assert!(leaked.is_empty(), "{leaked:?}");
        redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    }
}

#[tokio::test]
async fn forty_clients_at_once_are_served_by_a_backlog_of_five() {
    for cookies in [1, 2] {
        let (outside, pod) = pair().await;
        set(&pod, COOKIES, cookies).await;
        apply(&pod, Stage::In).await;
        let mut wire = Wire::open(&outside.netns).await;
        for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
            let to = SocketAddr::new(own, APPLICATION);
            let application = small(&pod, to).await;
            let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
            let mut tasks = JoinSet::new();
            tasks.spawn(echo(application));
            for _ in 0..CLIENTS {
                let stock = stock.clone();
                tasks.spawn(async move {
                    let from = Some(SocketAddr::new(client, 0));
                    let mut client = connect_local(&stock, from, to, PATIENCE).await.unwrap();
                    client.write_all(b"x").await.unwrap();
                    let answer = tokio::time::timeout(PATIENCE, client.read_u8()).await;
                    assert_eq!(answer.expect("an answer").unwrap(), b'x');
                });
            }
            for _ in 0..CLIENTS {
                tasks.join_next().await.unwrap().unwrap();
            }
        }
        assert!(of_application(&mut wire).is_empty());
    }
}

/// The proxy's own listeners, with cookies always and with a queue that others have filled.
#[tokio::test]
async fn the_proxy_serves_connections_made_from_cookies() {
    for cookies in [2, 1] {
        let (outside, pod) = pair().await;
        set(&pod, COOKIES, cookies).await;
        set(&pod, "net/core/somaxconn", BACKLOG).await;
        apply(&pod, Stage::In).await;
        let proxy = Proxy::in_pod(&pod).await;
        for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
            let to = SocketAddr::new(own, APPLICATION);
            let captured = proxy.tcp(15006, own);
            talk(&mut dial(&outside.netns, to).await, &mut accept(&captured).await.0).await;
            for port in 0..4 * BACKLOG as u16 {
                let silent = SocketAddr::new(stranger(theirs), 30_000 + port);
                let first = raw::whole(silent.ip(), own, &raw::tcp(silent, to, SYN, &[], b""));
                raw::send(&outside.netns, own, vec![first]).await;
            }
            let before = cookies_sent(&pod).await;
            let mut client = dial(&outside.netns, to).await;
            let mut taken = accept(&captured).await.0;
            assert_eq!(original_dst(&taken).unwrap(), to);
            talk(&mut client, &mut taken).await;
            assert!(cookies_sent(&pod).await > before, "no cookie was sent");
            let to = SocketAddr::new(theirs, APPLICATION);
            let mut client = dial(&pod.netns, to).await;
            let mut taken = accept(&proxy.tcp(15001, theirs)).await.0;
            assert_eq!(original_dst(&taken).unwrap(), to);
            talk(&mut client, &mut taken).await;
        }
    }
}

/// Answers every connection with its first byte.
async fn echo(listener: TcpListener) {
    let mut served = JoinSet::new();
    while let Ok((mut taken, _)) = listener.accept().await {
        served.spawn(async move {
            let byte = taken.read_u8().await.unwrap();
            taken.write_all(&[byte]).await.unwrap();
        });
    }
}

/// A byte each way on the proxy's connection to the application, from a client's address.
async fn proxied(pod: &Host, client: IpAddr, to: SocketAddr, application: &TcpListener) {
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    let mut proxied = connect_local(&stock, Some(SocketAddr::new(client, 0)), to, SOON).await.unwrap();
    let (mut taken, seen) = accept(application).await;
    assert_eq!(seen.ip(), client);
    talk(&mut proxied, &mut taken).await;
}

/// An application's listener with a short queue.
async fn small(pod: &Host, at: SocketAddr) -> TcpListener {
    let made = pod.netns.run(move || {
        let domain = if at.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.bind(&at.into())?;
        socket.listen(BACKLOG)?;
        Ok::<_, std::io::Error>(socket)
    });
    TcpListener::from_std(made.await.unwrap().unwrap().into()).unwrap()
}

/// An address that no interface anywhere has.
fn stranger(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { "172.20.3.4".parse().unwrap() } else { "fd99::34".parse().unwrap() }
}

/// What left the pod from the application's port.
fn of_application(wire: &mut Wire) -> Vec<raw::Seen> {
    wire.seen().into_iter().filter(|seen| seen.is_tcp() && seen.from.port() == APPLICATION).collect()
}

/// `SyncookiesSent` of the namespace.
async fn cookies_sent(pod: &Host) -> u64 {
    let read = || std::fs::read_to_string("/proc/thread-self/net/netstat");
    let text = pod.netns.run(read).await.unwrap().unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split_whitespace().position(|name| name == "SyncookiesSent").unwrap();
    values.split_whitespace().nth(at).unwrap().parse().unwrap()
}

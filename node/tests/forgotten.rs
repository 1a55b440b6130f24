//! Connections whose tracking entry was lost, or that had none, in real namespaces. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::io::Read;
use std::net::SocketAddr;
use std::time::Duration;

use ambit_net::conntrack::Conntrack;
use ambit_net::{Netns, PROXY_MARK, SocketStock, connect, connect_local};
use ambit_node::listeners::bind;
use ambit_node::redirect::{self, Options, Stage, plan};
use common::traffic::{Proxy, SOON, accept, apply, dial, listen, set, talk};
use common::{Host, pair};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// The setting after which time of silence, in seconds, an entry is removed, and how long a test waits for that.
const ESTABLISHED: &str = "net/netfilter/nf_conntrack_tcp_timeout_established";
const FORGOTTEN: Duration = Duration::from_secs(2);

/// As when tracking entries are flushed, or run out while nobody speaks. An answer that misses the proxy leaves the pod
/// in the clear.
#[tokio::test]
async fn answers_reach_the_proxy_without_a_tracking_entry() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set(&pod, ESTABLISHED, 1).await;
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, 9080);
        let app = listen(&pod.netns, to).await;
        let mut proxied = connect_local(&stock, Some(SocketAddr::new(client, 0)), to, SOON).await.unwrap();
        let mut taken = accept(&app).await.0;
        talk(&mut proxied, &mut taken).await;
        tokio::time::sleep(FORGOTTEN).await;
        talk(&mut taken, &mut proxied).await;
    }
}

/// The same on the client's side: what an application sends on would go to the server itself.
#[tokio::test]
async fn a_lost_outbound_connection_is_captured_again() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set(&pod, ESTABLISHED, 1).await;
    let proxy = Proxy::in_pod(&pod).await;
    for (ip, port, taken_at) in
        outside.addresses().into_iter().flat_map(|ip| [(ip, 9080, 15001), (ip, 53, 15053)])
    {
        let listener = proxy.tcp(taken_at, ip);
        let mut app = dial(&pod.netns, SocketAddr::new(ip, port)).await;
        let mut taken = accept(&listener).await.0;
        talk(&mut app, &mut taken).await;
        tokio::time::sleep(FORGOTTEN).await;
        talk(&mut app, &mut taken).await;
    }
}

/// The link's end in the pod stands for the interface of a virtual machine in it.
#[tokio::test]
async fn a_lost_connection_of_a_virtual_interface_is_captured_again() {
    let (outside, pod) = pair().await;
    let options = Options { virtual_interfaces: vec!["eth0".into()], ..Options::default() };
    redirect::apply(&pod.netns, &plan(&options, Stage::In)).await.unwrap();
    set(&pod, ESTABLISHED, 1).await;
    let proxy = Proxy { listeners: bind(&pod.netns, &options).await.unwrap() };
    for own in pod.addresses() {
        let mut machine = dial(&outside.netns, SocketAddr::new(own, 9080)).await;
        let mut taken = accept(&proxy.tcp(15001, own)).await.0;
        talk(&mut machine, &mut taken).await;
        tokio::time::sleep(FORGOTTEN).await;
        talk(&mut machine, &mut taken).await;
    }
}

/// Inbound, too: the proxy's end takes the connection up again.
#[tokio::test]
async fn a_lost_inbound_connection_is_captured_again() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set(&pod, ESTABLISHED, 1).await;
    let proxy = Proxy::in_pod(&pod).await;
    for own in pod.addresses() {
        let mut client = dial(&outside.netns, SocketAddr::new(own, 9080)).await;
        let mut taken = accept(&proxy.tcp(15006, own)).await.0;
        talk(&mut client, &mut taken).await;
        tokio::time::sleep(FORGOTTEN).await;
        talk(&mut client, &mut taken).await;
    }
}

/// Tracking makes nothing of a FIN without a connection, and nothing is translated then.
#[tokio::test]
async fn the_end_of_a_lost_connection_does_not_leave_the_pod() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set(&pod, ESTABLISHED, 1).await;
    let proxy = Proxy::in_pod(&pod).await;
    let listener = proxy.tcp(15001, outside.v4.into());
    let mut app = dial(&pod.netns, SocketAddr::new(outside.v4.into(), 9080)).await;
    let mut taken = accept(&listener).await.0;
    talk(&mut app, &mut taken).await;
    let mut wire = segments(&outside.netns).await;
    tokio::time::sleep(FORGOTTEN).await;
    app.shutdown().await.unwrap();
    // What comes after on the same wire.
    let server = listen(&outside.netns, SocketAddr::new(outside.v4.into(), 9081)).await;
    let marked = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    let after = connect(&marked, server.local_addr().unwrap(), SOON).await.unwrap();
    let (seen, port) = tokio::task::spawn_blocking(move || {
        let mut segment = [0; 2048];
        let len = wire.read(&mut segment).expect("a segment within 5 s");
        (segment[..len].to_vec(), after.local_addr().unwrap().port())
    })
    .await
    .unwrap();
    assert_eq!(source_port(&seen), port, "the first segment on the wire is that of the connection after");
}

/// Every TCP segment over IPv4 that reaches the namespace, with its IP header.
async fn segments(inside: &Netns) -> Socket {
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP));
    let socket = inside.run(open).await.unwrap().unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

fn source_port(packet: &[u8]) -> u16 {
    let header = usize::from(packet[0] & 0x0f) * 4;
    u16::from_be_bytes([packet[header], packet[header + 1]])
}

/// Older connections are not taken for forgotten ones, whichever side began them and whatever their sockets are.
#[tokio::test]
async fn older_connections_are_entered_into_tracking() {
    let (outside, pod) = pair().await;
    let mut kept = Vec::new();
    let v4 = |host: &Host, port| SocketAddr::new(host.v4.into(), port);
    // A socket of both families has IPv4 peers as IPv6 addresses.
    let both = pod.netns.run(|| std::net::TcpListener::bind("[::]:9000")).await.unwrap().unwrap();
    both.set_nonblocking(true).unwrap();
    let both = TcpListener::from_std(both).unwrap();
    let mut client = dial(&outside.netns, v4(&pod, 9000)).await;
    kept.push((accept(&both).await.0, client));
    let server = listen(&outside.netns, v4(&outside, 9001)).await;
    client = dial(&pod.netns, v4(&outside, 9001)).await;
    kept.push((client, accept(&server).await.0));
    apply(&pod, Stage::In).await;
    let mut conntrack = Conntrack::open(&pod.netns).await.unwrap();
    for (own, _) in &kept {
        let plain = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
        let (local, remote) = (plain(own.local_addr().unwrap()), plain(own.peer_addr().unwrap()));
        assert!(!conntrack.enter_tcp(local, remote).await.unwrap(), "{local} to {remote} was not known");
    }
    for (own, other) in &mut kept {
        talk(own, other).await;
        talk(other, own).await;
    }
    // The end of one is no stranger either.
    for (mut own, mut other) in kept {
        own.shutdown().await.unwrap();
        let end = other.read_u8();
        let end = tokio::time::timeout(SOON, end).await.expect("an end within 5 s");
        assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    }
}

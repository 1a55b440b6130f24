//! UDP and other protocols that no tunnel carries, in real namespaces. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ambit_net::listen::{Options as SocketOptions, bind_udp};
use ambit_net::{Netns, PROXY_MARK};
use ambit_node::redirect::{self, Options, OtherProtocols, Stage, plan};
use common::raw::{self, Wire};
use common::traffic::{Proxy, SOON, accept, apply, dial, talk};
use common::{Host, eventually, pair};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;

const SCTP: u8 = 132;
/// RFC 2136 §2.2: the header of an answer to an update, without sections.
const BARE_HEADER: [u8; 12] = [0x12, 0x34, 0xa8, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[tokio::test]
async fn a_server_answers_clients_that_ask_from_port_53() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let _proxy = Proxy::in_pod(&pod).await;
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let server = udp(&pod.netns, SocketAddr::new(own, 53), None).await;
        for port in [53, 5353] {
            let client = udp(&outside.netns, SocketAddr::new(theirs, port), None).await;
            client.send_to(b"question", SocketAddr::new(own, 53)).await.unwrap();
            let from = receives(&server, b"question").await;
            assert_eq!(from, SocketAddr::new(theirs, port));
            server.send_to(b"answer", from).await.unwrap();
            assert_eq!(receives(&client, b"answer").await, SocketAddr::new(own, 53));
        }
    }
}

#[tokio::test]
async fn packets_of_a_server_from_port_53_are_not_changed() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let forwarder = udp(&pod.netns, SocketAddr::new(own, 53), None).await;
        let peer = udp(&outside.netns, SocketAddr::new(theirs, 5300), None).await;
        forwarder.send_to(b"notify", SocketAddr::new(theirs, 5300)).await.unwrap();
        let from = receives(&peer, b"notify").await;
        assert_eq!(from, SocketAddr::new(own, 53));
        peer.send_to(b"done", from).await.unwrap();
        receives(&forwarder, b"done").await;
    }
}

/// Whatever a resolver answers comes back to the one who asked, and nothing else does.
#[tokio::test]
async fn a_bare_header_of_a_foreign_resolver_arrives() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let at = SocketAddr::new(theirs, 53);
        let resolver = udp(&outside.netns, at, None).await;
        let server = proxy.udp(15053, theirs);
        // From any port, and from the one that resolvers use among themselves.
        for port in [0, 53] {
            let client = udp(&pod.netns, SocketAddr::new(own, port), None).await;
            let upstream = udp(&pod.netns, SocketAddr::new(own, 0), Some(PROXY_MARK)).await;
            client.send_to(b"update", at).await.unwrap();
            let asker = receives(&server, b"update").await;
            let mut buffer = [0; 8];
            let silence = tokio::time::timeout(Duration::from_millis(200), client.recv(&mut buffer)).await;
            assert!(silence.is_err(), "nobody has answered yet");
            upstream.send_to(b"update", at).await.unwrap();
            let proxy_at = receives(&resolver, b"update").await;
            resolver.send_to(&BARE_HEADER, proxy_at).await.unwrap();
            receives(&upstream, &BARE_HEADER).await;
            server.send_to(&BARE_HEADER, asker).await.unwrap();
            assert_eq!(receives(&client, &BARE_HEADER).await, at);
        }
    }
}

async fn denied() -> (Host, Host) {
    let (outside, pod) = pair().await;
    let options = Options { other_protocols: OtherProtocols::Deny, ..Options::default() };
    redirect::apply(&pod.netns, &plan(&options, Stage::In)).await.unwrap();
    (outside, pod)
}

#[tokio::test]
async fn denied_protocols_pass_in_neither_direction() {
    let (outside, pod) = denied().await;
    let _proxy = Proxy::in_pod(&pod).await;
    let mut wire = Wire::open(&outside.netns).await;
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let (there, here) = (SocketAddr::new(theirs, 5000), SocketAddr::new(own, 5000));
        let outer = udp(&outside.netns, there, None).await;
        let inner = udp(&pod.netns, here, None).await;
        let mut inner_sctp = raw_socket(&pod.netns, own).await;
        inner.send_to(b"out", there).await.ok();
        outer.send_to(b"in", here).await.unwrap();
        for protocol in [SCTP, 47] {
            raw::send(&pod.netns, theirs, vec![raw::of_protocol(own, theirs, protocol, &[7; 32])]).await;
            raw::send(&outside.netns, own, vec![raw::of_protocol(theirs, own, protocol, &[7; 32])]).await;
        }
        // What comes after by the same way.
        talk_by_tcp(&outside, own, &_proxy).await;
        assert!(inner.try_recv(&mut [0; 8]).is_err());
        assert!(outer.try_recv(&mut [0; 8]).is_err());
        assert!(inner_sctp.read(&mut [0; 64]).is_err());
    }
    let ips = pod.addresses();
    let from_pod: Vec<_> = wire.seen().into_iter().filter(|seen| ips.contains(&seen.from.ip())).collect();
    assert!(from_pod.iter().all(|seen| seen.is_tcp() || [1, 58].contains(&seen.protocol)), "{from_pod:?}");
}

#[tokio::test]
async fn dns_and_loopback_pass_if_other_protocols_are_denied() {
    let (outside, pod) = denied().await;
    let proxy = Proxy::in_pod(&pod).await;
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let at = SocketAddr::new(theirs, 53);
        let resolver = udp(&outside.netns, at, None).await;
        let server = proxy.udp(15053, theirs);
        let client = udp(&pod.netns, SocketAddr::new(own, 0), None).await;
        let upstream = udp(&pod.netns, SocketAddr::new(own, 0), Some(PROXY_MARK)).await;
        client.send_to(b"question", at).await.unwrap();
        let asker = receives(&server, b"question").await;
        upstream.send_to(b"question", at).await.unwrap();
        let proxy_at = receives(&resolver, b"question").await;
        resolver.send_to(b"answer", proxy_at).await.unwrap();
        receives(&upstream, b"answer").await;
        server.send_to(b"answer", asker).await.unwrap();
        assert_eq!(receives(&client, b"answer").await, at);

        let neighbour = udp(&pod.netns, SocketAddr::new(own, 7000), None).await;
        client.send_to(b"within", SocketAddr::new(own, 7000)).await.unwrap();
        receives(&neighbour, b"within").await;
        talk_by_tcp(&outside, own, &proxy).await;
    }
}

/// TCP still comes in, which over IPv6 needs ICMP to find its neighbour.
async fn talk_by_tcp(outside: &Host, own: IpAddr, proxy: &Proxy) {
    let mut client = dial(&outside.netns, SocketAddr::new(own, 9080)).await;
    let mut taken = accept(&proxy.tcp(15006, own)).await.0;
    talk(&mut client, &mut taken).await;
}

async fn udp(inside: &Netns, at: SocketAddr, mark: Option<u32>) -> UdpSocket {
    let options = SocketOptions { mark, ..SocketOptions::default() };
    let mut bound = None;
    // Whoever had the port before may not have closed it yet.
    eventually("a free port", async || {
        bound = bind_udp(inside, at, options).await.ok();
        bound.is_some()
    })
    .await;
    UdpSocket::from_std(bound.unwrap()).unwrap()
}

/// The next datagram is `expected`; returns who sent it.
async fn receives(socket: &UdpSocket, expected: &[u8]) -> SocketAddr {
    let mut buffer = [0; 64];
    let received = tokio::time::timeout(SOON, socket.recv_from(&mut buffer)).await;
    let (len, from) = received.expect("a datagram within 5 s").unwrap();
    assert_eq!(&buffer[..len], expected);
    from
}

async fn raw_socket(inside: &Netns, like: IpAddr) -> Socket {
    let domain = if like.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let protocol = Protocol::from(i32::from(SCTP));
    let open = move || Socket::new(domain, Type::RAW.nonblocking(), Some(protocol));
    inside.run(open).await.unwrap().unwrap()
}

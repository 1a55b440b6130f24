//! Packets that no TCP stack sends at that point, from clients and applications that may use raw sockets. Needs root.
//!
//! None of them may let a connection reach an application past the proxy, or leave the pod past it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ambit_net::{Family, Netns, SocketStock, original_dst};
use ambit_node::nft;
use ambit_node::redirect::{self, FormerSettings, Options, Stage, plan};
use common::raw::{self, ACK, AO, FIN, MD5, PSH, RST, SYN, URG, Wire};
use common::traffic::{Proxy, accept, apply, listen, talk};
use common::{Host, pair};
use tokio::net::{TcpListener, TcpStream};

const APPLICATION: u16 = 9080;
/// How long a connection that must not come about is waited for: its first packet is sent twice by then.
const NEVER: Duration = Duration::from_millis(1500);

/// Every packet that begins no connection, by name.
fn crafted(from: SocketAddr, to: SocketAddr) -> Vec<(String, Vec<Vec<u8>>)> {
    let flags = [
        ("ack", ACK),
        ("data", PSH | ACK),
        ("urgent", URG | ACK),
        ("fin", FIN),
        ("fin-ack", FIN | ACK),
        ("rst", RST),
        ("rst-ack", RST | ACK),
        ("syn-ack", SYN | ACK),
        ("syn-fin", SYN | FIN),
        ("no flag", 0),
        ("all flags", 0x3f),
    ];
    let options: [(&str, &[u8]); 3] = [("", &[]), (" with MD5", MD5), (" with AO", AO)];
    let mut packets = Vec::new();
    for (flag, bits) in flags {
        for (option, bytes) in options {
            let segment = raw::tcp(from, to, bits, bytes, b"injected");
            packets.push((format!("{flag}{option}"), vec![raw::whole(from.ip(), to.ip(), &segment)]));
        }
    }
    let silent = raw::tcp(from, to, ACK, MD5, b"injected");
    packets.push(("fragments".into(), raw::fragments(from.ip(), to.ip(), &silent)));
    packets.push(("IP options".into(), vec![raw::with_ip_options(from.ip(), to.ip(), &silent)]));
    packets.push(("ICMP error".into(), vec![raw::icmp_error(from, to)]));
    packets
}

/// The names and number of [`crafted`].
fn kinds() -> usize {
    let any = SocketAddr::from(([127, 0, 0, 1], 1));
    crafted(any, any).len()
}

/// Dials from a given port. `None` when there is no answer.
async fn dial_from(from: &Netns, source: SocketAddr, to: SocketAddr) -> Option<TcpStream> {
    let socket = SocketStock::new(from.clone(), None).take(Family::of(to.ip())).await.unwrap();
    socket.set_reuse_address(true).unwrap();
    let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
    socket.bind(source).unwrap();
    tokio::time::timeout(NEVER, socket.connect(to)).await.ok()?.ok()
}

/// Dials from `source`. Says where the connection arrived that `listener` of the proxy should have.
async fn arrives(
    from: &Netns,
    source: SocketAddr,
    to: SocketAddr,
    proxy: &TcpListener,
    past: &TcpListener,
) -> Result<(), &'static str> {
    let Some(mut client) = dial_from(from, source, to).await else { return Err("nowhere") };
    let mut taken = tokio::select! {
        taken = accept(proxy) => taken.0,
        _ = past.accept() => return Err("past the proxy"),
    };
    assert_eq!(original_dst(&taken).unwrap(), to);
    talk(&mut client, &mut taken).await;
    Ok(())
}

/// The rule sets that capture: the final one, and that of an enrolment that is not complete yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rules {
    Final,
    Opening,
}

impl Rules {
    async fn apply(self, pod: &Host) {
        apply(pod, Stage::In).await;
        if self == Self::Opening {
            nft::apply(&pod.netns, plan(&Options::default(), Stage::In).opening.unwrap()).await.unwrap();
        }
    }
}

/// A crafted packet from each of the ports, then a connection from the same port.
async fn inbound(rules: Rules, ports: impl Iterator<Item = u16> + Clone) -> Vec<String> {
    let (outside, pod) = pair().await;
    rules.apply(&pod).await;
    let proxy = Proxy::in_pod(&pod).await;
    let mut wrong = Vec::new();
    let mut ports = ports.cycle();
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, APPLICATION);
        let (application, captured) = (listen(&pod.netns, to).await, proxy.tcp(15006, own));
        for kind in 0..kinds() {
            let source = SocketAddr::new(client, ports.next().unwrap());
            let (name, packets) = crafted(source, to).swap_remove(kind);
            raw::send(&outside.netns, own, packets).await;
            if let Err(place) = arrives(&outside.netns, source, to, &captured, &application).await {
                wrong.push(format!("{name} from {source}: {place}"));
            }
        }
    }
    wrong
}

#[tokio::test]
async fn no_crafted_packet_opens_a_way_to_the_application() {
    for rules in [Rules::Final, Rules::Opening] {
        assert_eq!(inbound(rules, 20_000..30_000).await, [""; 0], "{rules:?}");
    }
}

#[tokio::test]
async fn no_source_port_of_the_mesh_opens_a_way_to_the_application() {
    for rules in [Rules::Final, Rules::Opening] {
        assert_eq!(inbound(rules, 15_001..15_091).await, [""; 0], "{rules:?}");
    }
}

#[tokio::test]
async fn first_packets_from_any_source_port_are_captured() {
    for rules in [Rules::Final, Rules::Opening] {
        let (outside, pod) = pair().await;
        rules.apply(&pod).await;
        let proxy = Proxy::in_pod(&pod).await;
        let mut wrong = Vec::new();
        for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
            let to = SocketAddr::new(own, APPLICATION);
            let (application, captured) = (listen(&pod.netns, to).await, proxy.tcp(15006, own));
            for port in (15_001..15_091).chain([53, 80, 443, 65_535]) {
                let source = SocketAddr::new(client, port);
                if let Err(place) = arrives(&outside.netns, source, to, &captured, &application).await {
                    wrong.push(format!("{source}: {place}"));
                }
            }
        }
        assert_eq!(wrong, [""; 0], "{rules:?}");
    }
}

/// As seen by whoever listens in the pod: what the kernel hands to its sockets.
#[tokio::test]
async fn no_crafted_packet_is_delivered_to_the_application() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let mut wire = Wire::open(&outside.netns).await;
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, APPLICATION);
        let _application = listen(&pod.netns, to).await;
        let mut delivered = raw::Delivered::open(&pod.netns, own).await;
        for (port, kind) in (20_000..).zip(0..kinds()) {
            for from in [client, stranger(client)] {
                let source = SocketAddr::new(from, port);
                let (_, packets) = crafted(source, to).swap_remove(kind);
                raw::send(&outside.netns, own, packets).await;
            }
        }
        assert_eq!(delivered.count(APPLICATION), 0, "segments for {to}");
    }
    let answered: Vec<_> = wire.seen().into_iter().filter(|seen| seen.from.port() == APPLICATION).collect();
    assert!(answered.iter().all(|seen| seen.flags & RST != 0 && seen.payload == 0), "{answered:?}");
}

/// An address that no interface anywhere has.
fn stranger(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { "172.20.3.4".parse().unwrap() } else { "fd99::34".parse().unwrap() }
}

/// A packet from the wire cannot pass for one from within the pod.
#[tokio::test]
async fn loopback_sources_from_the_wire_reach_nobody() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let mut wire = Wire::open(&outside.netns).await;
    for (own, loopback) in pod
        .addresses()
        .into_iter()
        .zip([IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)])
    {
        let to = SocketAddr::new(own, APPLICATION);
        let application = listen(&pod.netns, to).await;
        let mut delivered = raw::Delivered::open(&pod.netns, own).await;
        for (port, kind) in (20_000..).zip(0..kinds()) {
            let source = SocketAddr::new(loopback, port);
            let (_, packets) = crafted(source, to).swap_remove(kind);
            raw::send(&outside.netns, own, packets).await;
            let first = raw::tcp(source, to, SYN, &[], b"");
            raw::send(&outside.netns, own, vec![raw::whole(loopback, own, &first)]).await;
        }
        assert_eq!(delivered.count(APPLICATION), 0);
        assert!(tokio::time::timeout(Duration::ZERO, application.accept()).await.is_err());
    }
    assert!(wire.seen().iter().all(|seen| seen.from.port() != APPLICATION));
}

/// The same towards the other side: an application that crafts packets, and a server that does to let it out.
#[tokio::test]
async fn no_crafted_packet_opens_a_way_out_of_the_pod() {
    for rules in [Rules::Final, Rules::Opening] {
        let (outside, pod) = pair().await;
        rules.apply(&pod).await;
        let proxy = Proxy::in_pod(&pod).await;
        let mut wrong = Vec::new();
        for (server, own) in outside.addresses().into_iter().zip(pod.addresses()) {
            let to = SocketAddr::new(server, APPLICATION);
            let (past, captured) = (listen(&outside.netns, to).await, proxy.tcp(15001, server));
            for (port, kind) in (20_000..).zip(0..kinds()) {
                let source = SocketAddr::new(own, port);
                let (name, packets) = crafted(source, to).swap_remove(kind);
                raw::send(&pod.netns, server, packets).await;
                match arrives(&pod.netns, source, to, &captured, &past).await {
                    // It may stand for an older connection, in whose place no new one begins.
                    Ok(()) | Err("nowhere") if rules == Rules::Opening => {}
                    Ok(()) => {}
                    Err(place) => wrong.push(format!("{name} of the application: {place}")),
                }
                let source = SocketAddr::new(own, port + 1000);
                let (name, packets) = crafted(to, source).swap_remove(kind);
                raw::send(&outside.netns, own, packets).await;
                if let Err(place) = arrives(&pod.netns, source, to, &captured, &past).await {
                    wrong.push(format!("{name} of the server: {place}"));
                }
            }
        }
        assert_eq!(wrong, [""; 0], "{rules:?}");
    }
}

/// Without inbound capture a server's packets are not translated; they still let nobody out.
#[tokio::test]
async fn no_server_lets_an_application_out_without_inbound_capture() {
    let (outside, pod) = pair().await;
    let options = Options { inbound_capture: false, ..Options::default() };
    redirect::apply(&pod.netns, &plan(&options, Stage::In)).await.unwrap();
    let proxy = Proxy::in_pod(&pod).await;
    for (server, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(server, APPLICATION);
        let (past, captured) = (listen(&outside.netns, to).await, proxy.tcp(15001, server));
        for (port, kind) in (20_000..).zip(0..kinds()) {
            let source = SocketAddr::new(own, port);
            let (name, packets) = crafted(to, source).swap_remove(kind);
            raw::send(&outside.netns, own, packets).await;
            assert_eq!(arrives(&pod.netns, source, to, &captured, &past).await, Ok(()), "{name}");
        }
    }
}

#[tokio::test]
async fn an_application_with_a_loopback_source_is_captured() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    // Linux itself refuses to route an IPv4 loopback source to another host, and not an IPv6 one.
    let expected = [("127.0.0.1:0", Err("nowhere")), ("[::1]:0", Ok(()))];
    for (server, (source, expected)) in outside.addresses().into_iter().zip(expected) {
        let to = SocketAddr::new(server, APPLICATION);
        let (past, captured) = (listen(&outside.netns, to).await, proxy.tcp(15001, server));
        let outcome = arrives(&pod.netns, source.parse().unwrap(), to, &captured, &past).await;
        assert_eq!(outcome, expected, "from {source}");
    }
}

/// What is left of a connection that is older than the enrolment, when both ends have vanished without a word.
#[tokio::test]
async fn an_ended_older_connection_leaves_no_way_past_the_proxy() {
    let (outside, pod) = pair().await;
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let (inbound, outbound) = (SocketAddr::new(own, APPLICATION), SocketAddr::new(theirs, APPLICATION));
        let application = listen(&pod.netns, inbound).await;
        let server = listen(&outside.netns, outbound).await;
        let client = SocketAddr::new(theirs, 40_000);
        let dialler = SocketAddr::new(own, 40_001);
        let older = [
            dial_from(&outside.netns, client, inbound).await.unwrap(),
            accept(&application).await.0,
            dial_from(&pod.netns, dialler, outbound).await.unwrap(),
            accept(&server).await.0,
        ];
        apply(&pod, Stage::In).await;
        let _proxy = Proxy::in_pod(&pod).await;
        older.iter().for_each(vanish);
        drop(older);
        assert!(dial_from(&outside.netns, client, inbound).await.is_none());
        assert!(dial_from(&pod.netns, dialler, outbound).await.is_none());
        for listener in [application, server] {
            assert!(tokio::time::timeout(Duration::ZERO, listener.accept()).await.is_err());
        }
        redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    }
}

/// Makes the close of a connection silent (tcp(7), `TCP_REPAIR`).
fn vanish(connection: &TcpStream) {
    nix::sys::socket::setsockopt(connection, nix::sys::socket::sockopt::TcpRepair, &1).unwrap();
}

//! SOCKS5, IPv6 from end to end, and tunnels within a node.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ambit_tests::add_trials;
use ambit_tests::apps::exchange;
use ambit_tests::beds::Trials;
use ambit_tests::wait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Extensions, PORT, attempt, ip_of};

/// Asks the client's SOCKS5 listener for a connection (RFC 1928 §4); gives the stream and the reply.
async fn socks(bed: &Extensions, address: &[u8], port: u16) -> (TcpStream, u8) {
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, 15080));
    let mut stream = bed.client.connect_within(at, wait::SOON).await.unwrap();
    let asking = async {
        stream.write_all(b"\x05\x01\x00").await.unwrap();
        let mut method = [0; 2];
        stream.read_exact(&mut method).await.unwrap();
        assert_eq!(method, [5, 0], "no authentication is needed");
        let request = [b"\x05\x01\x00".as_slice(), address, &port.to_be_bytes()].concat();
        stream.write_all(&request).await.unwrap();
        let mut reply = [0; 4];
        stream.read_exact(&mut reply).await.unwrap();
        let bound = if reply[3] == 4 { 18 } else { 6 };
        stream.read_exact(&mut vec![0; bound]).await.unwrap();
        reply[1]
    };
    let reply = tokio::time::timeout(wait::SOON, asking).await.expect("a reply in time");
    (stream, reply)
}

fn named(name: &str) -> Vec<u8> {
    [&[3, u8::try_from(name.len()).unwrap()], name.as_bytes()].concat()
}

fn addressed(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => [&[1], ip.octets().as_slice()].concat(),
        IpAddr::V6(ip) => [&[4], ip.octets().as_slice()].concat(),
    }
}

/// By name short and long, by virtual and pod address of both families; the server sees the pod, not its loopback.
async fn socks5_reaches_names_and_addresses_through_the_mesh(bed: &Extensions) {
    let by_name = ["far", "far.shop", "far.shop.svc.cluster.local"].map(|name| (named(name), 80));
    let by_vip = [false, true].map(|ipv6| (addressed(bed.vip("far", ipv6).ip()), 80));
    let by_pod = [false, true].map(|ipv6| (addressed(ip_of(&bed.far, ipv6)), PORT));
    for (address, port) in by_name.into_iter().chain(by_vip).chain(by_pod) {
        let (mut stream, reply) = socks(bed, &address, port).await;
        assert_eq!(reply, 0, "{address:?}");
        let seen = exchange(&mut stream, b"").await.unwrap();
        let seen: SocketAddr = String::from_utf8(seen).unwrap().parse().unwrap();
        assert!(bed.client.ips().contains(&seen.ip()), "{address:?}: the server sees {seen}");
    }
    let line = bed.logs[1].wait_for("the far side", |l| {
        l["direction"] == "inbound" && l["src.identity"] == bed.client.spiffe_id().as_str()
    });
    let _authenticated = line.await;
}

async fn socks5_says_why_a_connection_can_not_be_had(bed: &Extensions) {
    let (_, unknown) = socks(bed, &named("nobody.shop.svc.cluster.local"), 80).await;
    assert_eq!(unknown, 4, "host unreachable");
    let (_, no_such_port) = socks(bed, &addressed(bed.vip("far", false).ip()), 8999).await;
    assert_eq!(no_such_port, 4, "host unreachable");
    let (_, closed) = socks(bed, &addressed(ip_of(&bed.far, false)), 9).await;
    assert_ne!(closed, 0, "nobody listens there");
    let (_, listener) = socks(bed, &addressed(ip_of(&bed.far, false)), 15008).await;
    assert_ne!(listener, 0, "a listener of the proxy itself");
}

/// Over IPv6 alone: resolved, tunnelled between the nodes' IPv6 addresses, with the client's address kept, and policy
/// by IPv6 block.
async fn ipv6_is_carried_from_end_to_end(bed: &Extensions) {
    let found = bed.client.resolve("far.shop").await.unwrap();
    let vip = found.into_iter().find(IpAddr::is_ipv6).expect("an IPv6 address of the service");
    let capture = bed.cluster.capture().await.unwrap();
    let seen = bed.answer(&bed.client, SocketAddr::new(vip, 80), b"").await;
    let mut stream = bed.client.connect_within((vip, 81).into(), wait::SOON).await.unwrap();
    assert_eq!(exchange(&mut stream, b"six from end to end").await.unwrap(), b"six from end to end");
    let captured = capture.stop().await.unwrap();
    let seen: SocketAddr = String::from_utf8(seen).unwrap().parse().unwrap();
    assert_eq!(seen.ip(), ip_of(&bed.client, true));
    assert!(captured.find(b"six from end to end").is_empty(), "readable on the wire");
    let tunnel = format!("[{}]:15008", ip_of(&bed.far, true));
    let line = bed.logs[0].wait_for("the tunnel", |l| l["dst.addr"] == tunnel.as_str()).await;
    assert_eq!(line["dst.identity"], bed.far.spiffe_id().as_str(), "{line}");
    let policy = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: shop, name: not-by-six}}\n\
         spec:\n  selector: {{matchLabels: {{app: far}}}}\n  action: DENY\n  \
         rules: [{{from: [{{source: {{ipBlocks: ['{}/128']}}}}]}}]\n",
        ip_of(&bed.client, true)
    );
    bed.cluster.apply(&policy).await.unwrap();
    let refused = |ipv6| async move {
        let answer = attempt(&bed.client, bed.vip("far", ipv6), b"").await;
        !answer.is_ok_and(|answer| !answer.is_empty())
    };
    wait::until("the policy holds for IPv6", wait::SOON, || refused(true)).await;
    assert!(!refused(false).await, "a policy of an IPv6 address holds for IPv4");
    bed.cluster.delete("AuthorizationPolicy", "shop", "not-by-six").await.unwrap();
    wait::until("the policy is gone", wait::SOON, || async { !refused(true).await }).await;
}

/// As between nodes: both ends authenticated by TLS, nothing handed over.
async fn connections_within_a_node_take_a_tunnel_if_configured(bed: &Extensions) {
    let ztunnel = bed.cluster.ztunnel(0).unwrap();
    let before = ztunnel.metrics().await.unwrap();
    for ipv6 in [false, true] {
        for target in [bed.vip("near", ipv6), (ip_of(&bed.near, ipv6), PORT).into()] {
            assert_eq!(bed.answer(&bed.client, target, b"next door").await, b"next door", "{target}");
        }
    }
    let after = ztunnel.metrics().await.unwrap();
    let grown = |name: &str| after.sum(name, &[]) - before.sum(name, &[]);
    assert!(grown("ambit_hbone_tunnels_total") >= 4.0, "{}", grown("ambit_hbone_tunnels_total"));
    assert!(after.sum("ambit_handed_over_total", &[]) < 0.5, "a connection was handed over");
    let source = ip_of(&bed.client, false).to_string();
    let line = bed.logs[0].wait_for("the server's side", |l| {
        l["direction"] == "inbound"
            && l["dst.workload"] == "near"
            && l["src.addr"].as_str().is_some_and(|addr| addr.starts_with(&source))
    });
    assert_eq!(line.await["src.identity"], bed.client.spiffe_id().as_str());
}

pub(crate) fn add(trials: &mut Trials<Extensions>) {
    add_trials!(
        trials, "sockets":
        socks5_reaches_names_and_addresses_through_the_mesh,
        socks5_says_why_a_connection_can_not_be_had,
        ipv6_is_carried_from_end_to_end,
        connections_within_a_node_take_a_tunnel_if_configured,
    );
}

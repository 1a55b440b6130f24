//! Redirection in real namespaces, with real connections. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::net::{IpAddr, SocketAddr};

use ambit_net::conntrack::Conntrack;
use ambit_net::listen::{Options as SocketOptions, bind_udp};
use ambit_net::{Family, Netns, PROXY_MARK, SocketStock, connect, connect_local, original_dst};
use ambit_node::listeners::bind;
use ambit_node::nft::{self, Action, Rule};
use ambit_node::redirect::{self, FormerSettings, Options, PROBE_V4, Stage, plan};
use common::pair;
use common::traffic::{Proxy, SOON, accept, apply, dial, listen, set, talk};
use tokio::net::{TcpStream, UdpSocket};

#[tokio::test]
async fn outbound_tcp_arrives_with_its_original_destination() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    for ip in outside.addresses() {
        let listener = proxy.tcp(15001, ip);
        let to = SocketAddr::new(ip, 9080);
        let mut app = dial(&pod.netns, to).await;
        let (mut taken, peer) = accept(&listener).await;
        assert_eq!(original_dst(&taken).unwrap(), to);
        assert_eq!(peer, app.local_addr().unwrap());
        assert_eq!(app.peer_addr().unwrap(), to);
        talk(&mut app, &mut taken).await;
    }
}

#[tokio::test]
async fn inbound_tcp_is_captured_and_hbone_is_not() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    for ip in pod.addresses() {
        let (plaintext, hbone) = (proxy.tcp(15006, ip), proxy.tcp(15008, ip));
        // 15001 is no way around: it is captured like any port.
        for port in [9080, 15001] {
            let to = SocketAddr::new(ip, port);
            let mut client = dial(&outside.netns, to).await;
            let (mut taken, peer) = accept(&plaintext).await;
            assert_eq!(original_dst(&taken).unwrap(), to);
            assert_eq!(peer, client.local_addr().unwrap());
            talk(&mut client, &mut taken).await;
        }
        let mut client = dial(&outside.netns, SocketAddr::new(ip, 15008)).await;
        let (mut taken, _) = accept(&hbone).await;
        talk(&mut client, &mut taken).await;
    }
}

#[tokio::test]
async fn dns_reaches_the_proxy_with_its_original_resolver() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    let mut conntrack = Conntrack::open(&pod.netns).await.unwrap();
    for ip in outside.addresses() {
        let to = SocketAddr::new(ip, 53);
        let server = proxy.udp(15053, ip);
        let any = if ip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let app = bind_udp(&pod.netns, any.parse().unwrap(), SocketOptions::default()).await.unwrap();
        let app = UdpSocket::from_std(app).unwrap();
        app.connect(to).await.unwrap();
        app.send(b"question").await.unwrap();
        let mut buffer = [0; 64];
        let (n, client) =
            tokio::time::timeout(SOON, server.recv_from(&mut buffer)).await.expect("a question").unwrap();
        assert_eq!(&buffer[..n], b"question");
        let local = server.local_addr().unwrap();
        assert_eq!(conntrack.original_udp_destination(client, local).await.unwrap(), Some(to));
        let stranger = SocketAddr::new(client.ip(), client.port() ^ 1);
        assert_eq!(conntrack.original_udp_destination(stranger, local).await.unwrap(), None);
        server.send_to(b"answer", client).await.unwrap();
        // A connected socket takes answers only from the resolver that it asked.
        let n = tokio::time::timeout(SOON, app.recv(&mut buffer)).await.expect("an answer").unwrap();
        assert_eq!(&buffer[..n], b"answer");

        let listener = proxy.tcp(15053, ip);
        let mut app = dial(&pod.netns, to).await;
        let (mut taken, _) = accept(&listener).await;
        assert_eq!(original_dst(&taken).unwrap(), to);
        talk(&mut app, &mut taken).await;
    }
}

#[tokio::test]
async fn dns_of_proxy_and_application_may_share_a_port() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    for ip in outside.addresses() {
        let to = SocketAddr::new(ip, 53);
        let resolver = bind_udp(&outside.netns, to, SocketOptions::default()).await.unwrap();
        let resolver = UdpSocket::from_std(resolver).unwrap();
        let server = proxy.udp(15053, ip);
        let own = pod.addresses().into_iter().find(|a| a.is_ipv4() == ip.is_ipv4()).unwrap();
        let at = SocketAddr::new(own, 40053);
        let shared = SocketOptions { reuse_port: true, ..SocketOptions::default() };
        let app = bind_udp(&pod.netns, at, shared).await.unwrap();
        let marked = SocketOptions { reuse_port: true, ..SocketOptions::marked(PROXY_MARK) };
        let upstream = bind_udp(&pod.netns, at, marked).await.unwrap();
        let (app, upstream) = (UdpSocket::from_std(app).unwrap(), UdpSocket::from_std(upstream).unwrap());
        let mut buffer = [0; 64];

        app.connect(to).await.unwrap();
        app.send(b"of the application").await.unwrap();
        let (_, client) =
            tokio::time::timeout(SOON, server.recv_from(&mut buffer)).await.expect("captured").unwrap();
        drop(app);
        upstream.connect(to).await.unwrap();
        upstream.send(b"of the proxy").await.unwrap();
        let (n, asker) =
            tokio::time::timeout(SOON, resolver.recv_from(&mut buffer)).await.expect("forwarded").unwrap();
        assert_eq!(&buffer[..n], b"of the proxy");
        assert_eq!(asker, client, "both use one port");
        resolver.send_to(b"answer", asker).await.unwrap();
        let n = tokio::time::timeout(SOON, upstream.recv(&mut buffer)).await.expect("answered").unwrap();
        assert_eq!(&buffer[..n], b"answer");
    }
}

#[tokio::test]
async fn marked_connections_bypass_the_rules() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    for ip in outside.addresses() {
        let to = SocketAddr::new(ip, 9080);
        let server = listen(&outside.netns, to).await;
        let mut direct = connect(&stock, to, SOON).await.unwrap();
        let (mut taken, _) = accept(&server).await;
        talk(&mut direct, &mut taken).await;
    }
}

#[tokio::test]
async fn the_application_sees_the_address_that_the_proxy_binds() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        for client in [client, stranger(client)] {
            let to = SocketAddr::new(own, 9080);
            let app = listen(&pod.netns, to).await;
            let mut proxied =
                connect_local(&stock, Some(SocketAddr::new(client, 0)), to, SOON).await.unwrap();
            let (mut taken, seen) = accept(&app).await;
            assert_eq!(seen.ip(), client);
            talk(&mut proxied, &mut taken).await;
        }
    }
}

/// The kernel picks the port of a connection from a foreign address without knowing that the client
/// itself uses it towards the same application.
#[tokio::test]
async fn a_proxied_connection_may_have_its_captured_clients_port() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, 9080);
        let source = SocketAddr::new(client, 40000);
        let app = listen(&pod.netns, to).await;
        let mut captured = dial_from(&outside.netns, None, source, to).await;
        let (mut taken, _) = accept(&proxy.tcp(15006, own)).await;
        talk(&mut captured, &mut taken).await;
        let mut proxied = dial_from(&pod.netns, Some(PROXY_MARK), source, to).await;
        let (mut served, seen) = accept(&app).await;
        assert_eq!(seen.ip(), client);
        talk(&mut proxied, &mut served).await;
        talk(&mut captured, &mut taken).await;
    }
}

/// The same with a client that was there before the rules, whose connection the application has.
#[tokio::test]
async fn a_proxied_connection_may_have_the_port_of_an_older_one() {
    let (outside, pod) = pair().await;
    for (client, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(own, 9080);
        let source = SocketAddr::new(client, 40000);
        let app = listen(&pod.netns, to).await;
        let mut older = dial_from(&outside.netns, None, source, to).await;
        let mut taken = accept(&app).await.0;
        apply(&pod, Stage::In).await;
        talk(&mut older, &mut taken).await;
        let mut proxied = dial_from(&pod.netns, Some(PROXY_MARK), source, to).await;
        let (mut served, seen) = accept(&app).await;
        assert_eq!(seen.ip(), client);
        talk(&mut proxied, &mut served).await;
        talk(&mut older, &mut taken).await;
        redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    }
}

async fn dial_from(from: &Netns, mark: Option<u32>, source: SocketAddr, to: SocketAddr) -> TcpStream {
    let stock = SocketStock::new(from.clone(), mark);
    let socket = stock.take(Family::of(to.ip())).await.unwrap();
    socket.set_reuse_address(true).unwrap();
    let socket = tokio::net::TcpSocket::from_std_stream(socket.into());
    socket.bind(source).unwrap();
    tokio::time::timeout(SOON, socket.connect(to)).await.expect("connected within 5 s").unwrap()
}

/// Without, a port that has ended is lost to its destination for a minute.
#[tokio::test]
async fn ports_of_ended_connections_are_used_again() {
    const PORTS: std::ops::Range<u16> = 40_000..40_020;
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set(&pod, "net/ipv4/ip_local_port_range", format!("{} {}", PORTS.start, PORTS.end - 1)).await;
    let proxy = Proxy::in_pod(&pod).await;
    let stock = SocketStock::new(pod.netns.clone(), None);
    for ip in outside.addresses() {
        let listener = proxy.tcp(15001, ip);
        let to = SocketAddr::new(ip, 9080);
        for _ in PORTS {
            let app = connect(&stock, to, SOON).await.unwrap();
            let taken = accept(&listener).await.0;
            drop(app);
            // Its end has come, so the application's side waits.
            assert_eq!(taken.readable().await.map(|()| taken.try_read(&mut [0]).unwrap()).unwrap(), 0);
        }
        common::eventually("a port of one that ended", async || connect(&stock, to, SOON).await.is_ok())
            .await;
    }
}

/// An address that no interface anywhere has.
fn stranger(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { "172.20.3.4".parse().unwrap() } else { "fd99::34".parse().unwrap() }
}

#[tokio::test]
async fn probes_reach_the_application_uncaptured() {
    let (outside, pod) = pair().await;
    let (link, driver) = common::netlink(&outside.netns).await;
    link.address().add(1, PROBE_V4.into(), 32).execute().await.unwrap();
    driver.abort();
    apply(&pod, Stage::In).await;
    let to = SocketAddr::new(pod.v4.into(), 8080);
    let app = listen(&pod.netns, to).await;
    let stock = SocketStock::new(outside.netns.clone(), None);
    let mut kubelet = connect_local(&stock, Some((PROBE_V4, 0).into()), to, SOON).await.unwrap();
    let (mut taken, seen) = accept(&app).await;
    assert_eq!(seen.ip(), IpAddr::from(PROBE_V4));
    talk(&mut kubelet, &mut taken).await;
}

#[tokio::test]
async fn connections_within_the_pod_are_left_alone() {
    let (_outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let within = ["127.0.0.1:7000", "[::1]:7000"].map(|a| a.parse().unwrap());
    for to in within.into_iter().chain(pod.addresses().map(|ip| SocketAddr::new(ip, 7001))) {
        let app = listen(&pod.netns, to).await;
        let mut client = dial(&pod.netns, to).await;
        let (mut taken, _) = accept(&app).await;
        talk(&mut client, &mut taken).await;
    }
}

#[tokio::test]
async fn kept_connections_survive_enrolment_and_leaving() {
    let (outside, pod) = pair().await;
    let mut kept = Vec::new();
    for (i, (there, here)) in outside.addresses().into_iter().zip(pod.addresses()).enumerate() {
        for (from, to, ip) in [(&pod, &outside, there), (&outside, &pod, here)] {
            let server = listen(&to.netns, SocketAddr::new(ip, 9000 + i as u16)).await;
            let mut client = dial(&from.netns, SocketAddr::new(ip, 9000 + i as u16)).await;
            let mut taken = accept(&server).await.0;
            talk(&mut client, &mut taken).await;
            kept.push((client, taken));
        }
    }
    apply(&pod, Stage::In).await;
    let proxy = Proxy::in_pod(&pod).await;
    for (client, taken) in &mut kept {
        talk(client, taken).await;
        talk(taken, client).await;
    }
    // One connection each way through the proxy, which must live on when the pod leaves.
    let mut captured = Vec::new();
    for (from, port, ip) in [
        (&pod, 15001, outside.addresses()[0]),
        (&pod, 15001, outside.addresses()[1]),
        (&outside, 15006, pod.addresses()[0]),
        (&outside, 15006, pod.addresses()[1]),
    ] {
        let mut client = dial(&from.netns, SocketAddr::new(ip, 9080)).await;
        let mut taken = accept(&proxy.tcp(port, ip)).await.0;
        talk(&mut client, &mut taken).await;
        captured.push((client, taken));
    }
    apply(&pod, Stage::Leaving).await;
    for (client, taken) in kept.iter_mut().chain(&mut captured) {
        talk(client, taken).await;
    }
    for ip in outside.addresses() {
        let to = SocketAddr::new(ip, 9081);
        let server = listen(&outside.netns, to).await;
        let mut client = dial(&pod.netns, to).await;
        let mut taken = accept(&server).await.0;
        talk(&mut client, &mut taken).await;
    }
    drop(captured);
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    for (client, taken) in &mut kept {
        talk(client, taken).await;
    }
}

#[tokio::test]
async fn a_connection_with_a_foreign_source_survives_leaving() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    let to = SocketAddr::new(pod.v4.into(), 9080);
    let app = listen(&pod.netns, to).await;
    let mut proxied = connect_local(&stock, Some((outside.v4, 0).into()), to, SOON).await.unwrap();
    let mut taken = accept(&app).await.0;
    talk(&mut proxied, &mut taken).await;
    apply(&pod, Stage::Leaving).await;
    talk(&mut proxied, &mut taken).await;
}

#[tokio::test]
async fn tampering_is_found_and_repaired_and_nothing_else_changes() {
    let (_outside, pod) = pair().await;
    let plan = plan(&Options::default(), Stage::In);
    assert_eq!(redirect::apply(&pod.netns, &plan).await.unwrap().len(), 7);
    assert_eq!(redirect::apply(&pod.netns, &plan).await.unwrap(), []);
    assert_eq!(redirect::verify(&pod.netns, &plan).await.unwrap(), []);

    let mut tampered = plan.table.clone();
    let chain = tampered.chains.iter_mut().find(|c| c.name == "nat_output").unwrap();
    chain.rules.insert(0, Rule::new([], Action::Accept, "let me out"));
    nft::apply(&pod.netns, tampered).await.unwrap();
    let (link, driver) = common::netlink(&pod.netns).await;
    let rules: Vec<_> =
        futures_util::TryStreamExt::try_collect(link.rule().get(rtnetlink::IpVersion::V4).execute())
            .await
            .unwrap();
    for rule in rules {
        let ours = rtnetlink::packet_route::rule::RuleAttribute::Priority(redirect::ROUTE_PRIORITY);
        if rule.attributes.contains(&ours) {
            link.rule().del(rule).execute().await.unwrap();
        }
    }
    driver.abort();
    set(&pod, "net/ipv4/tcp_fwmark_accept", 0).await;
    let found = redirect::verify(&pod.netns, &plan).await.unwrap();
    assert_eq!(found.len(), 3, "{found:?}");
    assert_eq!(redirect::apply(&pod.netns, &plan).await.unwrap(), found);
    assert_eq!(redirect::verify(&pod.netns, &plan).await.unwrap(), []);

    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    assert_eq!(redirect::verify(&pod.netns, &plan).await.unwrap().len(), 7);
}

#[tokio::test]
async fn former_settings_are_restored() {
    let (_outside, pod) = pair().await;
    set(&pod, "net/ipv4/tcp_tw_reuse", 0).await;
    let former = redirect::current_settings(&pod.netns).await.unwrap();
    apply(&pod, Stage::In).await;
    redirect::remove(&pod.netns, &former).await.unwrap();
    let read = || std::fs::read_to_string("/proc/sys/net/ipv4/tcp_tw_reuse");
    assert_eq!(pod.netns.run_blocking(read).unwrap().unwrap(), "0\n");
}

#[tokio::test]
async fn settings_that_others_changed_since_are_kept() {
    const CLOSE_WAIT: &str = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    const TIME_WAIT: &str = "net/netfilter/nf_conntrack_tcp_timeout_time_wait";
    let (_outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set(&pod, TIME_WAIT, 33).await;
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    let values = ["net/ipv4/tcp_fwmark_accept", CLOSE_WAIT, TIME_WAIT].map(|setting| {
        let path = format!("/proc/sys/{setting}");
        pod.netns.run_blocking(move || std::fs::read_to_string(path)).unwrap().unwrap()
    });
    assert_eq!(values, ["0\n", "60\n", "33\n"]);
}

#[tokio::test]
async fn tables_of_others_are_left_alone() {
    let (_outside, pod) = pair().await;
    let theirs = nft::Table { name: "theirs".into(), chains: vec![] };
    nft::apply(&pod.netns, theirs.clone()).await.unwrap();
    apply(&pod, Stage::In).await;
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    assert_eq!(nft::tables(&pod.netns).await.unwrap(), ["theirs"]);
}

#[tokio::test]
async fn captures_that_are_switched_off_are_left_out() {
    let (outside, pod) = pair().await;
    let options = Options { dns_capture: false, inbound_capture: false, ..Options::default() };
    redirect::apply(&pod.netns, &plan(&options, Stage::In)).await.unwrap();
    let to = SocketAddr::new(pod.v4.into(), 9080);
    let app = listen(&pod.netns, to).await;
    let mut client = dial(&outside.netns, to).await;
    talk(&mut client, &mut accept(&app).await.0).await;

    let resolver_at = SocketAddr::new(outside.v4.into(), 53);
    let resolver = bind_udp(&outside.netns, resolver_at, SocketOptions::default()).await.unwrap();
    let resolver = UdpSocket::from_std(resolver).unwrap();
    let app = bind_udp(&pod.netns, "0.0.0.0:0".parse().unwrap(), SocketOptions::default()).await.unwrap();
    let app = UdpSocket::from_std(app).unwrap();
    app.send_to(b"?", resolver_at).await.unwrap();
    let mut buffer = [0; 8];
    let asked = tokio::time::timeout(SOON, resolver.recv_from(&mut buffer)).await;
    asked.expect("the question arrives").unwrap();
}

#[tokio::test]
async fn connections_of_a_virtual_interface_are_captured() {
    let (outside, pod) = pair().await;
    // The link's end in the pod stands for the interface of a virtual machine in it.
    let options = Options { virtual_interfaces: vec!["eth0".into()], ..Options::default() };
    redirect::apply(&pod.netns, &plan(&options, Stage::In)).await.unwrap();
    let proxy = Proxy { listeners: bind(&pod.netns, &options).await.unwrap() };
    let to = SocketAddr::new(pod.v4.into(), 9080);
    let mut client = dial(&outside.netns, to).await;
    let (mut taken, _) = accept(&proxy.tcp(15001, to.ip())).await;
    assert_eq!(original_dst(&taken).unwrap(), to);
    talk(&mut client, &mut taken).await;
}

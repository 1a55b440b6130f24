//! Where connections go: virtual addresses, plaintext both ways, names, other endpoints.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ambit_api::workload::WorkloadStatus;
use ambit_net::SocketStock;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use crate::mesh::{LIMIT, Mesh, Pod, echo, eventually, exchange, ping};

pub(crate) const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));

/// Serves one line of text to whoever connects, before it says anything.
pub(crate) async fn greet(pod: &Pod, port: u16) {
    let listener = pod.net.listen(pod.net.v4.into(), port).await;
    let name = pod.workload.name.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(name.as_bytes()).await.ok();
        }
    });
}

pub(crate) async fn greeted(from: &Pod, to: SocketAddr) -> std::io::Result<String> {
    let mut stream = from.net.dial(to).await.map_err(std::io::Error::other)?;
    let mut name = String::new();
    tokio::time::timeout(LIMIT, stream.read_to_string(&mut name)).await??;
    if name.is_empty() { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(name) }
}

/// A resolver of the proxy that answers `known` with `address`, and nothing else at all.
pub(crate) async fn resolver(
    known: &'static str,
    address: Ipv4Addr,
) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let resolver = socket.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let query = &buffer[..length];
            if query.windows(known.len()).any(|part| part == known.as_bytes()) {
                socket.send_to(&crate::dns::answered_with(query, &[address]), peer).await.unwrap();
            }
        }
    });
    (resolver, serving)
}

/// A service whose one endpoint has a host name only.
pub(crate) async fn by_host_name(
    mesh: &Mesh,
    name: &str,
    hostname: &str,
    vip: Ipv4Addr,
    port: u16,
) -> SocketAddr {
    let mut entry = mesh.uncaptured_pod(1, name, name).await;
    entry.workload.uid = format!("Kubernetes/networking.istio.io/WorkloadEntry/default/{name}");
    entry.workload.addresses.clear();
    entry.workload.hostname = hostname.into();
    mesh.service(name, vip.into(), port, &mut [&mut entry]).await;
    (vip, 80).into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_virtual_address_reaches_all_endpoints() {
    let mesh = Mesh::start(2, json!({})).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut near = mesh.pod(0, "near", "server").await;
    let mut far = mesh.pod(1, "far", "server").await;
    let mut plain = mesh.uncaptured_pod(1, "plain", "server").await;
    for pod in [&near, &far, &plain] {
        greet(pod, 9080).await;
    }
    mesh.service("greeter", VIP, 9080, &mut [&mut near, &mut far, &mut plain]).await;
    let mut seen = HashSet::new();
    for _ in 0..60 {
        seen.insert(greeted(&client, SocketAddr::new(VIP, 80)).await.unwrap());
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
    let line = mesh.nodes[0].ztunnel.logged("service", |l| l["dst.workload"] == "far").await;
    assert_eq!(line["dst.service"], "greeter.default.svc.cluster.local", "{line}");
    far.workload.status = WorkloadStatus::Unhealthy.into();
    mesh.announce(&far).await;
    for _ in 0..20 {
        assert_ne!(greeted(&client, SocketAddr::new(VIP, 80)).await.unwrap(), "far");
    }
    assert!(greeted(&client, SocketAddr::new(VIP, 81)).await.is_err(), "no such port");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusing_endpoint_is_replaced_before_the_first_byte() {
    let mesh = Mesh::start(2, json!({})).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut dead = mesh.pod(1, "dead", "server").await;
    let mut dead_near = mesh.pod(0, "dead-near", "server").await;
    let mut alive = mesh.pod(1, "alive", "server").await;
    greet(&alive, 9080).await;
    mesh.service("greeter", VIP, 9080, &mut [&mut dead, &mut dead_near, &mut alive]).await;
    for _ in 0..20 {
        assert_eq!(greeted(&client, SocketAddr::new(VIP, 80)).await.unwrap(), "alive");
    }
    let metrics = mesh.nodes[0].ztunnel.metrics().await;
    assert!(!metrics.contains("ambit_connect_retries_total 0"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn captured_and_uncaptured_pods_reach_each_other() {
    let mesh = Mesh::start(2, json!({})).await;
    let inside =
        [mesh.pod(0, "in-a", "a").await, mesh.pod(0, "in-b", "b").await, mesh.pod(1, "in-c", "c").await];
    let outside = [mesh.uncaptured_pod(0, "out-a", "a").await, mesh.uncaptured_pod(1, "out-b", "b").await];
    for pod in inside.iter().chain(&outside) {
        for ip in pod.net.ips() {
            let mut seen = echo(pod.net.listen(ip, 7000).await);
            tokio::spawn(async move { while seen.recv().await.is_some() {} });
        }
    }
    let pods: Vec<_> = inside.iter().chain(&outside).collect();
    for from in &pods {
        for to in &pods {
            for ip in to.net.ips() {
                let mut stream = from.net.dial((ip, 7000).into()).await.unwrap();
                let answer = exchange(&mut stream, b"to and fro").await.unwrap();
                assert_eq!(answer, b"to and fro", "{} to {} at {ip}", from.workload.name, to.workload.name);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_tunnel_can_be_had_on_one_node_too() {
    let mesh = Mesh::start(1, json!({ "sameNode": "tunnel" })).await;
    let client = mesh.pod(0, "client", "client").await;
    let server = mesh.pod(0, "server", "server").await;
    let mut seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let mut stream = client.net.dial((server.net.v4, 8080).into()).await.unwrap();
    assert_eq!(ping(&mut stream, b"through").await.unwrap(), b"through");
    assert_eq!(seen.recv().await.unwrap().ip(), client.net.v4);
    let metrics = mesh.nodes[0].ztunnel.metrics().await;
    assert!(metrics.contains("ambit_handed_over_total 0") && metrics.contains("ambit_hbone_tunnels_total 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_answered_in_the_pod_and_reached_by_socks() {
    let mesh = Mesh::start(2, json!({ "socks5": true, "dns": { "upstreams": ["10.96.0.53:53"] } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut server = mesh.pod(1, "server", "server").await;
    greet(&server, 9080).await;
    mesh.service("greeter", VIP, 9080, &mut [&mut server]).await;
    let resolver: SocketAddr = (Ipv4Addr::new(10, 96, 0, 53), 53).into();
    let socket =
        ambit_net::listen::bind_udp(&client.net.netns, "0.0.0.0:0".parse().unwrap(), <_>::default()).await;
    let socket = UdpSocket::from_std(socket.unwrap()).unwrap();
    socket.send_to(&question("greeter.default.svc.cluster.local"), resolver).await.unwrap();
    let mut answer = [0; 512];
    let (length, from) = tokio::time::timeout(LIMIT, socket.recv_from(&mut answer)).await.unwrap().unwrap();
    assert_eq!(from, resolver, "the answer comes from whom the pod asked");
    assert!(answer[..length].windows(4).any(|w| w == [10, 96, 0, 10]), "{:?}", &answer[..length]);
    let mut tcp = client.net.dial(resolver).await.unwrap();
    let message = question("greeter.default.svc.cluster.local");
    tcp.write_u16(u16::try_from(message.len()).unwrap()).await.unwrap();
    tcp.write_all(&message).await.unwrap();
    let mut answer = vec![0; tcp.read_u16().await.unwrap().into()];
    tcp.read_exact(&mut answer).await.unwrap();
    assert!(answer.windows(4).any(|w| w == [10, 96, 0, 10]));
    for target in [
        &b"\x05\x01\x00\x05\x01\x00\x03\x07greeter\x00\x50"[..],
        b"\x05\x01\x00\x05\x01\x00\x01\x0a\x60\x00\x0a\x00\x50",
    ] {
        let mut stream = socks(&client).await;
        stream.write_all(target).await.unwrap();
        let mut replies = [0; 12];
        stream.read_exact(&mut replies).await.unwrap();
        assert_eq!(&replies[..4], b"\x05\x00\x05\x00");
        let mut name = String::new();
        stream.read_to_string(&mut name).await.unwrap();
        assert_eq!(name, "server");
    }
    let mut stream = socks(&client).await;
    stream.write_all(b"\x05\x01\x00\x05\x01\x00\x01\x0a\x60\x00\x0a\x00\x51").await.unwrap();
    let mut replies = [0; 12];
    stream.read_exact(&mut replies).await.unwrap();
    assert_eq!(replies[3], 4, "host unreachable");
}

async fn socks(pod: &Pod) -> TcpStream {
    let stock = SocketStock::new(pod.net.netns.clone(), None);
    ambit_net::connect(&stock, (Ipv4Addr::LOCALHOST, 15080).into(), LIMIT).await.unwrap()
}

/// An A question.
fn question(name: &str) -> Vec<u8> {
    let mut message = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).unwrap());
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(b"\x00\x00\x01\x00\x01");
    message
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_demand_a_destination_is_requested_when_dialled() {
    let mesh = Mesh::start(2, json!({})).await;
    let mut server = mesh.pod(1, "server", "server").await;
    greet(&server, 9080).await;
    mesh.service("greeter", VIP, 9080, &mut [&mut server]).await;
    let client = mesh.uncaptured_pod(0, "client", "client").await;
    let config = {
        let mut config = mesh.nodes[0].ztunnel.config.clone();
        config["xds"] = json!({ "onDemand": true });
        config
    };
    let mut mesh = mesh;
    mesh.nodes[0].ztunnel.replace(config).await;
    mesh.nodes[0].agent.enrol(mesh.spec(&client)).await.unwrap();
    assert!(mesh.nodes[0].agent.wait_enabled(&client.uid, LIMIT).await);
    let before = mesh.nodes[0].ztunnel.dump().await;
    // Its own workload may be known by then.
    assert!(!before["workloads"].to_string().contains("server"), "{before}");
    assert_eq!(greeted(&client, SocketAddr::new(VIP, 80)).await.unwrap(), "server");
    let line = mesh.nodes[0].ztunnel.logged("outbound", |l| l["direction"] == "outbound").await;
    assert_eq!(line["dst.identity"], "spiffe://cluster.local/ns/default/sa/server", "{line}");
    eventually("known", async || {
        mesh.nodes[0].ztunnel.dump().await["workloads"].as_array().is_some_and(|w| w.len() == 2)
    })
    .await;
}

/// An endpoint that only DNS can locate: looked up by the proxy, at its second address if the first refuses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_by_host_name_is_tried_at_each_address() {
    let listener = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let resolver = listener.local_addr().unwrap();
    let mesh = Mesh::start(1, json!({ "dns": { "upstreams": [resolver.to_string()] } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut outside = mesh.uncaptured_pod(0, "outside", "outside").await;
    let refusing = mesh.fabric.pod().await;
    greet(&outside, 9080).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let (count, addresses) = (asked.clone(), [refusing.v4, outside.net.v4]);
    let socket = UdpSocket::from_std(listener).unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let answer = crate::dns::answered_with(&buffer[..length], &addresses);
            // An answer without records and without SOA, as the one to AAAA, is not to be remembered (RFC 2308 §5).
            count.fetch_add(usize::from(crate::dns::has_answers(&answer)), Ordering::Relaxed);
            socket.send_to(&answer, peer).await.unwrap();
        }
    });
    outside.workload.uid = "Kubernetes/networking.istio.io/WorkloadEntry/default/db".into();
    outside.workload.name = "db".into();
    outside.workload.addresses.clear();
    outside.workload.hostname = "db.example.com".into();
    mesh.service("db", VIP, 9080, &mut [&mut outside]).await;
    for _ in 0..20 {
        assert_eq!(greeted(&client, SocketAddr::new(VIP, 80)).await.unwrap(), "outside");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1, "asked once, then the cache");
}

/// In the clear it would go past the tunnel, and past the policies that ask for one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_name_of_a_mesh_address_is_reached_by_the_mesh() {
    let (resolver, _serving) = resolver("meshed", Ipv4Addr::new(10, 77, 0, 2)).await;
    let mesh = Mesh::start(2, json!({ "dns": { "upstreams": [resolver.to_string()] } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let server = mesh.pod(1, "server", "server").await;
    assert_eq!(server.net.v4, Ipv4Addr::new(10, 77, 0, 2));
    greet(&server, 9080).await;
    mesh.control.policy(&crate::policy::strict());
    mesh.wait("policy known", |dump| dump["policies"].as_array().is_some_and(|all| !all.is_empty())).await;
    let entry = by_host_name(&mesh, "entry", "meshed.example.com", Ipv4Addr::new(10, 96, 0, 22), 9080).await;
    assert_eq!(greeted(&client, entry).await.unwrap(), "server");
    let line = mesh.nodes[1].ztunnel.logged("the server's side", |line| line["direction"] == "inbound").await;
    assert_eq!(line["src.identity"], "spiffe://cluster.local/ns/default/sa/client", "{line}");
}

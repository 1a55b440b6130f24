//! Names as an application in a pod asks for them: redirected, answered, forwarded, from whom it asked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use crate::mesh::{LIMIT, Mesh, Pod, echo, eventually, exchange};

/// The first pod's addresses: the cluster's resolver.
const OWN: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1))];
const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// What resolvers say of every name.
const BY_OWN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const BY_FOREIGN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

const KNOWN: &str = "greeter.default.svc.cluster.local.";
const UNKNOWN: &str = "www.example.org.";

/// Answers every question in `pod` with one address, by UDP and TCP, and reports who asked.
async fn resolver(pod: &Pod, says: Ipv4Addr) -> mpsc::UnboundedReceiver<IpAddr> {
    let (asked, asking) = mpsc::unbounded_channel();
    for ip in pod.net.ips() {
        let socket = udp(pod, SocketAddr::new(ip, 53)).await;
        let on_udp = asked.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                on_udp.send(peer.ip()).unwrap();
                socket.send_to(&answered(&buffer[..length], says), peer).await.unwrap();
            }
        });
        let listener = pod.net.listen(ip, 53).await;
        let on_tcp = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, peer)) = listener.accept().await {
                on_tcp.send(peer.ip()).unwrap();
                tokio::spawn(async move {
                    while let Ok(length) = stream.read_u16().await {
                        let mut query = vec![0; length.into()];
                        stream.read_exact(&mut query).await.unwrap();
                        stream.write_all(&framed(&answered(&query, says))).await.unwrap();
                    }
                });
            }
        });
    }
    asking
}

fn answered(query: &[u8], address: Ipv4Addr) -> Vec<u8> {
    answered_with(query, &[address])
}

/// Whether an answer has records.
pub(crate) fn has_answers(answer: &[u8]) -> bool {
    !Message::from_vec(answer).unwrap().answers.is_empty()
}

/// The answer to a question for IPv4 addresses; one for others gets none.
pub(crate) fn answered_with(query: &[u8], addresses: &[Ipv4Addr]) -> Vec<u8> {
    let asked = Message::from_vec(query).unwrap();
    let mut response = Message::response(asked.metadata.id, asked.metadata.op_code);
    response.add_query(asked.queries[0].clone());
    if asked.queries[0].query_type() == RecordType::A {
        for address in addresses {
            let name = asked.queries[0].name().clone();
            response.add_answer(Record::from_rdata(name, 60, RData::A(A(*address))));
        }
    }
    response.to_vec().unwrap()
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&u16::try_from(message.len()).unwrap().to_be_bytes(), message].concat()
}

pub(crate) fn question(name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

fn address(response: &[u8]) -> Option<IpAddr> {
    Message::from_vec(response).unwrap().answers.first()?.data.ip_addr()
}

async fn udp(pod: &Pod, address: SocketAddr) -> UdpSocket {
    let socket = ambit_net::listen::bind_udp(&pod.net.netns, address, <_>::default()).await.unwrap();
    UdpSocket::from_std(socket).unwrap()
}

async fn ask_udp(pod: &Pod, resolver: IpAddr, name: &str) -> Option<IpAddr> {
    let any: IpAddr =
        if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = udp(pod, SocketAddr::new(any, 0)).await;
    let resolver = SocketAddr::new(resolver, 53);
    socket.send_to(&question(name), resolver).await.unwrap();
    let mut buffer = [0; 512];
    let (length, from) = tokio::time::timeout(LIMIT, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(from, resolver, "the answer comes from whom the pod asked");
    address(&buffer[..length])
}

async fn ask_tcp(pod: &Pod, resolver: IpAddr, name: &str) -> Option<IpAddr> {
    let mut stream = pod.net.dial(SocketAddr::new(resolver, 53)).await.unwrap();
    stream.write_all(&framed(&question(name))).await.unwrap();
    let answer = async {
        let mut response = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut response).await.unwrap();
        response
    };
    address(&tokio::time::timeout(LIMIT, answer).await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_are_answered_or_forwarded_by_udp_and_tcp() {
    let upstreams = OWN.map(|ip| SocketAddr::new(ip, 53).to_string());
    let mesh = Mesh::start(2, json!({ "dns": { "upstreams": upstreams } })).await;
    let own = mesh.uncaptured_pod(1, "resolver", "resolver").await;
    assert_eq!(own.net.ips(), OWN);
    let mut asking = resolver(&own, BY_OWN).await;
    let foreign = mesh.uncaptured_pod(1, "foreign", "foreign").await;
    let mut asking_foreign = resolver(&foreign, BY_FOREIGN).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut server = mesh.pod(1, "server", "server").await;
    mesh.service("greeter", VIP.into(), 9080, &mut [&mut server]).await;

    for (own, foreign) in own.net.ips().into_iter().zip(foreign.net.ips()) {
        assert_eq!(ask_udp(&client, own, KNOWN).await, Some(VIP.into()), "{own}");
        assert_eq!(ask_tcp(&client, own, KNOWN).await, Some(VIP.into()), "{own}");
        assert!(asking.try_recv().is_err(), "the resolver is not asked for what is known here");
        assert_eq!(ask_udp(&client, own, UNKNOWN).await, Some(BY_OWN.into()), "{own}");
        assert_eq!(ask_tcp(&client, own, UNKNOWN).await, Some(BY_OWN.into()), "{own}");
        for _ in 0..2 {
            let asker = asking.try_recv().unwrap();
            assert!(client.net.ips().contains(&asker), "resolvers see the pod's address, not {asker}");
        }
        for name in [KNOWN, UNKNOWN] {
            assert_eq!(ask_udp(&client, foreign, name).await, Some(BY_FOREIGN.into()), "{foreign} {name}");
            assert_eq!(ask_tcp(&client, foreign, name).await, Some(BY_FOREIGN.into()), "{foreign} {name}");
        }
    }
    for _ in 0..8 {
        assert!(client.net.ips().contains(&asking_foreign.try_recv().unwrap()));
    }
    // TCP to a resolver outside the cluster is no business of the DNS proxy.
    eventually("counted", async || {
        let metrics = mesh.nodes[0].ztunnel.metrics().await;
        let counts =
            ["ambit_dns_answered_total 4", "ambit_dns_forwarded_total 8", "ambit_dns_foreign_total 4"];
        counts.into_iter().all(|count| metrics.lines().any(|line| line == count))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_is_answered_again_after_its_proxy_was_killed() {
    let mut mesh = Mesh::start(1, json!({ "dns": { "upstreams": ["10.77.0.1:53"] } })).await;
    let own = mesh.uncaptured_pod(0, "resolver", "resolver").await;
    let _asking = resolver(&own, BY_OWN).await;
    let client = mesh.pod(0, "client", "client").await;
    assert_eq!(ask_udp(&client, OWN[0], UNKNOWN).await, Some(BY_OWN.into()));
    mesh.nodes[0].ztunnel.child.kill().await.unwrap();
    // The question waits in the socket that the node agent holds, and is answered by the successor.
    let socket = udp(&client, "0.0.0.0:0".parse().unwrap()).await;
    socket.send_to(&question(UNKNOWN), SocketAddr::new(OWN[0], 53)).await.unwrap();
    let config = mesh.nodes[0].ztunnel.config.clone();
    mesh.nodes[0].ztunnel.replace(config).await;
    let mut buffer = [0; 512];
    let (length, _) = tokio::time::timeout(LIMIT, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(address(&buffer[..length]), Some(BY_OWN.into()));
}

/// Port 53 is a port like others unless the cluster's resolver is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_to_port_53_of_pods_and_services_takes_the_tunnel() {
    let mesh = Mesh::start(2, json!({ "dns": { "upstreams": ["10.77.0.250:53"] } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut server = mesh.pod(1, "server", "server").await;
    let near = mesh.pod(0, "near", "near").await;
    for (pod, port) in [(&server, 53), (&server, 9001), (&near, 53)] {
        let mut seen = echo(pod.net.listen(pod.net.v4.into(), port).await);
        tokio::spawn(async move { while seen.recv().await.is_some() {} });
    }
    mesh.service_on("odd", VIP.into(), (53, 9001), &mut [&mut server]).await;
    mesh.control.policy(&crate::policy::strict());
    let resolver = SocketAddr::new(server.net.v4.into(), 53);
    let plain = mesh.uncaptured_pod(0, "plain", "plain").await;
    eventually("plaintext is refused", async || {
        let Ok(mut stream) = plain.net.dial(resolver).await else { return true };
        exchange(&mut stream, b"?").await.is_ok_and(|answer| answer.is_empty())
            || exchange(&mut stream, b"?").await.is_err()
    })
    .await;
    for target in [resolver, (VIP, 53).into(), (near.net.v4, 53).into()] {
        let mut stream = client.net.dial(target).await.unwrap();
        assert_eq!(
            exchange(&mut stream, b"not in the clear").await.unwrap(),
            b"not in the clear",
            "{target}"
        );
    }
    for port in [53, 9001] {
        let address = format!("{}:{port}", server.net.v4);
        let line = mesh.nodes[1].ztunnel.logged("the server's side", |line| {
            line["direction"] == "inbound" && line["dst.hbone_addr"] == address.as_str()
        });
        assert_eq!(line.await["src.identity"], "spiffe://cluster.local/ns/default/sa/client");
    }
}

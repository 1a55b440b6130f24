//! The node proxy as a process between real namespaces: a real authority, real discovery, a real node
//! agent, nothing mocked. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::needless_pass_by_value,
    reason = "a test that can't go on says so by panicking"
)]

mod control;
mod dns;
mod ejection;
mod identity;
mod lifecycle;
mod local;
mod mesh;
mod network;
mod ondemand;
mod policy;
mod routing;
mod shares;
mod tunnels;

use std::net::SocketAddr;

use mesh::{Mesh, echo, eventually, exchange, ping};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnelled_connections_keep_the_clients_address() {
    let mesh = Mesh::start(2, json!({})).await;
    let client = mesh.pod(0, "client", "client-account").await;
    let server = mesh.pod(1, "server", "server-account").await;
    for ip in server.net.ips() {
        let mut seen = echo(server.net.listen(ip, 8080).await);
        let message: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let mut stream = client.net.dial(SocketAddr::new(ip, 8080)).await.unwrap();
        assert!(exchange(&mut stream, &message).await.unwrap() == message, "bytes differ");
        let peer = seen.recv().await.unwrap();
        assert!(client.net.ips().contains(&peer.ip()), "{peer}");
        assert_eq!(
            peer.port(),
            stream.local_addr().unwrap().port(),
            "the client's own port, which is free here"
        );
        let hbone = SocketAddr::new(ip, 15008).to_string();
        for (node, direction) in [(0, "outbound"), (1, "inbound")] {
            let line = mesh.nodes[node]
                .ztunnel
                .logged(direction, |line| {
                    line["direction"] == direction && line["dst.addr"] == hbone.as_str()
                })
                .await;
            assert_eq!(line["src.identity"], "spiffe://cluster.local/ns/default/sa/client-account", "{line}");
            assert_eq!(line["dst.identity"], "spiffe://cluster.local/ns/default/sa/server-account", "{line}");
            assert_eq!(line["bytes_sent"], message.len(), "{line}");
            assert_eq!(line["bytes_recv"], message.len(), "{line}");
            assert_eq!(line["src.workload"], "client", "{line}");
            assert_eq!(line["dst.workload"], "server", "{line}");
            assert_eq!(line["error"], json!(null), "{line}");
        }
    }
    eventually("counted", async || {
        let metrics = mesh.nodes[1].ztunnel.metrics().await;
        metrics.lines().any(|line| {
            line.starts_with("istio_tcp_connections_closed_total")
                && line.contains("connection_security_policy=\"mutual_tls\"")
                && line.ends_with(" 2")
        })
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_on_one_node_is_handed_over_and_reported() {
    let mesh = Mesh::start(1, json!({})).await;
    let client = mesh.pod(0, "client", "client-account").await;
    let server = mesh.pod(0, "server", "server-account").await;
    let mut seen = echo(server.net.listen(server.net.v4.into(), 8080).await);
    let mut stream = client.net.dial((server.net.v4, 8080).into()).await.unwrap();
    assert_eq!(ping(&mut stream, b"over there").await.unwrap(), b"over there");
    assert_eq!(seen.recv().await.unwrap().ip(), client.net.v4);
    assert_eq!(exchange(&mut stream, b"!").await.unwrap(), b"!");
    for direction in ["outbound", "inbound"] {
        let line = mesh.nodes[0].ztunnel.logged(direction, |line| line["direction"] == direction).await;
        assert_eq!(line["src.identity"], "spiffe://cluster.local/ns/default/sa/client-account", "{line}");
        assert_eq!(line["dst.identity"], "spiffe://cluster.local/ns/default/sa/server-account", "{line}");
        assert_eq!(line["dst.hbone_addr"], format!("{}:8080", server.net.v4), "{line}");
        assert_eq!(line["bytes_sent"], 11, "{line}");
    }
    assert!(mesh.nodes[0].ztunnel.metrics().await.contains("ambit_handed_over_total 1"));
}

//! Application tunnels with PROXY v2, and tunnels inside tunnels to another network.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::gateway_address::Destination;
use ambit_api::workload::{ApplicationTunnel, GatewayAddress, NetworkAddress, application_tunnel};
use ambit_hbone::{Baggage, Endpoints, Server, ServerSettings, WindowBudget, WorkloadKind};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::identity::{certificate, trust};
use crate::mesh::{LIMIT, Mesh, bytes, echo, exchange, ping};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_tunnel_gets_the_clients_identity() {
    let mesh = Mesh::start(2, json!({})).await;
    let far = mesh.pod(0, "far", "far").await;
    let near = mesh.pod(1, "near", "near").await;
    let mut server = mesh.pod(1, "server", "server").await;
    let protocol = application_tunnel::Protocol::Proxy.into();
    server.workload.application_tunnel = Some(ApplicationTunnel { protocol, port: 15088 });
    mesh.control.workload(server.workload.clone());
    mesh.wait("tunnel known", |dump| dump["workloads"].to_string().contains("15088")).await;
    let listener = server.net.listen(server.net.v4.into(), 15088).await;
    for client in [&far, &near] {
        let address = SocketAddr::new(server.net.v4.into(), 8080);
        let mut stream = client.net.dial(address).await.unwrap();
        stream.write_all(b"payload").await.unwrap();
        let (mut accepted, _) = tokio::time::timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
        let mut fixed = [0; 16];
        accepted.read_exact(&mut fixed).await.unwrap();
        assert_eq!(&fixed[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        let mut rest = vec![0; u16::from_be_bytes([fixed[14], fixed[15]]).into()];
        accepted.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest[..4], &client.net.v4.octets());
        assert_eq!(&rest[4..8], &server.net.v4.octets());
        assert_eq!(&rest[10..12], &8080u16.to_be_bytes());
        assert_eq!(rest[12], 0xD0);
        let account = &client.workload.service_account;
        assert_eq!(rest[15..], *format!("spiffe://cluster.local/ns/default/sa/{account}").as_bytes());
        let mut payload = [0; 7];
        accepted.read_exact(&mut payload).await.unwrap();
        assert_eq!(&payload, b"payload");
    }
}

/// A gateway of another network and, behind it, that network's server: both ends of a double tunnel. Returns the serial
/// number of the server's certificate.
async fn gateway(
    mesh: &Mesh,
    listener: tokio::net::TcpListener,
    report: tokio::sync::mpsc::UnboundedSender<String>,
) -> String {
    let trust = trust(mesh);
    let certificate = |account: &str| Arc::new(certificate(mesh, account, Duration::from_secs(3600)));
    let (outer, inner) = (certificate("gateway"), certificate("server"));
    let serial = inner.info().serial.clone();
    tokio::spawn(async move {
        let server = Server::new(ServerSettings::default(), trust, WindowBudget::new(0));
        while let Ok((socket, remote)) = listener.accept().await {
            let endpoints = Endpoints { local: socket.local_addr().unwrap(), remote };
            let accepted = server.accept(socket, endpoints, outer.server_config()).await.unwrap();
            let (server, inner, report) = (server.clone(), inner.clone(), report.clone());
            tokio::spawn(async move {
                let inside_server = server.clone();
                let serve = server.serve(accepted, std::future::pending(), {
                    move |incoming| {
                        let (inner, report) = (inner.clone(), report.clone());
                        let server = inside_server.clone();
                        async move {
                            report
                                .send(format!(
                                    "outer {} {}",
                                    incoming.peer().certificate.identity(),
                                    incoming.request().authority
                                ))
                                .unwrap();
                            let within = incoming.accept(None).unwrap().into_stream();
                            inside(within, endpoints, server, inner, report).await;
                        }
                    }
                });
                serve.await.ok();
            });
        }
    });
    serial
}

/// What the service behind the gateway says of the workload that was chosen there.
fn behind() -> Baggage {
    Baggage {
        namespace: "far".into(),
        workload: Some((WorkloadKind::Deployment, "behind".into())),
        ..Baggage::default()
    }
}

async fn inside(
    stream: ambit_hbone::TunnelStream,
    endpoints: Endpoints,
    server: Server,
    certificate: Arc<ambit_identity::WorkloadCertificate>,
    report: tokio::sync::mpsc::UnboundedSender<String>,
) {
    let Ok(accepted) = server.accept(stream, endpoints, certificate.server_config()).await else { return };
    let serve = server.serve(accepted, std::future::pending(), move |incoming| {
        let report = report.clone();
        async move {
            let request = incoming.request();
            report
                .send(format!(
                    "inner {} {} {:?}",
                    incoming.peer().certificate.identity(),
                    request.authority,
                    request.forwarded_network
                ))
                .unwrap();
            let (mut read, mut write) =
                tokio::io::split(incoming.accept(Some(&behind())).unwrap().into_stream());
            if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                write.shutdown().await.ok();
            }
        }
    });
    serve.await.ok();
}

/// A client, and a service of another network behind a gateway.
struct TwoNetworks {
    mesh: Mesh,
    client: crate::mesh::Pod,
    service: SocketAddr,
    reports: tokio::sync::mpsc::UnboundedReceiver<String>,
    /// The serial number of the service's certificate.
    serial: String,
}

impl TwoNetworks {
    async fn start() -> Self {
        let mesh = Mesh::start(1, json!({ "network": "east" })).await;
        let client = mesh.pod(0, "client", "client").await;
        let mut gateway_pod = mesh.uncaptured_pod(0, "gateway", "gateway").await;
        let address = gateway_pod.net.v4;
        let (report, reports) = tokio::sync::mpsc::unbounded_channel();
        let serial = gateway(&mesh, gateway_pod.net.listen(address.into(), 15008).await, report).await;
        gateway_pod.workload.tunnel_protocol = 1;
        gateway_pod.workload.native_tunnel = true;
        mesh.announce(&gateway_pod).await;
        let mut server = mesh.uncaptured_pod(0, "server", "server").await;
        server.workload.network = "west".into();
        server.workload.tunnel_protocol = 1;
        server.workload.network_gateway = Some(GatewayAddress {
            destination: Some(Destination::Address(NetworkAddress {
                network: "east".into(),
                address: bytes(address.into()),
                length: None,
            })),
            hbone_mtls_port: 15008,
        });
        let vip = "10.96.0.77".parse().unwrap();
        mesh.service("remote", vip, 8080, &mut [&mut server]).await;
        Self { mesh, client, service: SocketAddr::new(vip, 80), reports, serial }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_network_is_reached_by_double_tunnels() {
    let TwoNetworks { mesh, client, service, mut reports, serial: _ } = TwoNetworks::start().await;
    let mut stream = client.net.dial(service).await.unwrap();
    assert_eq!(exchange(&mut stream, b"far away").await.unwrap(), b"far away");
    let client_id = "spiffe://cluster.local/ns/default/sa/client";
    let authority = "remote.default.svc.cluster.local:80";
    assert_eq!(reports.recv().await.unwrap(), format!("outer {client_id} {authority}"));
    assert_eq!(reports.recv().await.unwrap(), format!("inner {client_id} {authority} Some(\"east\")"));
    // The directory holds the gateway's network, not who answered there.
    let line = mesh.nodes[0].ztunnel.logged("the connection", |line| line["direction"] == "outbound").await;
    assert_eq!(
        (line["dst.workload"].as_str(), line["dst.namespace"].as_str()),
        (Some("behind"), Some("far"))
    );
    let metrics = mesh.nodes[0].ztunnel.metrics().await;
    assert!(metrics.contains("destination_workload=\"behind\""), "{metrics}");
}

/// The gateway stays trusted; the service behind it is the peer of the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_service_behind_a_gateway_loses_its_tunnels() {
    let TwoNetworks { mesh, client, service, reports: _reports, serial } = TwoNetworks::start().await;
    let mut stream = client.net.dial(service).await.unwrap();
    assert_eq!(ping(&mut stream, b"trusted").await.unwrap(), b"trusted");
    mesh.control.revoke(&[serial]);
    let ended = tokio::time::timeout(LIMIT, stream.read_u8()).await.expect("closed by the revocation");
    assert!(ended.is_err());
    let revoked = mesh.nodes[0].ztunnel.logged("the revocation", |line| {
        line["direction"] == "outbound" && line["error"].to_string().contains("revoked")
    });
    assert_eq!(revoked.await["dst.identity"], "spiffe://cluster.local/ns/default/sa/server");
    let mut again = client.net.dial(service).await.unwrap();
    assert!(
        exchange(&mut again, b"again").await.is_ok_and(|answer| answer.is_empty())
            || again.read_u8().await.is_err()
    );
}

/// Without a DNS proxy and SOCKS5 their ports are the application's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_of_listeners_that_are_off_are_the_applications() {
    let mesh = Mesh::start(2, json!({ "dns": { "enabled": false } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let servers = [mesh.pod(0, "near", "server").await, mesh.pod(1, "far", "server").await];
    for server in &servers {
        for port in [15053, 15080] {
            let address = SocketAddr::new(server.net.v4.into(), port);
            let _seen = echo(server.net.listen(address.ip(), port).await);
            let mut stream = client.net.dial(address).await.unwrap();
            assert_eq!(ping(&mut stream, b"hello").await.unwrap(), b"hello", "{address}");
        }
    }
}

//! Endpoints that can't be reached are left out for a while; those that are only slow are not, and nobody else suffers.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::gateway_address::Destination;
use ambit_api::workload::{GatewayAddress, NetworkAddress, Port, Service, TunnelProtocol};
use ambit_hbone::{Endpoints, Server, ServerSettings, WindowBudget};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{JoinHandle, JoinSet};

use crate::identity::{certificate, trust};
use crate::mesh::{LIMIT, Mesh, Pod, Ztunnel, bytes, echo, eventually, ping};
use crate::routing::{VIP, greet, greeted};

/// How long a certificate of a test's own server is valid.
const VALID: Duration = Duration::from_secs(3600);

/// A count of a node proxy.
async fn count(ztunnel: &Ztunnel, name: &str) -> u64 {
    let metrics = ztunnel.metrics().await;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
}

/// Two of three endpoints are on a node that is cut off: nothing comes back, not even a refusal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_endpoints_cost_part_of_a_budget_and_are_ejected() {
    let mesh = Mesh::start(2, json!({ "limits": { "connectTimeout": "1500ms" } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut alive = mesh.pod(1, "alive", "server").await;
    greet(&alive, 9080).await;
    let mut cut_off = Vec::new();
    for (name, address) in [("gone-a", [10, 77, 9, 1]), ("gone-b", [10, 77, 9, 2])] {
        let mut gone = alive.clone();
        gone.workload.uid = gone.workload.uid.replace("alive", name);
        gone.workload.name = name.into();
        gone.workload.addresses = vec![bytes(IpAddr::from(address))];
        cut_off.push(gone);
    }
    let [gone_a, gone_b] = &mut cut_off[..] else { unreachable!() };
    mesh.service("greeter", VIP, 9080, &mut [gone_a, gone_b, &mut alive]).await;
    let started = tokio::time::Instant::now();
    for _ in 0..30 {
        assert_eq!(greeted(&client, SocketAddr::new(VIP, 80)).await.unwrap(), "alive");
    }
    // Each is tried now and then, for a third of the budget, and left out longer each time.
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    assert!(count(&mesh.nodes[0].ztunnel, "ambit_endpoints_ejected_total").await > 0);
}

/// A listener of the pod that accepts nobody. Its queue takes one connection; first packets of others are dropped.
async fn drop_packets(pod: &Pod, port: u16) -> Socket {
    let address = SocketAddr::new(pod.net.v4.into(), port);
    let listener = pod.net.netns.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&address.into())?;
        socket.listen(0)?;
        Ok::<_, std::io::Error>(socket)
    });
    listener.await.unwrap().unwrap()
}

/// The tunnel is fine, the application's port is not: neither the endpoint nor its tunnel connections are to blame.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_drops_packets_harms_no_other_connection() {
    let mesh = Mesh::start(2, json!({ "limits": { "connectTimeout": "1s" } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let server = mesh.pod(1, "server", "server").await;
    let good = SocketAddr::new(server.net.v4.into(), 8080);
    let stuck = SocketAddr::new(server.net.v4.into(), 9090);
    let _seen = echo(server.net.listen(good.ip(), good.port()).await);
    let _queue = drop_packets(&server, stuck.port()).await;
    let mut held = client.net.dial(good).await.unwrap();
    assert_eq!(ping(&mut held, b"before").await.unwrap(), b"before");
    let waiting = (0..300).map(|_| async {
        let mut stream = client.net.dial(stuck).await.unwrap();
        tokio::time::timeout(LIMIT, stream.read_u8()).await.map(|read| read.is_err())
    });
    let ended = futures_util::future::join_all(waiting);
    let (ended, ()) = tokio::join!(ended, async {
        for _ in 0..10 {
            assert_eq!(ping(&mut held, b"beside").await.unwrap(), b"beside");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    // One may be in the listener's queue.
    assert!(ended.iter().filter(|ended| matches!(ended, Ok(true))).count() >= 298, "{ended:?}");
    assert_eq!(ping(&mut held, b"after").await.unwrap(), b"after");
    assert_eq!(count(&mesh.nodes[0].ztunnel, "ambit_endpoints_ejected_total").await, 0);
    let metrics = mesh.nodes[1].ztunnel.metrics().await;
    assert!(!metrics.contains("response_flags=\"H2_HANDSHAKE_FAILURE\""), "{metrics}");
}

/// Serves HBONE as a waypoint does, in a pod outside the mesh: tunnels to `good` echo, others are never answered, as
/// where the destination's port drops packets.
async fn serve_waypoint(mesh: &Mesh, waypoint: &Pod, good: IpAddr) -> JoinHandle<()> {
    let (trust, certificate) = (trust(mesh), Arc::new(certificate(mesh, "waypoint", VALID)));
    let listener = waypoint.net.listen(waypoint.net.v4.into(), 15008).await;
    tokio::spawn(async move {
        let server = Server::new(ServerSettings::default(), trust, WindowBudget::new(0));
        let mut connections = JoinSet::new();
        while let Ok((socket, remote)) = listener.accept().await {
            let (server, certificate) = (server.clone(), certificate.clone());
            connections.spawn(async move {
                let endpoints = Endpoints { local: socket.local_addr().unwrap(), remote };
                let Ok(accepted) = server.accept(socket, endpoints, certificate.server_config()).await else {
                    return;
                };
                let serving =
                    server.serve(accepted, std::future::pending(), move |mut incoming| async move {
                        if incoming.request().authority.address().is_none_or(|to| to.ip() != good) {
                            // Until the client gives up.
                            incoming.within(std::future::pending::<()>()).await.ok();
                            return;
                        }
                        let (mut read, mut write) =
                            tokio::io::split(incoming.accept(None).unwrap().into_stream());
                        if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                            write.shutdown().await.ok();
                        }
                    });
                serving.await.ok();
            });
        }
    })
}

/// Behind a waypoint, a destination that drops packets delays the answer to CONNECT. The waypoint can be reached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destination_that_drops_packets_ejects_no_waypoint() {
    let mesh = Mesh::start(1, json!({ "limits": { "connectTimeout": "1s" } })).await;
    let client = mesh.pod(0, "client", "client").await;
    let mut waypoint = mesh.uncaptured_pod(1, "waypoint", "waypoint").await;
    waypoint.workload.tunnel_protocol = TunnelProtocol::Hbone.into();
    waypoint.workload.native_tunnel = true;
    mesh.announce(&waypoint).await;
    let through = GatewayAddress {
        destination: Some(Destination::Address(NetworkAddress {
            network: String::new(),
            address: bytes(waypoint.net.v4.into()),
            length: None,
        })),
        hbone_mtls_port: 15008,
    };
    let [good, stuck] = [[10, 96, 0, 1], [10, 96, 0, 2]].map(|vip| SocketAddr::new(vip.into(), 80));
    for (name, vip) in [("good", good.ip()), ("stuck", stuck.ip())] {
        mesh.control.service(Service {
            name: name.into(),
            namespace: "default".into(),
            hostname: format!("{name}.default.svc.cluster.local"),
            addresses: vec![NetworkAddress { network: String::new(), address: bytes(vip), length: None }],
            ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
            waypoint: Some(through.clone()),
            ..Service::default()
        });
        mesh.wait("the service is known", |dump| dump["services"].to_string().contains(name)).await;
    }
    let serving = serve_waypoint(&mesh, &waypoint, good.ip()).await;
    let mut held = client.net.dial(good).await.unwrap();
    assert_eq!(ping(&mut held, b"before").await.unwrap(), b"before");
    let waiting = (0..30).map(|_| async {
        let mut stream = client.net.dial(stuck).await.unwrap();
        tokio::time::timeout(LIMIT, stream.read_u8()).await.expect("given up").unwrap_err();
    });
    let others = async {
        for _ in 0..15 {
            let mut new = client.net.dial(good).await.unwrap();
            assert_eq!(ping(&mut new, b"beside").await.unwrap(), b"beside");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::join!(futures_util::future::join_all(waiting), others);
    assert_eq!(ping(&mut held, b"after").await.unwrap(), b"after");
    let ztunnel = &mesh.nodes[0].ztunnel;
    assert_eq!(count(ztunnel, "ambit_endpoints_ejected_total").await, 0);
    // One that cannot be reached is ejected.
    serving.abort();
    eventually("the waypoint is ejected", async || {
        // The dial itself may be answered by the reset.
        if let Ok(mut stream) = client.net.dial(good).await {
            drop(tokio::time::timeout(LIMIT, stream.read_u8()).await);
        }
        count(ztunnel, "ambit_endpoints_ejected_total").await > 0
    })
    .await;
}

/// A pod decides what its own namespace lets out. What it can't reach says nothing to other pods of its node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_pod_cannot_reach_is_not_ejected_for_others() {
    let mesh = Mesh::start(2, json!({})).await;
    let confined = mesh.pod(0, "confined", "confined").await;
    let free = mesh.pod(0, "free", "free").await;
    let mut endpoints = [mesh.pod(1, "one", "server").await, mesh.pod(1, "two", "server").await];
    for endpoint in &endpoints {
        greet(endpoint, 9080).await;
    }
    let [one, two] = &mut endpoints;
    mesh.service("greeter", VIP, 9080, &mut [one, two]).await;
    confined.net.unreachable(endpoints[0].net.v4).await;
    let service = SocketAddr::new(VIP, 80);
    for _ in 0..10 {
        assert_eq!(greeted(&confined, service).await.unwrap(), "two");
    }
    assert!(count(&mesh.nodes[0].ztunnel, "ambit_endpoints_ejected_total").await > 0);
    assert!(count(&mesh.nodes[0].ztunnel, "ambit_endpoints_ejected_now").await > 0);
    let mut seen = HashSet::new();
    for _ in 0..20 {
        seen.insert(greeted(&free, service).await.unwrap());
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
}

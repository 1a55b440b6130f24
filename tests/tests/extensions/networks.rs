//! Tunnels inside tunnels into another network, and tunnels that go on into the application.

use std::sync::Arc;

use ambit_hbone::{Endpoints, Incoming, Server, ServerSettings, WindowBudget};
use ambit_identity::{Trust, WorkloadCertificate};
use ambit_local::{Pod, PodOptions};
use ambit_tests::add_trials;
use ambit_tests::apps::{self, App};
use ambit_tests::beds::Trials;
use ambit_tests::wait;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::{EAST, Extensions, PORT, attempt, ip_of};

const GATEWAY: &str = "spiffe://cluster.local/ns/street/sa/gateway";

/// A gateway into the other network: ends the outer tunnel, and hands what is inside to a pod's tunnel port.
struct Gateway {
    task: JoinHandle<()>,
    /// Who asked for what.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Gateway {
    /// Listens on `at`, as whom `certificate` says, and leads to `target`.
    async fn start(
        at: &Pod,
        port: u16,
        certificate: WorkloadCertificate,
        trust: Trust,
        target: &Pod,
    ) -> Self {
        let listener = at.listen((at.ip(), port).into()).await.unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let server = Server::new(ServerSettings::default(), trust, WindowBudget::new(0));
        let serving =
            serve(listener, server, Arc::new(certificate), at.clone(), target.clone(), Arc::clone(&asked));
        Self { task: tokio::spawn(serving), asked }
    }
}

async fn serve(
    listener: TcpListener,
    server: Server,
    certificate: Arc<WorkloadCertificate>,
    at: Pod,
    target: Pod,
    asked: Arc<Mutex<Vec<String>>>,
) {
    while let Ok((socket, remote)) = listener.accept().await {
        let endpoints = Endpoints { local: socket.local_addr().unwrap(), remote };
        let (server, certificate, asked) = (server.clone(), Arc::clone(&certificate), Arc::clone(&asked));
        let (at, target) = (at.clone(), target.clone());
        tokio::spawn(async move {
            let Ok(accepted) = server.accept(socket, endpoints, certificate.server_config()).await else {
                return;
            };
            let handler = move |incoming: Incoming| {
                let (asked, at, target) = (Arc::clone(&asked), at.clone(), target.clone());
                async move {
                    asked.lock().push(format!(
                        "{} for {}",
                        incoming.peer().certificate.identity(),
                        incoming.request().authority
                    ));
                    let mut inner = incoming.accept(None).unwrap().into_stream();
                    let mut onward = at.connect((target.ip(), 15008).into()).await.unwrap();
                    drop(copy_bidirectional(&mut inner, &mut onward).await);
                }
            };
            let endless = std::future::pending();
            drop(server.serve(accepted, endless, handler).await);
        });
    }
}

fn gateway_object(bed: &Extensions, network: &str, name: &str, port: u16, account: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata:\n  namespace: street\n  name: {name}\n  \
         labels: {{topology.istio.io/network: {network}}}\n  \
         annotations: {{gateway.istio.io/service-account: {account}}}\nspec:\n  gatewayClassName: ambit-remote\n  \
         addresses: [{{type: IPAddress, value: {}}}]\n  \
         listeners: [{{name: mesh, port: {port}, protocol: HBONE}}]\n",
        bed.gateway.ip()
    )
}

async fn a_service_in_another_network_is_reached_by_a_tunnel_inside_a_tunnel(bed: &Extensions) {
    let certificate = bed.credentials.certificate(GATEWAY);
    let gateway = Gateway::start(&bed.gateway, 15008, certificate, bed.credentials.trust(), &bed.east).await;
    bed.cluster.apply(&gateway_object(bed, EAST, "to-east", 15008, "gateway")).await.unwrap();
    bed.knows(0, "workloads", "to-east").await;
    let capture = bed.cluster.capture().await.unwrap();
    for ipv6 in [false, true] {
        let answer = bed.answer(&bed.client, bed.vip("east", ipv6), b"far in the east").await;
        assert_eq!(answer, b"far in the east", "IPv6: {ipv6}");
    }
    let captured = capture.stop().await.unwrap();
    assert!(captured.find(b"far in the east").is_empty(), "readable on the wire");
    let expected = format!("{} for east.shop.svc.cluster.local:80", bed.client.spiffe_id());
    let asked = gateway.asked.lock().clone();
    assert!(!asked.is_empty() && asked.iter().all(|asked| *asked == expected), "{asked:?}");
    let line = bed.logs[0].wait_for("the client's side", |l| {
        l["direction"] == "outbound"
            && l["dst.service"] == "east.shop.svc.cluster.local"
            && l["error"].is_null()
    });
    let line = line.await;
    assert_eq!(line["dst.identity"], bed.east.spiffe_id().as_str(), "the end, not the gateway: {line}");
    let line = bed.logs[2].wait_for("the server's side", |l| {
        l["direction"] == "inbound" && l["src.identity"] == bed.client.spiffe_id().as_str()
    });
    let line = line.await;
    assert_eq!(line["dst.hbone_addr"], "east.shop.svc.cluster.local:80", "{line}");
    assert_eq!(line["dst.workload"], "east", "{line}");
    assert_eq!(line["src.workload"], "client", "{line}");
    a_waypoint_leads_there_too(bed, &gateway).await;
}

/// A service behind a waypoint here, whose endpoints are all in the other network.
async fn a_waypoint_leads_there_too(bed: &Extensions, gateway: &Gateway) {
    let address = (bed.east.ip(), PORT + 2).into();
    let _running = apps::run(&bed.east, address, App::Http("east".to_owned())).await.unwrap();
    bed.cluster
        .apply(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: waypoint, namespace: shop}\n\
             spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n---\n\
             apiVersion: v1\nkind: Service\n\
             metadata: {name: east-http, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}\n\
             spec: {selector: {app: east}, ports: [{name: http, port: 80, targetPort: 8082}]}\n",
        )
        .await
        .unwrap();
    let to = bed.vip("east-http", false);
    let asked = "spiffe://cluster.local/ns/shop/sa/waypoint for east-http.shop.svc.cluster.local:80";
    wait::for_ok("requests pass the waypoint into the other network", wait::SOON * 2, || async {
        let mut stream =
            bed.client.connect_within(to, wait::SOON).await.map_err(|error| error.to_string())?;
        apps::get(&mut stream).await.map_err(|error| error.to_string())?;
        let all = gateway.asked.lock().clone();
        if all.iter().any(|one| one == asked) { Ok(()) } else { Err(format!("{all:?}")) }
    })
    .await;
}

/// The same way with a gateway that is authentic, but somebody else: not one byte is sent.
async fn a_gateway_that_is_somebody_else_gets_nothing(bed: &Extensions) {
    let options = PodOptions::new("shop", "west").service_account("west").label("app", "west");
    let west = bed.cluster.pod(options.label(crate::NETWORK, "west").node(2)).await.unwrap();
    bed.cluster.apply(&crate::service("west")).await.unwrap();
    let impostor = bed.credentials.certificate("spiffe://cluster.local/ns/street/sa/impostor");
    let options = PodOptions::new("street", "impostor").service_account("impostor").node(1);
    let place = bed.cluster.pod(options).await.unwrap();
    let gateway = Gateway::start(&place, 15008, impostor, bed.credentials.trust(), &west).await;
    let object = gateway_object(bed, "west", "to-west", 15008, "gateway");
    let object = object.replace(&bed.gateway.ip().to_string(), &place.ip().to_string());
    bed.cluster.apply(&object).await.unwrap();
    bed.wait_captured(&west).await;
    bed.knows(0, "workloads", "to-west").await;
    bed.knows(0, "services", "west-pods").await;
    let vip = bed.vip("west", false);
    let answer = attempt(&bed.client, vip, b"to the impostor").await;
    assert!(answer.is_err(), "it was answered: {answer:?}");
    assert_eq!(*gateway.asked.lock(), Vec::<String>::new(), "it was asked");
    let line = bed.logs[0].wait_for("the refused gateway", |l| {
        l["dst.service"] == "west.shop.svc.cluster.local"
            && l["error"].as_str().is_some_and(|e| e.contains("impostor"))
    });
    let _line = line.await;
    bed.cluster.delete_pod(&west).await.unwrap();
    bed.cluster.delete_pod(&place).await.unwrap();
}

/// A PROXY v2 header as it was received (PROXY protocol specification, section 2.2).
struct Header {
    source: Vec<u8>,
    destination: Vec<u8>,
    port: u16,
    identity: String,
}

impl Header {
    async fn read(stream: &mut TcpStream) -> Self {
        let mut fixed = [0; 16];
        stream.read_exact(&mut fixed).await.unwrap();
        assert_eq!(&fixed[..12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(fixed[12], 0x21, "version 2, PROXY");
        let width = match fixed[13] {
            0x11 => 4,
            0x21 => 16,
            other => panic!("family {other:#x}"),
        };
        let mut rest = vec![0; u16::from_be_bytes([fixed[14], fixed[15]]).into()];
        stream.read_exact(&mut rest).await.unwrap();
        let (addresses, extra) = rest.split_at(2 * width + 4);
        assert_eq!(extra[0], 0xd0, "the TLV of the identity");
        assert_eq!(usize::from(u16::from_be_bytes([extra[1], extra[2]])), extra.len() - 3);
        Self {
            source: addresses[..width].to_vec(),
            destination: addresses[width..2 * width].to_vec(),
            port: u16::from_be_bytes([addresses[2 * width + 2], addresses[2 * width + 3]]),
            identity: String::from_utf8(extra[3..].to_vec()).unwrap(),
        }
    }
}

fn octets(pod: &Pod, ipv6: bool) -> Vec<u8> {
    match ip_of(pod, ipv6) {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

const TUNNEL: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  namespace: shop
  name: proxied
  annotations: {ambient.istio.io/waypoint-inbound-binding: PROXY/15088}
spec: {gatewayClassName: somebodys}
";

/// From another node and from the same one, over both families: the application learns who calls, and for what.
async fn an_application_that_asks_for_it_gets_a_proxy_header_with_the_clients_identity(bed: &Extensions) {
    bed.cluster.apply(TUNNEL).await.unwrap();
    let options = PodOptions::new("shop", "proxied").service_account("proxied").node(1);
    let server =
        bed.cluster.pod(options.label("gateway.networking.k8s.io/gateway-name", "proxied")).await.unwrap();
    bed.wait_captured(&server).await;
    bed.knows(0, "workloads", "15088").await;
    for (client, ipv6) in [(&bed.client, false), (&bed.gazer, false), (&bed.client, true), (&bed.gazer, true)]
    {
        let listener = server.listen((ip_of(&server, ipv6), 15088).into()).await.unwrap();
        let target = (ip_of(&server, ipv6), PORT).into();
        let mut stream = client.connect_within(target, wait::SOON).await.unwrap();
        stream.write_all(b"after the header").await.unwrap();
        let accepted = tokio::time::timeout(wait::SOON, listener.accept()).await.expect("a connection");
        let (mut accepted, _) = accepted.unwrap();
        let header = Header::read(&mut accepted).await;
        assert_eq!(header.source, octets(client, ipv6), "from {client}");
        assert_eq!(header.destination, octets(&server, ipv6));
        assert_eq!(header.port, PORT, "what was dialled, not where the header goes");
        assert_eq!(header.identity, client.spiffe_id());
        let mut payload = [0; 16];
        accepted.read_exact(&mut payload).await.unwrap();
        assert_eq!(&payload, b"after the header");
    }
    bed.cluster.delete_pod(&server).await.unwrap();
}

pub(crate) fn add(trials: &mut Trials<Extensions>) {
    add_trials!(
        trials, "networks":
        a_service_in_another_network_is_reached_by_a_tunnel_inside_a_tunnel,
        a_gateway_that_is_somebody_else_gets_nothing,
        an_application_that_asks_for_it_gets_a_proxy_header_with_the_clients_identity,
    );
}

//! UDP listeners: sessions of clients, their endpoints, their bounds and their end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ambit_local::{Metrics, Pod, PodOptions};
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::bed::Gateways;

/// The servers' port.
const PORT: u16 = 5353;
/// A datagram that is not answered within this time is lost, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long is waited for answers that must not, or need not come.
const SHORT: Duration = Duration::from_secs(1);

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("datagrams go by the example of the docs", async |bed| by_the_docs(bed).await);
    trials.add("a session keeps its endpoint while that is there", async |bed| sessions(bed).await);
    trials.add("sessions are bounded for each client and end idle", async |bed| bounded(bed).await);
    trials.add("policy decides about sessions, the open ones too", async |bed| denied(bed).await);
    trials.add("sessions go on while their gateway drains", async |bed| drained(bed).await);
}

/// Answers each datagram with its name, until it is dropped.
struct Echo {
    pod: Pod,
    serving: JoinHandle<()>,
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Echo {
    /// A server of `app` in the mesh on node 1.
    async fn start(bed: &Gateways, app: &str, name: &str) -> Echo {
        let options = PodOptions::new("edge", name).service_account(app).label("app", app).node(1);
        let pod = bed.cluster.pod(options).await.unwrap();
        let socket = pod.udp(SocketAddr::new(pod.ip().into(), PORT)).await.unwrap();
        let name = name.to_owned();
        let serving = tokio::spawn(async move {
            let mut buffer = vec![0; 65_535];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let answer = match &buffer[..length] {
                    b"whole" => vec![b'x'; 20_000],
                    _ => name.as_bytes().to_vec(),
                };
                drop(socket.send_to(&answer, from).await);
            }
        });
        Echo { pod, serving }
    }
}

async fn service(bed: &Gateways, app: &str) {
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {app}, namespace: edge}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{name: dns, port: 53, protocol: UDP, targetPort: {PORT}}}]}}\n"
    ))
    .await;
}

async fn route(bed: &Gateways, gateway: &str, backends: &str) {
    bed.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: UDPRoute\nmetadata: {{name: {gateway}, namespace: edge}}\n\
         spec: {{parentRefs: [{{name: {gateway}}}], rules: [{{backendRefs: {backends}}}]}}\n"
    ))
    .await;
}

/// A client that takes answers only from the address that it sends to.
async fn client(bed: &Gateways, at: SocketAddr) -> UdpSocket {
    let socket = bed.outside.udp((Ipv4Addr::UNSPECIFIED, 0).into()).await.unwrap();
    socket.connect(at).await.unwrap();
    socket
}

async fn ask(socket: &UdpSocket, question: &[u8]) -> io::Result<String> {
    ask_within(PATIENCE, socket, question).await
}

/// The same for a question that need not be answered.
async fn attempt(socket: &UdpSocket) -> io::Result<String> {
    ask_within(SHORT, socket, b"q").await
}

async fn ask_within(patience: Duration, socket: &UdpSocket, question: &[u8]) -> io::Result<String> {
    socket.send(question).await?;
    let mut buffer = vec![0; 65_535];
    let length = timeout(patience, socket.recv(&mut buffer)).await??;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

async fn metrics(bed: &Gateways, gateway: &str) -> Metrics {
    let pods = bed.cluster.pods_of("edge", "gateway.networking.k8s.io/gateway-name", gateway);
    bed.cluster.waypoint_metrics(&pods[0]).await.unwrap()
}

/// Waits until some client is answered.
async fn serves(bed: &Gateways, at: SocketAddr) {
    let answered = || async { attempt(&client(bed, at).await).await.is_ok() };
    wait::until("datagrams are answered", SOON, answered).await;
}

async fn by_the_docs(bed: &Gateways) {
    let page = include_str!("../../../docs/gateway.md");
    let (_, section) = page.split_once("## Send datagrams on").unwrap();
    let (_, rest) = section.split_once("```yaml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let _servers = [
        Echo::start(bed, "resolver", "resolver-0").await,
        Echo::start(bed, "resolver-next", "resolver-next-0").await,
    ];
    service(bed, "resolver").await;
    service(bed, "resolver-next").await;
    bed.apply(example).await;
    let at = SocketAddr::new(bed.reached("names").await, 53);
    serves(bed, at).await;
    let mut next = 0;
    for _ in 0..100 {
        next += usize::from(ask(&client(bed, at).await, b"q").await.unwrap() == "resolver-next-0");
    }
    assert!((1..=30).contains(&next), "{next} of 100 with a weight of 10 %");
    let large = client(bed, at).await;
    assert_eq!(ask(&large, b"whole").await.unwrap().len(), 20_000);
    let seen = metrics(bed, "names").await;
    assert!(seen.sum("ambit_gateway_udp_datagrams_total", &[("direction", "to_client")]) > 100.0);
    let opened = || async {
        let labels = [("request_protocol", "udp"), ("destination_workload", "resolver-0")];
        metrics(bed, "names").await.sum("istio_tcp_connections_closed_total", &labels) > 30.0
    };
    wait::until("sessions that are idle end", SOON, opened).await;
    let logs = bed.logs("names");
    let line =
        logs.iter().find(|line| line.contains("\tprotocol=\"udp\"")).expect("a line of the access log");
    for part in ["dst.workload=\"resolver", "bytes_sent=", "direction=\"inbound\""] {
        assert!(line.contains(part), "{line}");
    }
    // What leads nowhere is refused and counted.
    bed.set_listeners(
        "names",
        "[{name: dns, port: 53, protocol: UDP}, {name: alone, port: 54, protocol: UDP}]",
    )
    .await;
    let alone = client(bed, SocketAddr::new(at.ip(), 54)).await;
    let refused = || async {
        drop(attempt(&alone).await);
        metrics(bed, "names").await.sum("ambit_gateway_udp_refused_total", &[("reason", "route")]) > 0.0
    };
    wait::until("a listener without a route refuses", SOON, refused).await;
}

async fn sessions(bed: &Gateways) {
    let servers = [Echo::start(bed, "kept", "kept-0").await, Echo::start(bed, "kept", "kept-1").await];
    let other = Echo::start(bed, "moved", "moved-0").await;
    service(bed, "kept").await;
    service(bed, "moved").await;
    let at = bed.gateway("kept-gw", "[{name: dns, port: 53, protocol: UDP}]").await;
    let at = SocketAddr::new(at, 53);
    route(bed, "kept-gw", "[{name: kept, port: 53}]").await;
    serves(bed, at).await;
    let kept = client(bed, at).await;
    let first = ask(&kept, b"q").await.unwrap();
    for _ in 0..20 {
        assert_eq!(ask(&kept, b"q").await.unwrap(), first);
    }
    // Nothing listens there any more, and the kernel says so: the next datagrams go to the other endpoint.
    servers.iter().find(|server| server.pod.name() == first).expect("one of them").serving.abort();
    let moved = || async { attempt(&kept).await.is_ok_and(|answer| answer != first) };
    wait::until("the session fails over", SOON, moved).await;
    for _ in 0..20 {
        assert_ne!(ask(&client(bed, at).await, b"q").await.unwrap(), first);
    }
    assert!(metrics(bed, "kept-gw").await.sum("ambit_gateway_udp_unreachable_total", &[]) > 0.0);
    // A route that leads elsewhere ends the sessions.
    route(bed, "kept-gw", "[{name: moved, port: 53}]").await;
    let moved = || async { attempt(&kept).await.is_ok_and(|answer| answer == "moved-0") };
    wait::until("the session goes by the route that there is now", SOON, moved).await;
    drop((servers, other));
}

async fn bounded(bed: &Gateways) {
    let _server = Echo::start(bed, "bounded", "bounded-0").await;
    service(bed, "bounded").await;
    let at = bed.gateway("bounded-gw", "[{name: dns, port: 53, protocol: UDP}]").await;
    let at = SocketAddr::new(at, 53);
    route(bed, "bounded-gw", "[{name: bounded, port: 53}]").await;
    serves(bed, at).await;
    let open = || async { metrics(bed, "bounded-gw").await.sum("ambit_gateway_udp_sessions", &[]) };
    let idle = || async { open().await < 1.0 };
    wait::until("idle sessions end", SOON, idle).await;
    let clients: Vec<UdpSocket> = futures_util::future::join_all((0..300).map(|_| client(bed, at))).await;
    let asking = clients.iter().map(|client| ask_within(3 * SHORT, client, b"q"));
    let answered = futures_util::future::join_all(asking).await;
    let answered = answered.iter().filter(|answer| answer.is_ok()).count();
    // Half of the 400 of the bed; a burst may overflow the queue of a socket.
    assert!((50..=200).contains(&answered), "{answered} clients of one address were answered");
    let seen = metrics(bed, "bounded-gw").await;
    assert!(seen.sum("ambit_gateway_udp_refused_total", &[("reason", "client_share")]) > 0.0);
    // Another client finds room.
    let neighbour = bed.cluster.pod(PodOptions::new("outside", "neighbour").node(0)).await.unwrap();
    let socket = neighbour.udp((Ipv4Addr::UNSPECIFIED, 0).into()).await.unwrap();
    socket.connect(at).await.unwrap();
    assert_eq!(ask(&socket, b"q").await.unwrap(), "bounded-0");
    wait::until("idle sessions end", SOON, idle).await;
    assert!(ask(&clients[0], b"q").await.is_ok());
}

async fn denied(bed: &Gateways) {
    let _server = Echo::start(bed, "guarded", "guarded-0").await;
    service(bed, "guarded").await;
    let at = bed.gateway("guarded-gw", "[{name: dns, port: 53, protocol: UDP}]").await;
    let at = SocketAddr::new(at, 53);
    route(bed, "guarded-gw", "[{name: guarded, port: 53}]").await;
    serves(bed, at).await;
    let open = client(bed, at).await;
    let answered = || async { attempt(&open).await.is_ok() };
    wait::until("a session is open", SOON, answered).await;
    let outside = IpAddr::from(bed.outside.ip());
    bed.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: guarded, namespace: edge}}\n\
         spec: {{targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: guarded-gw}}], action: DENY, \
         rules: [{{from: [{{source: {{ipBlocks: ['{outside}']}}}}]}}]}}\n"
    ))
    .await;
    let silent = || async { attempt(&open).await.is_err() };
    wait::until("an open session is ended", SOON, silent).await;
    assert!(attempt(&client(bed, at).await).await.is_err());
    let seen = metrics(bed, "guarded-gw").await;
    assert!(seen.sum("ambit_gateway_udp_refused_total", &[("reason", "policy")]) > 0.0);
}

async fn drained(bed: &Gateways) {
    let _server = Echo::start(bed, "drained", "drained-0").await;
    service(bed, "drained").await;
    bed.gateway("drained-gw", "[{name: dns, port: 53, protocol: UDP}]").await;
    route(bed, "drained-gw", "[{name: drained, port: 53}]").await;
    let pods = bed.cluster.pods_of("edge", "gateway.networking.k8s.io/gateway-name", "drained-gw");
    // The pod itself: its Service stops leading there when it drains.
    let at = SocketAddr::new(pods[0].ip().into(), 53);
    serves(bed, at).await;
    let open = client(bed, at).await;
    assert!(ask(&open, b"q").await.is_ok());
    let process = pods[0].process(0).expect("the gateway's program");
    let ending = tokio::spawn(async move { process.terminate(Duration::from_secs(50)).await });
    let refused = || async {
        assert!(ask(&open, b"q").await.is_ok(), "the session goes on");
        attempt(&client(bed, at).await).await.is_err()
    };
    wait::until("a gateway that drains takes no new client", SOON, refused).await;
    for _ in 0..10 {
        assert!(ask(&open, b"q").await.is_ok(), "the session goes on");
    }
    // It is idle now, and the gateway need not wait for it.
    let ended = timeout(SOON, ending).await.expect("the gateway ends").unwrap().unwrap();
    assert!(ended.success(), "{ended}");
}

//! A cluster with one client and some servers behind a service, and what is asked of it.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_local::{Captured, Cluster, ClusterBuilder, Pod, PodOptions};
use ambit_tests::apps::{self, App, Running};
use ambit_tests::load::{Failure, Load, Shape, Tally};
use ambit_tests::wait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The servers' HTTP port, and the service's.
pub(crate) const HTTP: u16 = 8080;
/// The servers' echo port, and the service's.
pub(crate) const ECHO: u16 = 8081;
/// The namespace of the client and the servers.
pub(crate) const NAMESPACE: &str = "shop";
/// Where HBONE is listened for.
pub(crate) const HBONE: u16 = 15008;
/// How much of each program's log a failure shows, lines.
const LOG_TAIL: usize = 60;

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{name: http, port: 8080}, {name: echo, port: 8081}]}
";

/// The cluster, the client on its first node, and the servers.
pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    pub(crate) client: Pod,
    pub(crate) servers: Vec<Pod>,
    running: Vec<Running>,
}

impl Bed {
    /// Two nodes, and one server a node that is named.
    pub(crate) async fn start(ambient: bool, servers: &[usize]) -> Self {
        Self::on(Cluster::builder().nodes(2), ambient, servers).await
    }

    /// The same with a cluster of one's own.
    pub(crate) async fn on(builder: ClusterBuilder, ambient: bool, servers: &[usize]) -> Self {
        let cluster = builder.ipv6(false).start().await.expect("root, ambit-control and ztunnel");
        cluster.namespace(NAMESPACE, ambient).await.unwrap();
        cluster.apply(SERVICE).await.unwrap();
        let client = PodOptions::new(NAMESPACE, "client").node(0).service_account("client");
        let client = cluster.pod(client).await.unwrap();
        let mut bed = Self { cluster, client, servers: Vec::new(), running: Vec::new() };
        for node in servers {
            let server = bed.server(&format!("web-{}", bed.servers.len()), *node).await;
            bed.serve(&server).await;
            bed.servers.push(server);
        }
        bed.all_known().await;
        bed
    }

    /// A pod behind the service in which nothing listens yet.
    pub(crate) async fn server(&self, name: &str, node: usize) -> Pod {
        let options = PodOptions::new(NAMESPACE, name).node(node).service_account("web").label("app", "web");
        self.cluster.pod(options).await.unwrap()
    }

    /// Runs the servers' applications in a pod, for as long as the bed lives.
    pub(crate) async fn serve(&mut self, pod: &Pod) {
        for (port, app) in [(HTTP, App::Http(pod.name().to_owned())), (ECHO, App::Echo)] {
            let running = apps::run(pod, SocketAddr::new(pod.ip().into(), port), app).await;
            self.running.push(running.expect("the ports of a new pod are free"));
        }
    }

    /// The service's address.
    pub(crate) fn vip(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.cluster.service_ips(NAMESPACE, "web")[0], port)
    }

    /// The client and the servers.
    pub(crate) fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.servers.iter().chain([&self.client])
    }

    /// Waits until every running node proxy knows all pods with their protocol.
    pub(crate) async fn all_known(&self) {
        for node in 0..self.cluster.nodes() {
            let ztunnel = self.cluster.ztunnel(node).unwrap();
            wait::until("every pod is known", wait::SOON, || async {
                let Ok(dump) = ztunnel.config_dump().await else { return false };
                let workloads = dump["workloads"].as_array().cloned().unwrap_or_default();
                let is_known = |pod: &Pod| {
                    let protocol = if pod.is_enrolled() { "HBONE" } else { "TCP" };
                    workloads.iter().any(|w| w["name"] == pod.name() && w["protocol"] == protocol)
                };
                let service = dump["services"].as_array().into_iter().flatten().find(|s| s["name"] == "web");
                let led = service.and_then(|s| s["endpoints"].as_object()).map_or(0, serde_json::Map::len);
                self.pods().all(is_known) && led == self.servers.len()
            })
            .await;
        }
    }

    /// The load from the client to the service.
    pub(crate) async fn load(&self) -> Load {
        Load::start(&self.client, self.vip(HTTP), &Shape::default()).await.expect("kept connections open")
    }

    /// An echo connection from the client that has answered once.
    pub(crate) async fn echo(&self, target: SocketAddr) -> TcpStream {
        let mut stream = self.client.connect_within(target, wait::SOON).await.unwrap();
        assert_eq!(ping(&mut stream, "hello").await.unwrap(), "hello");
        stream
    }

    /// A pod of an identity that was never seen before gets a certificate and an answer.
    pub(crate) async fn assert_a_late_pod_is_served(&self) {
        let late = PodOptions::new(NAMESPACE, "late").node(0).service_account("late");
        let late = self.cluster.pod(late).await.unwrap();
        let mut stream = late.connect_within(self.vip(ECHO), wait::SOON).await.unwrap();
        assert_eq!(ping(&mut stream, "late").await.unwrap(), "late");
    }

    /// Sum of a counter of the newest node proxy of a node.
    pub(crate) async fn count(&self, node: usize, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.cluster.ztunnel(node).unwrap().metrics().await.unwrap().sum(name, labels)
    }

    /// Connections with mutual TLS that the node proxy of a node has reported as their source.
    pub(crate) async fn tunnelled(&self, node: usize) -> f64 {
        let labels = [("reporter", "source"), ("connection_security_policy", "mutual_tls")];
        self.count(node, "istio_tcp_connections_opened_total", &labels).await
    }

    /// Ends the cluster after it was seen that the load had only the failures that are allowed.
    pub(crate) async fn end(self, tally: &Tally, allowed: impl Fn(&Failure) -> bool) {
        assert!(tally.new_answered > 100 && tally.kept_answered > 100, "the load did not run: {tally:?}");
        let failures = tally.not_allowed(allowed);
        if !failures.is_empty() {
            self.print_logs();
        }
        self.shutdown().await;
        assert!(
            failures.is_empty(),
            "{} + {} of {} + {} failed: {failures:#?}",
            tally.new_failed,
            tally.kept_failed,
            tally.new_answered,
            tally.kept_answered
        );
    }

    /// Shows the ends of all logs.
    pub(crate) fn print_logs(&self) {
        for (name, lines) in self.cluster.mesh_logs() {
            eprintln!("== {name}");
            let tail = lines.len().saturating_sub(LOG_TAIL);
            lines.iter().skip(tail).for_each(|line| eprintln!("{line}"));
        }
    }

    /// Ends the cluster.
    pub(crate) async fn shutdown(self) {
        let Self { cluster, client, servers, running } = self;
        drop((client, servers, running));
        cluster.shutdown().await;
    }

    /// What a capture saw of the client: own ports of connections in the clear to a server's applications (any
    /// address of theirs), and own ports of tunnels.
    pub(crate) fn seen(&self, captured: &Captured) -> Seen {
        assert_eq!(captured.dropped, 0, "the capture is complete");
        let mut seen = Seen::default();
        for packet in captured.packets.iter().filter(|packet| packet.tcp && !packet.payload.is_empty()) {
            if packet.source.ip() != self.client.ip() {
                continue;
            }
            match packet.destination.port() {
                HTTP | ECHO => seen.clear.push(packet.source),
                HBONE => seen.tunnels.push(packet.source),
                _ => {}
            }
        }
        for list in [&mut seen.clear, &mut seen.tunnels] {
            list.sort();
            list.dedup();
        }
        seen
    }
}

/// What a capture saw of a client, by its own addresses.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) clear: Vec<SocketAddr>,
    pub(crate) tunnels: Vec<SocketAddr>,
}

/// Sends text to an echo server and waits for it to come back, at most 15 s.
pub(crate) async fn ping(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
    let exchange = async {
        stream.write_all(text.as_bytes()).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    within(exchange).await
}

/// Gives up after 15 s.
pub(crate) async fn within<T>(work: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let late = |_| std::io::Error::new(std::io::ErrorKind::TimedOut, "no end within 15 s");
    tokio::time::timeout(wait::SOON, work).await.map_err(late)?
}

/// Waits until a connection is ended by the other side, at most `limit`.
pub(crate) async fn until_ended(stream: &mut TcpStream, limit: Duration) {
    let mut rest = Vec::new();
    // A reset is an end too.
    let read = tokio::time::timeout(limit, stream.read_to_end(&mut rest)).await;
    read.expect("the connection is ended").ok();
    assert!(rest.is_empty(), "nothing was asked, yet there came {rest:?}");
}

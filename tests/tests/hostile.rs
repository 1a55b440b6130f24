//! Malicious input at the tunnel port of a captured pod, at the control plane, at the agent's socket and in manifests. Each is
//! refused, counted and logged; all other clients are served as before.
//!
//! All tests share one cluster and run in parallel. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

#[path = "hostile/control.rs"]
mod control;
#[path = "hostile/crowd.rs"]
mod crowd;
#[path = "hostile/floods.rs"]
mod floods;
#[path = "hostile/node.rs"]
mod node;
#[path = "hostile/peers.rs"]
mod peers;
#[path = "hostile/requests.rs"]
mod requests;
#[path = "hostile/resolvers.rs"]
mod resolvers;

use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ambit_identity::unnamed_server;
use ambit_local::{Cluster, Pod, PodOptions, SYSTEM_NAMESPACE};
use ambit_tests::access::AccessLog;
use ambit_tests::apps::{self, App, Running, exchange};
use ambit_tests::beds::{Bed, Trials};
use ambit_tests::credentials::Credentials;
use ambit_tests::wait;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The application's port on every captured pod.
const PORT: u16 = 8080;
/// The tunnel port.
const HBONE: u16 = 15008;
/// The cluster's own resolver.
const CLUSTER_DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)), 53);
/// One of the resolvers that node proxies ask. Tests make it misbehave.
const RESOLVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 244, 1, 200)), 53);
/// An identity that no policy denies.
const FRIEND: &str = "spiffe://cluster.local/ns/shop/sa/friend";
/// An identity that the policy of the bed denies.
const ENEMY: &str = "spiffe://cluster.local/ns/shop/sa/enemy";
/// Counts failed connections.
const FAILED: &str = "istio_tcp_connections_failed_total";

/// Two nodes; the server and its neighbour on the second, a client on the first, a stranger outside the mesh.
struct Hostile {
    cluster: Cluster,
    credentials: Credentials,
    server: Pod,
    other: Pod,
    client: Pod,
    stranger: Pod,
    log: AccessLog,
    /// A source of objects of the control plane that tests write files to.
    manifests: PathBuf,
    _directory: tempfile::TempDir,
    _running: Vec<Running>,
}

impl Bed for Hostile {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let manifests = directory.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        let crl_file = directory.path().join("crl.pem");
        let logs = [0, 1].map(|node| AccessLog::of(directory.path(), node));
        let resolvers = [CLUSTER_DNS, RESOLVER].map(|resolver| resolver.to_string());
        let mut builder = Cluster::builder()
            .nodes(2)
            .ztunnel_config("crlFile", crl_file.display().to_string())
            .ztunnel_config("dns", json!({ "upstreams": resolvers }))
            .ztunnel_config("socks5", true);
        for (node, log) in logs.iter().enumerate() {
            builder = builder.ztunnel_config_of(node, "accessLog", log.config());
        }
        let source = format!("dir:{}", manifests.display());
        let cluster = builder.control_arg("--source").control_arg(source).start().await?;
        let credentials = Credentials::of(&cluster, &crl_file).await;
        cluster.namespace("shop", true).await?;
        cluster.namespace("street", false).await?;
        let pod = async |namespace: &str, name: &str, node| {
            let options =
                PodOptions::new(namespace, name).service_account(name).label("app", name).node(node);
            cluster.pod(options).await
        };
        let (server, other) = (pod("shop", "server", 1).await?, pod("shop", "other", 1).await?);
        let (client, stranger) = (pod("shop", "client", 0).await?, pod("street", "stranger", 0).await?);
        let mut running = Vec::new();
        for pod in [&server, &other] {
            for ip in pod.ips() {
                running.push(apps::run(pod, SocketAddr::new(ip, PORT), App::Echo).await?);
            }
        }
        cluster.apply(OBJECTS).await?;
        let [_, log] = logs;
        let bed = Self {
            cluster,
            credentials,
            server,
            other,
            client,
            stranger,
            log,
            manifests,
            _directory: directory,
            _running: running,
        };
        bed.wait_known().await;
        Ok(bed)
    }

    async fn stop(self) {
        self.cluster.shutdown().await;
    }
}

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: server}
spec: {ipFamilyPolicy: PreferDualStack, selector: {app: server}, ports: [{name: tcp, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: shop, name: other}
spec: {selector: {app: other}, ports: [{name: tcp, port: 80, targetPort: 8080}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: no-enemies}
spec:
  selector: {matchLabels: {app: server}}
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/enemy]}}]}]
";

impl Hostile {
    /// Waits until the server's node knows what the tests are about.
    async fn wait_known(&self) {
        let ztunnel = self.cluster.ztunnel(1).unwrap();
        wait::until("the server's node has all objects", wait::SOON, || async {
            let Ok(dump) = ztunnel.config_dump().await else { return false };
            let has = |key: &str, text: &str| dump[key].to_string().contains(text);
            has("policies", "no-enemies")
                && has("services", "server.shop.svc")
                && has("services", "other.shop.svc")
                && has("workloads", "stranger")
        })
        .await;
    }

    /// The server's tunnel port.
    fn tunnel_port(&self) -> SocketAddr {
        SocketAddr::new(self.server.ip().into(), HBONE)
    }

    /// The server's application.
    fn application(&self) -> SocketAddr {
        SocketAddr::new(self.server.ip().into(), PORT)
    }

    /// The server's virtual address.
    fn vip(&self) -> IpAddr {
        self.cluster.service_ips("shop", "server")[0]
    }

    /// A TLS handshake with the server's tunnel port, from outside of the mesh. The server is authenticated in the handshake;
    /// its verdict on our certificate comes afterwards.
    async fn approach(&self, tls: Arc<rustls::ClientConfig>) -> (SocketAddr, TlsStream<TcpStream>) {
        let stream = self.stranger.connect_within(self.tunnel_port(), wait::SOON).await.unwrap();
        let from = stream.local_addr().unwrap();
        let tls = TlsConnector::from(tls).connect(unnamed_server(), stream);
        (from, tokio::time::timeout(wait::SOON, tls).await.expect("a handshake in time").unwrap())
    }

    /// The access log's line of the connection from `source`.
    async fn logged(&self, source: SocketAddr) -> Value {
        let source = source.to_string();
        self.log.wait_for(&source, |line| line["src.addr"] == source.as_str()).await
    }

    /// How many connections of the server's node failed in this way.
    async fn failures(&self, flags: &str) -> f64 {
        let metrics = self.cluster.ztunnel(1).unwrap().metrics().await.unwrap();
        metrics.sum(FAILED, &[("response_flags", flags), ("reporter", "destination")])
    }

    /// Waits until the count of such failures exceeds `before`.
    async fn counted(&self, flags: &str, before: f64) {
        let what = format!("a failure with {flags} is counted");
        wait::until(&what, wait::SOON, || async { self.failures(flags).await > before }).await;
    }

    /// Asserts that other clients are served as before and that no program of the mesh has ended.
    async fn goes_on(&self) {
        for target in [self.application(), SocketAddr::new(self.vip(), 80)] {
            let mut stream = self.client.connect_within(target, wait::SOON).await.unwrap();
            let answer = tokio::time::timeout(wait::SOON, exchange(&mut stream, b"as before")).await;
            assert_eq!(answer.expect("an answer in time").unwrap(), b"as before");
        }
        assert_eq!(self.cluster.program_troubles(), Vec::<String>::new());
    }

    /// A node proxy's service account token, as if of a pod on `node`.
    fn node_proxy(&self, node: usize) -> ambit_local::token::Subject {
        let ztunnel = self.cluster.ztunnel(node).unwrap();
        ambit_local::token::Subject {
            namespace: SYSTEM_NAMESPACE.to_owned(),
            service_account: "ztunnel".to_owned(),
            pod: Some((ztunnel.pod().name().to_owned(), ztunnel.pod().uid().to_owned())),
            node: Some(ztunnel.pod().node_name().to_owned()),
        }
    }
}

fn main() -> ExitCode {
    let mut trials = Trials::new();
    peers::add(&mut trials);
    requests::add(&mut trials);
    floods::add(&mut trials);
    resolvers::add(&mut trials);
    crowd::add(&mut trials);
    control::add(&mut trials);
    node::add(&mut trials);
    trials.run()
}

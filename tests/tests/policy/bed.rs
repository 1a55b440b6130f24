//! Two clients in the mesh, one outside, a server on each node, and what is asked of their connections.

use std::io;
use std::net::SocketAddr;

use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::apps::{self, App, Running};
use ambit_tests::wait::{self, SOON};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The servers' ports.
pub(crate) const PORTS: [u16; 2] = [8080, 8081];

/// A client and where it goes.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    client: Pod,
    server: SocketAddr,
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.client, self.server)
    }
}

/// An open connection to an echo.
pub(crate) struct Line {
    route: Route,
    stream: TcpStream,
}

impl Line {
    pub(crate) async fn open(route: &Route) -> io::Result<Self> {
        let stream = route.client.connect_within(route.server, SOON).await?;
        stream.set_nodelay(true)?;
        let mut line = Self { route: route.clone(), stream };
        line.say().await?;
        Ok(line)
    }

    /// One word there and back.
    async fn say(&mut self) -> io::Result<()> {
        let exchange = async {
            self.stream.write_all(b"word").await?;
            let mut back = [0; 4];
            self.stream.read_exact(&mut back).await?;
            if &back == b"word" { Ok(()) } else { Err(io::Error::other(format!("{back:?} came back"))) }
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no echo");
        tokio::time::timeout(SOON, exchange).await.map_err(late)?
    }

    async fn must_work(&mut self) {
        let said = self.say().await;
        said.unwrap_or_else(|error| panic!("the open connection of {} was to stay: {error}", self.route));
    }

    /// The client says nothing: the end has to come to it.
    async fn must_close(mut self) {
        let mut byte = [0; 1];
        let read = tokio::time::timeout(SOON, self.stream.read(&mut byte)).await;
        match read {
            Ok(Ok(0)) => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {}
            other => panic!("the open connection of {} was to be closed: {other:?}", self.route),
        }
    }
}

pub(crate) async fn open(routes: &[Route]) -> Vec<Line> {
    let mut lines = Vec::new();
    for route in routes {
        let line = wait::for_ok(&format!("{route} opens"), SOON, || Line::open(route)).await;
        lines.push(line);
    }
    lines
}

/// All can be opened now.
pub(crate) async fn must_open(routes: &[Route]) {
    for route in routes {
        let opened = Line::open(route).await;
        drop(opened.unwrap_or_else(|error| panic!("{route} was to open: {error}")));
    }
}

/// None can be opened now, and each attempt fails at once.
pub(crate) async fn must_be_refused(routes: &[Route]) {
    for route in routes {
        match Line::open(route).await {
            Ok(_) => panic!("{route} was to be refused"),
            Err(error) => assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{route}: {error}"),
        }
    }
}

pub(crate) async fn must_work(lines: &mut [Line]) {
    for line in lines {
        line.must_work().await;
    }
}

pub(crate) async fn must_close(lines: Vec<Line>) {
    for line in lines {
        line.must_close().await;
    }
}

pub(crate) struct Bed {
    pub(crate) cluster: Cluster,
    /// In the mesh, in namespace `east`, as `alice`.
    pub(crate) alice: Pod,
    /// In the mesh, in namespace `west`, as `bob`.
    pub(crate) bob: Pod,
    /// Outside the mesh.
    pub(crate) stranger: Pod,
    /// In the mesh, in namespace `shop`, as `server`: on the clients' node and on the other one.
    pub(crate) servers: [Pod; 2],
    _running: Vec<Running>,
}

impl Bed {
    pub(crate) async fn start() -> Self {
        let cluster = Cluster::builder().nodes(2).start().await.expect("a cluster needs root and starts");
        for (namespace, ambient) in [("east", true), ("west", true), ("shop", true), ("outside", false)] {
            cluster.namespace(namespace, ambient).await.unwrap();
        }
        let pod = async |namespace: &str, name: &str, node| {
            let options =
                PodOptions::new(namespace, name).service_account(name).node(node).label("app", name);
            cluster.pod(options).await.expect("a pod")
        };
        let (alice, bob) = (pod("east", "alice", 0).await, pod("west", "bob", 0).await);
        let stranger = pod("outside", "stranger", 0).await;
        let servers = [pod("shop", "near", 0).await, pod("shop", "far", 1).await];
        let mut running = Vec::new();
        for server in &servers {
            for ip in server.ips() {
                for port in PORTS {
                    running.push(apps::run(server, SocketAddr::new(ip, port), App::Echo).await.unwrap());
                }
            }
        }
        let bed = Self { cluster, alice, bob, stranger, servers, _running: running };
        bed.know_each_other().await;
        bed
    }

    /// Waits until the clients' proxy knows that the servers are captured. Before, connections to them are plaintext.
    async fn know_each_other(&self) {
        let ztunnel = self.cluster.ztunnel(0).unwrap();
        wait::until("the servers are known", SOON, || async {
            let Ok(dump) = ztunnel.config_dump().await else { return false };
            let is_known = |pod: &Pod| {
                let workloads = dump["workloads"].as_array();
                workloads.is_some_and(|all| {
                    all.iter().any(|w| w["name"] == pod.name() && w["protocol"] == "HBONE")
                })
            };
            self.servers.iter().all(is_known)
        })
        .await;
    }

    /// From a client to both servers, over both families, on these ports.
    pub(crate) fn routes(&self, client: &Pod, ports: &[u16]) -> Vec<Route> {
        self.servers.iter().flat_map(|server| self.routes_to(client, server, ports)).collect()
    }

    pub(crate) fn routes_to(&self, client: &Pod, server: &Pod, ports: &[u16]) -> Vec<Route> {
        let addresses = server.ips().into_iter();
        addresses
            .flat_map(|ip| ports.iter().map(move |port| SocketAddr::new(ip, *port)))
            .map(|server| Route { client: client.clone(), server })
            .collect()
    }

    pub(crate) async fn apply(&self, yaml: &str) {
        self.cluster.apply(yaml).await.expect("a manifest that can be applied");
    }

    pub(crate) async fn delete(&self, kind: &str, namespace: &str, name: &str) {
        self.cluster.delete(kind, namespace, name).await.expect("it was applied");
    }

    pub(crate) async fn end(self) {
        assert!(self.cluster.program_troubles().is_empty(), "{:?}", self.cluster.program_troubles());
        self.cluster.shutdown().await;
    }

    /// Waits until both proxies hold a policy that `holds` is true of.
    pub(crate) async fn wait_policy(&self, name: &str, holds: impl Fn(&serde_json::Value) -> bool) {
        for node in 0..2 {
            let ztunnel = self.cluster.ztunnel(node).unwrap();
            wait::until(&format!("the proxy has the policy {name}"), SOON, || async {
                let Ok(dump) = ztunnel.config_dump().await else { return false };
                let policies = dump["policies"].as_array().cloned().unwrap_or_default();
                policies
                    .iter()
                    .any(|policy| policy["name"].as_str().is_some_and(|n| n.contains(name)) && holds(policy))
            })
            .await;
        }
    }
}

/// An AuthorizationPolicy in the servers' namespace; `spec` without its braces.
pub(crate) fn policy(name: &str, spec: &str) -> String {
    policy_in("shop", name, spec)
}

pub(crate) fn policy_in(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

pub(crate) fn authentication(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

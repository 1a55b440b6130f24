//! A cluster with a waypoint in namespace `shop`, a client there and one elsewhere, and servers that report what they get.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::beds::Bed;
use ambit_tests::wait::{self, SOON};
use parking_lot::Mutex;
use tokio::net::TcpStream;

use crate::http::{self, Answer, Server};

/// The servers' port.
pub(crate) const PORT: u16 = 8080;
/// That of servers inside TLS.
pub(crate) const TLS_PORT: u16 = 8443;
/// Says whose a waypoint's pod is.
pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

pub(crate) const WAYPOINT: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
    metadata: {name: waypoint, namespace: shop}\n\
    spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n";

pub(crate) struct Waypoints {
    pub(crate) cluster: Cluster,
    /// In the mesh, in namespace `shop`, on node 0.
    pub(crate) cli: Pod,
    /// In the mesh, in namespace `other`, on node 0.
    pub(crate) other: Pod,
    running: Mutex<Vec<Server>>,
    /// Has the settings of the mesh.
    _directory: tempfile::TempDir,
}

impl Bed for Waypoints {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let mesh_config = directory.path().join("mesh.yaml");
        let providers =
            [crate::external::MESH_CONFIG, crate::telemetry::PROVIDERS, crate::collector::PROVIDERS].concat();
        std::fs::write(&mesh_config, providers)?;
        let cluster = Cluster::builder()
            .control_arg(format!("--mesh-config={}", mesh_config.display()))
            .nodes(2)
            // The waypoint is on node 1: clients are on the other one before it comes.
            .node_label(0, "topology.kubernetes.io/region", "region-0")
            .node_label(1, "topology.kubernetes.io/region", "region-1")
            .waypoint_env("AMBIT_WAYPOINT_WORKERS", "2")
            // Servers outside the mesh are at addresses of nodes.
            .waypoint_env(
                "AMBIT_WAYPOINT_DYNAMIC_HOST_CIDRS",
                "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10",
            )
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_HEAD_TIMEOUT", "4s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_BODY_TIMEOUT", "4s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_AUTHORIZED_BODY_TIMEOUT", "3s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_IDLE_TIMEOUT", "6s")
            .waypoint_env("AMBIT_WAYPOINT_DRAIN_IDLE", "1s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_REQUESTS_PER_CONNECTION", &crate::limits::LAST.to_string())
            // A tunnel is in the log of the server's node when it has ended.
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_UPSTREAM_IDLE", "1s")
            .start()
            .await?;
        for (namespace, in_mesh) in [("shop", true), ("other", true), ("outside", false)] {
            cluster.namespace(namespace, in_mesh).await?;
        }
        let client = |namespace: &str, name: &str| {
            PodOptions::new(namespace, name).service_account(name).label("app", name).node(0)
        };
        let cli = cluster.pod(client("shop", "cli")).await?;
        let other = cluster.pod(client("other", "other")).await?;
        cluster.apply(WAYPOINT).await?;
        let bed = Self { cluster, cli, other, running: Mutex::default(), _directory: directory };
        let is_ready = async || bed.pods().iter().any(Pod::is_ready);
        bed.cluster.wait_until("the waypoint is ready", Duration::from_secs(30), is_ready).await.map_err(
            |error| {
                let logs: Vec<_> = bed.pods().iter().flat_map(Pod::logs).collect();
                format!("{error}: {logs:?} {:?}", bed.cluster.problems())
            },
        )?;
        Ok(bed)
    }

    async fn stop(self) {
        self.running.lock().clear();
        self.cluster.shutdown().await;
    }
}

impl Waypoints {
    /// The waypoint's pods.
    pub(crate) fn pods(&self) -> Vec<Pod> {
        self.cluster.pods_of("shop", GATEWAY_NAME, "waypoint")
    }

    /// A server on node 1 with a service of its name, port 80, bound to the waypoint.
    pub(crate) async fn service(&self, name: &str) -> SocketAddr {
        self.service_with(name, http::mirror()).await
    }

    /// The same with another answer.
    pub(crate) async fn service_with(&self, name: &str, answer: Answer) -> SocketAddr {
        self.server(name, name, answer).await;
        self.bind(name, "http").await
    }

    /// A pod that serves, selected by services of the name `app`.
    pub(crate) async fn server(&self, app: &str, name: &str, answer: Answer) -> Pod {
        let options = PodOptions::new("shop", name).service_account(app).label("app", app).node(1);
        self.serve(options, name, answer).await
    }

    /// A pod that serves inside TLS at [`TLS_PORT`], selected by services of the name `app`.
    pub(crate) async fn tls_server(&self, app: &str, config: Arc<rustls::ServerConfig>) {
        let options = PodOptions::new("shop", app).service_account(app).label("app", app).node(1);
        let pod = self.cluster.pod(options).await.expect("a pod");
        self.keep_tls(&pod, SocketAddr::new(pod.ip().into(), TLS_PORT), app, config).await;
    }

    /// A server inside TLS outside the mesh, at an address of node 1.
    pub(crate) async fn tls_outside(
        &self,
        port: u16,
        name: &str,
        config: Arc<rustls::ServerConfig>,
    ) -> IpAddr {
        let pod = self.host_pod(name).await;
        let address = self.node_address();
        self.keep_tls(&pod, SocketAddr::new(address, port), name, config).await;
        address
    }

    /// A server outside the mesh, at an address of node 1.
    pub(crate) async fn outside(&self, port: u16, name: &str, answer: Answer) {
        let pod = self.host_pod(name).await;
        let at = SocketAddr::new(self.node_address(), port);
        let server = http::serve(&pod, at, name, answer).await.expect("a free port");
        self.running.lock().push(server);
    }

    async fn host_pod(&self, name: &str) -> Pod {
        let options = PodOptions::new("outside", name).host_network().node(1);
        self.cluster.pod(options).await.expect("a pod")
    }

    /// Where servers outside the mesh are.
    pub(crate) fn node_address(&self) -> IpAddr {
        self.cluster.node_addresses(1).expect("node 1").v4.into()
    }

    async fn keep_tls(&self, pod: &Pod, at: SocketAddr, name: &str, config: Arc<rustls::ServerConfig>) {
        let server = http::serve_tls(pod, at, name, http::mirror(), config).await.expect("a free port");
        self.running.lock().push(server);
    }

    async fn serve(&self, options: PodOptions, name: &str, answer: Answer) -> Pod {
        let pod = self.cluster.pod(options).await.expect("a pod");
        let address = SocketAddr::new(pod.ip().into(), PORT);
        let server = http::serve(&pod, address, name, answer).await.expect("a free port");
        self.running.lock().push(server);
        pod
    }

    /// A pod `<app>-<version>` that serves on a node, labelled with its version.
    pub(crate) async fn version(&self, app: &str, version: &str, node: usize, answer: Answer) -> Pod {
        let name = format!("{app}-{version}");
        let options = PodOptions::new("shop", &name).service_account(app).label("app", app).node(node);
        self.serve(options.label("version", version), &name, answer).await
    }

    /// A pod that serves connections by hand, selected by services of its name.
    pub(crate) async fn by_hand<F: Future<Output = std::io::Result<()>> + Send + 'static>(
        &self,
        name: &str,
        serve: impl Fn(TcpStream) -> F + Send + 'static,
    ) {
        let options = PodOptions::new("shop", name).service_account(name).label("app", name).node(1);
        let pod = self.cluster.pod(options).await.expect("a pod");
        let address = SocketAddr::new(pod.ip().into(), PORT);
        let server = http::accept(&pod, address, serve).await.expect("a free port");
        self.running.lock().push(server);
    }

    /// A service that is to be bound to the waypoint; its port 80 has this name.
    pub(crate) async fn expose(&self, name: &str, port: &str) -> SocketAddr {
        self.apply(&format!(
            "apiVersion: v1\nkind: Service\n\
             metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{name: {port}, port: 80, targetPort: {PORT}}}]}}\n"
        ))
        .await;
        let vips = self.cluster.service_ips("shop", name);
        let vip = vips.into_iter().find(IpAddr::is_ipv4).expect("a virtual address");
        SocketAddr::new(vip, 80)
    }

    /// A service bound to the waypoint; its port 80 has this name.
    pub(crate) async fn bind(&self, name: &str, port: &str) -> SocketAddr {
        let to = self.expose(name, port).await;
        // Through the waypoint: it names the client.
        wait::until("the service is bound", SOON, || async {
            http::get(&self.cli, to, "/", "").await.is_ok_and(|answer| {
                answer.status == 200 && answer.sent("x-forwarded-for").is_some() || answer.status == 503
            })
        })
        .await;
        to
    }

    pub(crate) async fn apply(&self, yaml: &str) {
        self.cluster.apply(yaml).await.expect("manifests that can be applied");
    }

    /// An HTTPRoute of a service with these rules, in force.
    pub(crate) async fn route(&self, service: &str, rules: &str) {
        self.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
             metadata: {{name: {service}, namespace: shop}}\n\
             spec:\n  parentRefs: [{{group: '', kind: Service, name: {service}, port: 80}}]\n  rules:\n{rules}"
        ))
        .await;
    }

    /// Asks until the answer is as wanted.
    pub(crate) async fn eventually(
        &self,
        to: SocketAddr,
        path: &str,
        headers: &str,
        wanted: impl Fn(&http::Response) -> bool,
    ) -> http::Response {
        let last = Mutex::new(None);
        let asking = async {
            loop {
                match http::get(&self.cli, to, path, headers).await {
                    Ok(answer) if wanted(&answer) => return answer,
                    other => *last.lock() = Some(other),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(SOON, asking).await {
            Ok(answer) => answer,
            Err(_) => panic!("the last answer to {path}: {:?}\nwaypoint: {:?}", last.lock(), self.logs()),
        }
    }

    /// What the waypoint has written.
    pub(crate) fn logs(&self) -> Vec<String> {
        self.pods().iter().flat_map(Pod::logs).collect()
    }

    /// The waypoint's connections to an application's pods, as its admin server shows them.
    pub(crate) async fn connections_to(&self, app: &str) -> u64 {
        let pod = self.pods().into_iter().find(Pod::is_ready).expect("a waypoint");
        let to = SocketAddr::from(([127, 0, 0, 1], 15000));
        let dump = http::get(&pod, to, "/config_dump", "").await.expect("a dump").body;
        let dump: serde_json::Value = serde_json::from_str(&dump).expect("JSON");
        let pools = dump["pools"].as_array().expect("pools").iter();
        let is_its =
            |pool: &&serde_json::Value| pool["workload"].as_str().is_some_and(|uid| uid.contains(app));
        pools.filter(is_its).filter_map(|pool| Some(pool["used"].as_u64()? + pool["idle"].as_u64()?)).sum()
    }

    /// A section of the waypoint's `/config_dump`.
    pub(crate) async fn dump(&self, section: &str) -> serde_json::Value {
        let pod = self.pods().into_iter().find(Pod::is_ready).expect("a waypoint");
        let to = SocketAddr::from(([127, 0, 0, 1], 15000));
        let dump = http::get(&pod, to, "/config_dump", "").await.expect("a dump").body;
        let mut dump: serde_json::Value = serde_json::from_str(&dump).expect("JSON");
        dump[section].take()
    }

    /// A scrape of the waypoint's metrics.
    pub(crate) async fn metrics(&self) -> String {
        let pod = self.pods().into_iter().find(Pod::is_ready).expect("a waypoint");
        let to = SocketAddr::new(pod.ip().into(), 15020);
        http::get(&pod, to, "/metrics", "").await.expect("metrics").body
    }
}

//! A cluster with a client outside the mesh and, in namespace `edge`, which is in the mesh, gateways and services.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::beds::Bed;
use ambit_tests::http::{self, Answer, Response, Server};
use ambit_tests::wait::SOON;
use parking_lot::Mutex;

/// The servers' port.
const PORT: u16 = 8080;
/// Says whose a gateway's pod is.
pub(crate) const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

pub(crate) struct Gateways {
    pub(crate) cluster: Cluster,
    /// Outside the mesh, on node 0.
    pub(crate) outside: Pod,
    running: Mutex<Vec<Server>>,
}

impl Bed for Gateways {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let cluster = Cluster::builder()
            .nodes(2)
            .waypoint_env("AMBIT_WAYPOINT_WORKERS", "2")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_UPSTREAM_IDLE", "1s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_HEAD_TIMEOUT", "4s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_BODY_TIMEOUT", "4s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_HANDSHAKE_TIMEOUT", "4s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_WRITE_TIMEOUT", "4s")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_CONNECTIONS_PER_CLIENT", &crate::limits::OPEN.to_string())
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_PENDING_PER_CLIENT", &crate::limits::PENDING.to_string())
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_UDP_SESSIONS", "400")
            .waypoint_env("AMBIT_WAYPOINT_LIMITS_UDP_IDLE_TIMEOUT", "3s")
            .start()
            .await?;
        cluster.namespace("edge", true).await?;
        cluster.namespace("outside", false).await?;
        let outside = cluster.pod(PodOptions::new("outside", "client").node(0)).await?;
        Ok(Self { cluster, outside, running: Mutex::default() })
    }

    async fn stop(self) {
        self.running.lock().clear();
        self.cluster.shutdown().await;
    }
}

impl Gateways {
    /// A gateway with these listeners (a YAML list in one line), once its pod is ready; where it is reached.
    pub(crate) async fn gateway(&self, name: &str, listeners: &str) -> IpAddr {
        self.set_listeners(name, listeners).await;
        self.reached(name).await
    }

    pub(crate) async fn reached(&self, name: &str) -> IpAddr {
        let ready = async || self.cluster.pods_of("edge", GATEWAY_NAME, name).iter().any(Pod::is_ready);
        let waited = self.cluster.wait_until(name, Duration::from_secs(30), ready).await;
        waited.unwrap_or_else(|error| panic!("{error}: {:?} {:?}", self.logs(name), self.cluster.problems()));
        self.cluster.service_ips("edge", name).into_iter().find(IpAddr::is_ipv4).expect("an address")
    }

    /// A gateway with more than listeners in its `spec`, as [`Gateways::gateway`].
    pub(crate) async fn gateway_with(&self, name: &str, spec: &str) -> IpAddr {
        self.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: edge}}\n\
             spec:\n  gatewayClassName: ambit\n{spec}"
        ))
        .await;
        self.reached(name).await
    }

    pub(crate) async fn set_listeners(&self, name: &str, listeners: &str) {
        self.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: edge}}\n\
             spec: {{gatewayClassName: ambit, listeners: {listeners}}}\n"
        ))
        .await;
    }

    /// A server in the mesh on node 1, with a service of its name on port 80.
    pub(crate) async fn service(&self, name: &str) {
        self.service_with(name, http::mirror()).await;
    }

    /// The same with another answer.
    pub(crate) async fn service_with(&self, name: &str, answer: Answer) {
        let options = PodOptions::new("edge", name).service_account(name).label("app", name).node(1);
        let pod = self.cluster.pod(options).await.expect("a pod");
        let address = SocketAddr::new(pod.ip().into(), PORT);
        let server = http::serve(&pod, address, name, answer).await.expect("a free port");
        self.running.lock().push(server);
        self.apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: edge}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: {PORT}}}]}}\n"
        ))
        .await;
    }

    /// An HTTPRoute to a service of its name, with these parents and hosts (YAML lists in one line).
    pub(crate) async fn route(&self, name: &str, parents: &str, hosts: &str) {
        self.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: edge}}\n\
             spec: {{parentRefs: {parents}, hostnames: {hosts}, rules: [{{backendRefs: [{{name: {name}, port: 80}}]}}]}}\n"
        ))
        .await;
    }

    pub(crate) async fn apply(&self, yaml: &str) {
        self.cluster.apply(yaml).await.expect("manifests that can be applied");
    }

    /// Asks from outside the mesh until the answer is as wanted.
    pub(crate) async fn eventually(
        &self,
        to: SocketAddr,
        host: &str,
        wanted: impl Fn(&Response) -> bool,
    ) -> Response {
        let last = Mutex::new(None);
        let headers = format!("host: {host}\r\n");
        let asking = async {
            loop {
                match http::get(&self.outside, to, "/", &headers).await {
                    Ok(answer) if wanted(&answer) => return answer,
                    other => *last.lock() = Some(other),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(SOON, asking).await {
            Ok(answer) => answer,
            Err(_) => panic!("the last answer for {host} at {to}: {:?}", last.lock()),
        }
    }

    /// A gateway with a listener for HTTP on port 80 and with annotations (a YAML map in one line), as [`Gateways::gateway`].
    pub(crate) async fn annotated(&self, name: &str, annotations: &str) -> SocketAddr {
        self.apply(&format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
             metadata: {{name: {name}, namespace: edge, annotations: {annotations}}}\n\
             spec: {{gatewayClassName: ambit, listeners: [{{name: http, port: 80, protocol: HTTP}}]}}\n"
        ))
        .await;
        SocketAddr::new(self.reached(name).await, 80)
    }

    /// One scrape of the metrics of a gateway's only pod.
    pub(crate) async fn metric(&self, name: &str, series: &str) -> u64 {
        let pods = self.cluster.pods_of("edge", GATEWAY_NAME, name);
        let pod = pods.first().expect("a pod");
        let to = SocketAddr::new(pod.ip().into(), ambit_api::ports::METRICS);
        let scrape = http::get(&self.outside, to, "/metrics", "host: metrics\r\n").await.expect("an answer");
        http::metric(&scrape.body, series)
    }

    /// What a gateway's pods have written.
    pub(crate) fn logs(&self, name: &str) -> Vec<String> {
        self.cluster.pods_of("edge", GATEWAY_NAME, name).iter().flat_map(Pod::logs).collect()
    }
}

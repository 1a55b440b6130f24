//! Clients in the mesh and outside, servers that say their name, and what is asked of connections.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};

use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::apps::{self, App, Running, exchange};
use ambit_tests::beds::Bed;
use ambit_tests::wait::{self, SOON};
use parking_lot::Mutex;

/// The mesh's trust domain: not the one that policies call `cluster.local`.
pub(crate) const TRUST_DOMAIN: &str = "td.example";
/// The servers' port.
pub(crate) const PORT: u16 = 8080;
/// How often an answer is asked for where a wrong choice would be one of several.
const TIMES: usize = 10;

pub(crate) struct Cases {
    pub(crate) cluster: Cluster,
    /// In the mesh, in namespace `shop`, on node 0.
    pub(crate) cli: Pod,
    /// In the mesh, in namespace `third`, on node 0.
    pub(crate) third: Pod,
    /// Outside the mesh, in namespace `plain`, on node 0.
    pub(crate) out: Pod,
    /// In the network of node 1, where servers are no pods of their own address.
    host: Pod,
    running: Mutex<Vec<Running>>,
}

/// A server in the mesh, in namespace `shop` on node 1, with a service of its name.
pub(crate) struct Server {
    pub(crate) pod: Pod,
    /// The service's address and port 80, which lead to [`PORT`].
    pub(crate) vip: SocketAddr,
}

impl Bed for Cases {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let cluster = Cluster::builder().nodes(2).trust_domain(TRUST_DOMAIN).start().await?;
        for (namespace, ambient) in [("shop", true), ("third", true), ("plain", false)] {
            cluster.namespace(namespace, ambient).await?;
        }
        let client = |namespace: &str, name: &str| {
            PodOptions::new(namespace, name).service_account(name).label("app", name).node(0)
        };
        let cli = cluster.pod(client("shop", "cli")).await?;
        let third = cluster.pod(client("third", "third")).await?;
        let out = cluster.pod(client("plain", "out")).await?;
        let host = cluster.pod(PodOptions::new("plain", "host").node(1).host_network()).await?;
        Ok(Self { cluster, cli, third, out, host, running: Mutex::default() })
    }

    async fn stop(self) {
        self.cluster.shutdown().await;
    }
}

impl Cases {
    pub(crate) async fn server(&self, name: &str) -> Server {
        self.server_with(name, |options| options).await
    }

    pub(crate) async fn server_with(
        &self,
        name: &str,
        change: impl FnOnce(PodOptions) -> PodOptions,
    ) -> Server {
        let options = PodOptions::new("shop", name).service_account(name).label("app", name).node(1);
        let pod = self.cluster.pod(change(options)).await.expect("a pod");
        self.listen(&pod, pod.ip().into(), PORT, name).await;
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: {PORT}}}]}}\n"
        );
        self.apply(&service).await;
        self.knows(0, "workloads", |it| it["name"] == name && it["protocol"] == "HBONE").await;
        self.knows(0, "services", |it| it["hostname"] == format!("{name}.shop.svc.cluster.local")).await;
        let vips = self.cluster.service_ips("shop", name);
        let vip = vips.into_iter().find(IpAddr::is_ipv4).expect("a virtual address");
        Server { pod, vip: (vip, 80).into() }
    }

    /// A server at the address of node 1, outside the mesh.
    pub(crate) async fn outside(&self, port: u16, name: &str) -> IpAddr {
        let address = self.node_ip();
        self.listen(&self.host, address, port, name).await;
        address
    }

    pub(crate) fn node_ip(&self) -> IpAddr {
        self.cluster.node_addresses(1).unwrap().v4.into()
    }

    /// A server that greets with its name.
    pub(crate) async fn listen(&self, pod: &Pod, address: IpAddr, port: u16, name: &str) {
        let app = App::ServerFirst(name.to_owned());
        let running = apps::run(pod, SocketAddr::new(address, port), app).await.expect("a free port");
        self.running.lock().push(running);
    }

    pub(crate) async fn apply(&self, yaml: &str) {
        self.cluster.apply(yaml).await.expect("manifests that can be applied");
    }

    pub(crate) async fn delete(&self, kind: &str, namespace: &str, name: &str) {
        self.cluster.delete(kind, namespace, name).await.expect("it was applied");
    }

    /// Sets a server to STRICT, so that only connections with mutual TLS are answered.
    pub(crate) async fn strict(&self, name: &str) {
        self.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: {name}}}}}, mtls: {{mode: STRICT}}}}\n"
        ))
        .await;
        let listed = |it: &serde_json::Value| {
            it["name"] == name && it["authorizationPolicies"].to_string().contains("static_strict")
        };
        self.knows(1, "workloads", listed).await;
    }

    /// Waits until a node proxy holds something that `is_it` is true of.
    pub(crate) async fn knows(&self, node: usize, section: &str, is_it: impl Fn(&serde_json::Value) -> bool) {
        let ztunnel = self.cluster.ztunnel(node).unwrap();
        wait::until(&format!("node {node} has the object in {section}"), SOON, || async {
            let Ok(dump) = ztunnel.config_dump().await else { return false };
            dump[section].as_array().is_some_and(|all| all.iter().any(&is_it))
        })
        .await;
    }

    /// Waits until the log of the control plane has a line with the object and these words.
    pub(crate) async fn finding(&self, object: &str, words: &str) {
        let control = self.cluster.control().unwrap();
        let is_logged =
            || async { control.logs().iter().any(|line| line.contains(object) && line.contains(words)) };
        wait::until(&format!("a finding on {object}: {words}"), SOON, is_logged).await;
    }

    /// Every one of several connections gets an answer from `name`.
    pub(crate) async fn must_reach(&self, client: &Pod, target: SocketAddr, name: &str) {
        for n in 0..TIMES {
            let answer = answer(client, target).await;
            let answer =
                answer.unwrap_or_else(|error| panic!("{client} to {target}, connection {n}: {error}"));
            assert_eq!(answer, name, "{client} to {target}, connection {n}");
        }
    }

    /// Waits until a connection gets an answer from `name`. From then on every one must.
    pub(crate) async fn will_reach(&self, client: &Pod, target: SocketAddr, name: &str) {
        wait::until(&format!("{client} reaches {name} at {target}"), SOON, || async {
            answer(client, target).await.is_ok_and(|answer| answer == name)
        })
        .await;
        self.must_reach(client, target, name).await;
    }

    /// Waits until connections are refused.
    pub(crate) async fn will_be_refused(&self, client: &Pod, target: SocketAddr) {
        wait::until(&format!("{client} is refused at {target}"), SOON, || async {
            answer(client, target).await.is_err()
        })
        .await;
    }
}

/// The name of the server that answers.
pub(crate) async fn answer(client: &Pod, target: SocketAddr) -> std::io::Result<String> {
    let mut stream = client.connect_within(target, SOON).await?;
    let exchanged = tokio::time::timeout(SOON, exchange(&mut stream, b"word")).await;
    let answer = exchanged.expect("an answer or an end in time")?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let name = answer.strip_prefix("220 ").and_then(|rest| rest.strip_suffix("\r\nword"));
    name.map(str::to_owned).ok_or_else(|| std::io::Error::other(format!("{answer:?} came back")))
}

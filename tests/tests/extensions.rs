//! What goes beyond one tunnel between two pods: tunnels into the application and into other networks, SOCKS5, IPv6
//! alone, tunnels within a node, resources on demand, and the pods' DNS.
//!
//! All tests share one cluster of three nodes, each with a node proxy of its own configuration. Needs root; fails
//! without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

#[path = "extensions/dns.rs"]
mod dns;
#[path = "extensions/networks.rs"]
mod networks;
#[path = "extensions/ondemand.rs"]
mod ondemand;
#[path = "extensions/sockets.rs"]
mod sockets;

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::access::AccessLog;
use ambit_tests::apps::{self, App, Running, exchange};
use ambit_tests::beds::{Bed, Trials};
use ambit_tests::credentials::Credentials;
use ambit_tests::wait;
use serde_json::json;

/// The application's port on every server.
const PORT: u16 = 8080;
/// The services' port.
const SERVICE_PORT: u16 = 80;
/// Which network the third node is in; the others are in the one without a name.
const EAST: &str = "east";
/// Label of a pod, a namespace or a gateway that says which network it is in.
const NETWORK: &str = "topology.istio.io/network";

/// Node 0: SOCKS5, and tunnels within the node. Node 1: resources on demand. Node 2: another network.
struct Extensions {
    cluster: Cluster,
    credentials: Credentials,
    /// On node 0.
    client: Pod,
    /// On node 0.
    near: Pod,
    /// On node 1, behind the services `far` and `far-pods`.
    far: Pod,
    /// On node 1, whose proxy asks for what is dialled.
    gazer: Pod,
    /// On node 2, in the other network.
    east: Pod,
    /// On node 1, outside of the mesh, where the gateway into the other network listens.
    gateway: Pod,
    logs: [AccessLog; 3],
    _directory: tempfile::TempDir,
    _running: Vec<Running>,
}

impl Bed for Extensions {
    async fn start() -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let logs = [0, 1, 2].map(|node| AccessLog::of(directory.path(), node));
        let mut builder = Cluster::builder().nodes(3);
        for (node, log) in logs.iter().enumerate() {
            builder = builder.ztunnel_config_of(node, "accessLog", log.config());
        }
        let cluster = builder
            .ztunnel_config_of(0, "socks5", true)
            .ztunnel_config_of(0, "sameNode", "tunnel")
            .ztunnel_config_of(1, "xds", json!({ "onDemand": true }))
            .ztunnel_config_of(2, "network", EAST)
            .start()
            .await?;
        let credentials = Credentials::of(&cluster, &directory.path().join("crl.pem")).await;
        cluster.namespace("shop", true).await?;
        cluster.namespace("street", false).await?;
        let shop = |name: &str, node| {
            PodOptions::new("shop", name).service_account(name).label("app", name).node(node)
        };
        let client = cluster.pod(shop("client", 0)).await?;
        let near = cluster.pod(shop("near", 0)).await?;
        let far = cluster.pod(shop("far", 1)).await?;
        let gazer = cluster.pod(shop("gazer", 1)).await?;
        let east = cluster.pod(shop("east", 2).label(NETWORK, EAST)).await?;
        let gateway =
            cluster.pod(PodOptions::new("street", "gateway").service_account("gateway").node(1)).await?;
        let mut running = Vec::new();
        for (pod, app) in [(&near, App::Echo), (&far, App::WhoAmI), (&east, App::Echo)] {
            for ip in pod.ips() {
                running.push(apps::run(pod, SocketAddr::new(ip, PORT), app.clone()).await?);
                running.push(apps::run(pod, SocketAddr::new(ip, PORT + 1), App::Echo).await?);
            }
        }
        for name in ["near", "far", "east"] {
            cluster.apply(&service(name)).await?;
        }
        let bed = Self {
            cluster,
            credentials,
            client,
            near,
            far,
            gazer,
            east,
            gateway,
            logs,
            _directory: directory,
            _running: running,
        };
        bed.knows(0, "services", "east-pods.shop").await;
        for pod in [&bed.client, &bed.near, &bed.far, &bed.gazer, &bed.east] {
            bed.wait_captured(pod).await;
        }
        Ok(bed)
    }

    async fn stop(self) {
        self.cluster.shutdown().await;
    }
}

/// A service with virtual addresses and a headless one for the pods of a name.
fn service(name: &str) -> String {
    let head = format!("apiVersion: v1\nkind: Service\nmetadata: {{namespace: shop, name: {name}");
    let spec = format!("ipFamilyPolicy: PreferDualStack, selector: {{app: {name}}}");
    format!(
        "{head}}}\nspec: {{{spec}, ports: [{{name: tcp, port: 80, targetPort: 8080}}, {{name: echo, port: 81, targetPort: 8081}}]}}\n---\n\
         {head}-pods}}\nspec: {{clusterIP: None, {spec}, ports: [{{name: tcp, port: 8080}}]}}\n"
    )
}

impl Extensions {
    /// Waits until a node proxy has something that its dump shows with `text`.
    async fn knows(&self, node: usize, section: &str, text: &str) {
        let ztunnel = self.cluster.ztunnel(node).unwrap();
        wait::until(&format!("node {node} knows {text}"), wait::SOON, || async {
            ztunnel.config_dump().await.is_ok_and(|dump| dump[section].to_string().contains(text))
        })
        .await;
    }

    /// Waits until the first node's proxy knows that a pod is captured. Before, connections to it are plaintext.
    async fn wait_captured(&self, pod: &Pod) {
        let ztunnel = self.cluster.ztunnel(0).unwrap();
        wait::until(&format!("{pod} is known to be captured"), wait::SOON, || async {
            let Ok(dump) = ztunnel.config_dump().await else { return false };
            let workloads = dump["workloads"].as_array().cloned().unwrap_or_default();
            workloads.iter().any(|w| w["name"] == pod.name() && w["protocol"] == "HBONE")
        })
        .await;
    }

    /// A virtual address of a service in one family.
    fn vip(&self, service: &str, ipv6: bool) -> SocketAddr {
        let ips = self.cluster.service_ips("shop", service);
        SocketAddr::new(ips.into_iter().find(|ip| ip.is_ipv6() == ipv6).unwrap(), SERVICE_PORT)
    }

    /// What comes back from `target` when `from` says `words`.
    async fn answer(&self, from: &Pod, target: SocketAddr, words: &[u8]) -> Vec<u8> {
        attempt(from, target, words).await.unwrap()
    }
}

/// The same where it may be refused, which a program sees when it connects, or when it reads.
async fn attempt(from: &Pod, target: SocketAddr, words: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = from.connect_within(target, wait::SOON).await?;
    let answer = tokio::time::timeout(wait::SOON, exchange(&mut stream, words)).await;
    answer.expect("an answer or an end in time")
}

fn ip_of(pod: &Pod, ipv6: bool) -> IpAddr {
    pod.ips().into_iter().find(|ip| ip.is_ipv6() == ipv6).unwrap()
}

fn main() -> ExitCode {
    let mut trials = Trials::new();
    networks::add(&mut trials);
    sockets::add(&mut trials);
    ondemand::add(&mut trials);
    dns::add(&mut trials);
    trials.run()
}

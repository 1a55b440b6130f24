//! The cluster that is soaked: two nodes, a client on each, servers on both, and what events change.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ambit_local::{Cluster, Pod, PodOptions, Ztunnel};
use ambit_tests::apps::{self, App, Running};
use anyhow::{Context, Result};
use serde_json::json;

/// The namespace of most pods, in the mesh.
pub(crate) const MESH: &str = "soak";
/// The namespace that is labelled and unlabelled.
pub(crate) const MOVING: &str = "moving";
/// The namespace that never is in the mesh.
pub(crate) const OUTSIDE: &str = "outside";
/// Ports of the servers' applications, and of their services.
pub(crate) const HTTP: u16 = 8080;
/// Sends back what it gets.
pub(crate) const ECHO: u16 = 8081;
/// Greets first.
pub(crate) const GREETER: u16 = 8082;
/// The service port of the application that is rolled out.
pub(crate) const ROLLED: u16 = 80;
/// How long a proxy that is handed over from may go on with open connections. Clients open theirs again sooner.
pub(crate) const DRAIN: Duration = Duration::from_secs(180);
/// Lifetime of certificates, the shortest that is allowed: each is renewed twice a minute.
pub(crate) const LIFETIME: &str = "60s";
/// How long a new root is published before it signs, seconds.
pub(crate) const PROPAGATION: u64 = 15;
/// How long the first roll-out may take.
const ROLL_OUT: Duration = Duration::from_secs(60);

const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: soak}
spec: {selector: {app: web}, ports: [{name: http, port: 8080}, {name: echo, port: 8081}, {name: greeter, port: 8082}]}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: soak}
spec: {selector: {place: far}, ports: [{name: http, port: 8080}, {name: echo, port: 8081}, {name: greeter, port: 8082}]}
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: soak}
spec: {selector: {place: near}, ports: [{name: http, port: 8080}, {name: echo, port: 8081}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: soak}
spec: {clusterIP: None, selector: {app: web}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: moving}
spec: {selector: {app: web}, ports: [{name: http, port: 8080}]}
";

/// Pods of one namespace.
#[derive(Debug)]
pub(crate) struct Place {
    /// On the first node.
    pub(crate) client: Pod,
    /// On the second.
    pub(crate) server: Pod,
}

/// The cluster and its pods.
#[derive(Debug)]
pub(crate) struct Bed {
    /// The cluster.
    pub(crate) cluster: Cluster,
    /// Client on the first node.
    pub(crate) client: Pod,
    /// Client on the second node.
    pub(crate) other_client: Pod,
    /// Server on the first node.
    pub(crate) near: Pod,
    /// Server on the second node.
    pub(crate) far: Pod,
    /// Those of the namespace that comes and goes.
    pub(crate) moving: Place,
    /// A client without mesh, on the first node.
    pub(crate) outside: Pod,
    _running: Vec<Running>,
}

impl Bed {
    /// Brings everything up. `logs` is where the programs' output goes, if it is to be kept.
    ///
    /// # Errors
    /// Without root, or when a program is missing or does not become ready.
    pub(crate) async fn start(logs: Option<&Path>) -> Result<Self> {
        let mut builder = Cluster::builder()
            .nodes(2)
            .ztunnel_config("drainTimeout", format!("{}s", DRAIN.as_secs()))
            .ztunnel_config("certificates", json!({ "lifetime": LIFETIME }))
            .ztunnel_config("limits", json!({ "poolIdle": "15s" }))
            .control_arg("--root-propagation")
            .control_arg(format!("{PROPAGATION}s"));
        if let Some(logs) = logs {
            builder = builder.log_dir(logs);
        }
        let cluster = builder.start().await.context("root, ambit-control and ztunnel are needed")?;
        for (namespace, ambient) in [(MESH, true), (MOVING, false), (OUTSIDE, false)] {
            cluster.namespace(namespace, ambient).await?;
        }
        cluster.apply(SERVICES).await?;
        let server = |namespace, name: &str, node| {
            PodOptions::new(namespace, name).node(node).label("app", "web").label("place", name)
        };
        let client =
            |namespace, name, node| PodOptions::new(namespace, name).node(node).service_account(name);
        let near = cluster.pod(server(MESH, "near", 0)).await?;
        let far = cluster.pod(server(MESH, "far", 1)).await?;
        let moving = Place {
            client: cluster.pod(client(MOVING, "client", 0)).await?,
            server: cluster.pod(server(MOVING, "server", 1)).await?,
        };
        let mut running = Vec::new();
        for pod in [&near, &far, &moving.server] {
            running.append(&mut serve(pod).await?);
        }
        let bed = Self {
            client: cluster.pod(client(MESH, "client", 0)).await?,
            other_client: cluster.pod(client(MESH, "other-client", 1)).await?,
            outside: cluster.pod(client(OUTSIDE, "client", 0)).await?,
            near,
            far,
            moving,
            _running: running,
            cluster,
        };
        bed.cluster.set_dns_record("outside.example", vec![IpAddr::from([192, 0, 2, 1])]).await?;
        bed.roll_out(0).await?;
        bed.wait_served().await?;
        Ok(bed)
    }

    /// Waits until the node proxies know the endpoints of the application that is rolled out: a service that has
    /// none yet refuses.
    async fn wait_served(&self) -> Result<()> {
        let target = self.vip(MESH, "rolled", ROLLED, false)?;
        let answers = async || match self.client.connect(target).await {
            Ok(mut stream) => apps::get(&mut stream).await.is_ok(),
            Err(_) => false,
        };
        self.cluster.wait_until("an answer of the application that is rolled out", ROLL_OUT, answers).await?;
        Ok(())
    }

    /// Rolls out a generation of the application that is rolled out; returns once no pod of another is left.
    ///
    /// # Errors
    /// When it is not done in a minute.
    pub(crate) async fn roll_out(&self, generation: u64) -> Result<()> {
        self.cluster.apply(&deployment(generation)).await?;
        self.cluster.wait_ready(MESH, "rolled", ROLL_OUT).await?;
        let old = move |pod: &Pod| pod.view().terminating.is_some();
        let gone = async || !self.cluster.pods_of(MESH, "app", "rolled").iter().any(old);
        self.cluster.wait_until("the end of the old generation's pods", ROLL_OUT, gone).await?;
        Ok(())
    }

    /// A service's address in a family.
    ///
    /// # Errors
    /// When it has none.
    pub(crate) fn vip(&self, namespace: &str, service: &str, port: u16, ipv6: bool) -> Result<SocketAddr> {
        let ips = self.cluster.service_ips(namespace, service);
        let ip = ips.into_iter().find(|ip| ip.is_ipv6() == ipv6);
        let ip = ip.with_context(|| format!("service {service} of {namespace} has no such VIP"))?;
        Ok(SocketAddr::new(ip, port))
    }

    /// The newest node proxy of a node.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn ztunnel(&self, node: usize) -> Result<Ztunnel> {
        Ok(self.cluster.ztunnel(node)?)
    }
}

/// Runs the servers' applications at every address of a pod.
///
/// # Errors
/// When a port is taken.
pub(crate) async fn serve(pod: &Pod) -> Result<Vec<Running>> {
    let mut running = Vec::new();
    for ip in pod.ips() {
        let name = pod.name().to_owned();
        for (port, app) in
            [(HTTP, App::Http(name.clone())), (ECHO, App::Echo), (GREETER, App::ServerFirst(name.clone()))]
        {
            running.push(apps::run(pod, SocketAddr::new(ip, port), app).await?);
        }
    }
    Ok(running)
}

fn deployment(generation: u64) -> String {
    format!(
        "apiVersion: v1
kind: ServiceAccount
metadata: {{name: rolled, namespace: {MESH}}}
---
apiVersion: v1
kind: Service
metadata: {{name: rolled, namespace: {MESH}}}
spec: {{selector: {{app: rolled}}, ports: [{{name: http, port: {ROLLED}, targetPort: 9080}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: rolled, namespace: {MESH}}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: rolled}}}}
  template:
    metadata: {{labels: {{app: rolled}}}}
    spec:
      serviceAccountName: rolled
      containers:
        - name: ratings
          image: bookinfo
          args: [productpage]
          env: [{{name: GENERATION, value: \"{generation}\"}}]
          ports: [{{containerPort: 9080}}]
          readinessProbe: {{httpGet: {{path: /health, port: 9080}}, periodSeconds: 1}}
          lifecycle: {{preStop: {{sleep: {{seconds: 2}}}}}}
"
    )
}

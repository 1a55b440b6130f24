//! Gateways under steady load from outside the mesh: rolled, with listeners that come and go, and on nodes that are drained, lost and
//! booted again.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::{Apps, ROLLOUT};
use super::disruption::{NAMESPACE as OUTSIDE, expect_progress};
use super::mesh::set_mode;
use super::{Cases, Outcome};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// Where the gateway and its server are.
const NAMESPACE: &str = "edge";
/// The node of the client and the server. The other one is lost and comes back.
const HOME: &str = "n1";
/// That node's address.
const HOME_ADDRESS: &str = "172.30.0.11";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("a_gateway_loses_no_request_while_it_and_its_nodes_change", changes);
}

async fn changes(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, NAMESPACE, (HOME, HOME)).await?;
    set_mode(cluster, NAMESPACE, true).await?;
    kubectl.apply(&format!("{}---{ROUTE}", gateway(""))).await?;
    let url = format!("http://{HOME_ADDRESS}:{}/seen-in-the-clear", node_port(cluster, "80").await?);
    let replicas = ["deployment/edge", "--namespace", NAMESPACE];
    kubectl.rolled_out(NAMESPACE, replicas[0], ROLLOUT).await?;
    wait::until("the gateway serves", SOON, async || {
        let got = cluster.run_on(HOME, &["busybox", "wget", "-qO-", "-T", "5", &url]).await;
        match got.map_err(|error| error.to_string())? {
            ran if ran.code == 0 && ran.output.contains("server") => Ok(()),
            ran => Err(format!("{ran:?}")),
        }
    })
    .await?;
    kubectl.apply(&client(&url)).await?;
    step(cluster, "at first").await?;

    roll(cluster).await?;
    step(cluster, "after a restart").await?;

    // Another port, and another host on the same port.
    let more = "  - {name: more, port: 8081, protocol: HTTP}\n  - {name: host, port: 80, protocol: HTTP, hostname: other.example}\n";
    kubectl.apply(&gateway(more)).await?;
    node_port(cluster, "8081").await?;
    step(cluster, "with further listeners").await?;
    kubectl.apply(&gateway("")).await?;
    step(cluster, "without them").await?;

    let drain = ["drain", "n2", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=240s"];
    kubectl.run(&drain).await?;
    kubectl.rolled_out(NAMESPACE, replicas[0], ROLLOUT).await?;
    step(cluster, "with n2 drained").await?;
    cluster.crash("n2").await?;
    step(cluster, "with n2 lost").await?;
    cluster.boot("n2").await?;
    kubectl.run(&["uncordon", "n2"]).await?;
    for what in ["daemonset/ztunnel", "daemonset/ambit-node", "deployment/ambit-control"] {
        kubectl.rolled_out(mesh::NAMESPACE, what, SOON).await?;
    }
    step(cluster, "with n2 back").await?;
    // Its pods spread over both nodes again.
    roll(cluster).await?;
    step(cluster, "after another restart").await?;
    kubectl.run(&["delete", "namespace", OUTSIDE, "--wait"]).await?;
    Ok(apps.stop(cluster).await?)
}

/// Another thousand requests, of which none fails.
async fn step(cluster: &Cluster, when: &str) -> Outcome {
    Ok(expect_progress(cluster).await.map_err(|error| format!("{when}: {error}"))?)
}

/// Replaces the gateway's pods, and waits until the old ones have ended.
async fn roll(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    kubectl.run(&["rollout", "restart", "--namespace", NAMESPACE, "deployment/edge"]).await?;
    kubectl.rolled_out(NAMESPACE, "deployment/edge", ROLLOUT).await?;
    let pods =
        ["pods", "--namespace", NAMESPACE, "--selector", "gateway.networking.k8s.io/gateway-name=edge"];
    wait::until("the old pods have ended", SOON, async || {
        let pods = kubectl.list(&pods).await.map_err(|error| error.to_string())?;
        if pods.len() == 2 { Ok(()) } else { Err(format!("{} pods", pods.len())) }
    })
    .await?;
    Ok(())
}

/// The port of every node for a port of the gateway's Service, once there is one.
async fn node_port(cluster: &Cluster, port: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let service = ["service", "edge", "--namespace", NAMESPACE];
    let found = |service: &Value| {
        let ports = service["spec"]["ports"].as_array()?;
        ports.iter().find(|it| it["port"].to_string() == port)?["nodePort"].as_u64()
    };
    let service = cluster.kubectl().wait_for(SOON, &service, |service| found(service).is_some()).await?;
    Ok(found(&service).ok_or("no port")?)
}

/// The gateway with these listeners beside its first.
fn gateway(more: &str) -> String {
    format!(
        "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: edge, namespace: {NAMESPACE}, annotations: {{networking.istio.io/service-type: NodePort}}}}
spec:
  gatewayClassName: ambit
  listeners:
  - {{name: http, port: 80, protocol: HTTP}}
{more}"
    )
}

const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: server, namespace: edge}
spec:
  parentRefs: [{name: edge}]
  rules: [{backendRefs: [{name: server, port: 80}]}]
";

/// A client outside the mesh.
fn client(url: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: {OUTSIDE}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: client, namespace: {OUTSIDE}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: load, namespace: {OUTSIDE}}}
spec:
  serviceAccountName: client
  nodeName: {HOME}
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: load, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [load, "{url}"]}}
"#
    )
}

//! Waypoints: deployed for a Gateway, on the way of requests between nodes, rolled under load, and gone with the Gateway.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::{Apps, ROLLOUT};
use super::disruption::{LOAD, NAMESPACE, expect_progress};
use super::mesh::set_mode;
use super::{Cases, Outcome};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// The path that the route makes of every other.
const REWRITTEN: &str = "/through-the-waypoint";
/// Kinds of a waypoint's objects.
const PARTS: &str = "deployments,services,serviceaccounts,poddisruptionbudgets";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("a_waypoint_routes_requests_between_nodes", route);
    cases.add("a_waypoint_rolls_under_load_and_goes_with_its_gateway", roll);
}

/// Client and server on two nodes, in the mesh and behind a waypoint whose route rewrites paths.
async fn start(cluster: &Cluster, namespace: &'static str) -> Result<Apps, Box<dyn std::error::Error>> {
    let apps = Apps::start(cluster, namespace, ("n1", "n2")).await?;
    set_mode(cluster, namespace, true).await?;
    put_behind_waypoint(cluster, &apps).await?;
    Ok(apps)
}

/// Makes a waypoint and a route that rewrites paths, and waits until requests go through it.
pub(crate) async fn put_behind_waypoint(cluster: &Cluster, apps: &Apps) -> Outcome {
    let (kubectl, namespace) = (cluster.kubectl(), apps.namespace);
    kubectl.apply(&manifests(namespace)).await?;
    let serves = |gateway: &Value| {
        let conditions = gateway["status"]["conditions"].as_array().into_iter().flatten();
        let is_programmed = |c: &Value| c["type"] == "Programmed" && c["status"] == "True";
        conditions.into_iter().any(is_programmed) && gateway["status"]["addresses"][0]["value"].is_string()
    };
    kubectl.wait_for(ROLLOUT, &["gateway", "waypoint", "--namespace", namespace], serves).await?;
    kubectl.run(&["label", "namespace", namespace, "istio.io/use-waypoint=waypoint"]).await?;
    wait::until("requests go through the waypoint", SOON, async || match apps.request(cluster).await {
        Ok(answer) if answer.contains(REWRITTEN) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    Ok(())
}

async fn route(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = start(cluster, "routed").await?;
    // The server's proxy admits the waypoint's identity alone, and that is whom it sees.
    kubectl.apply(ONLY_THE_WAYPOINT).await?;
    let accepted = |policy: &Value| policy["status"]["conditions"][0]["status"] == "True";
    let policy = ["authorizationpolicy", "server", "--namespace", apps.namespace];
    kubectl.wait_for(SOON, &policy, accepted).await?;
    let answer = apps.request(cluster).await?;
    assert!(answer.contains(REWRITTEN), "{answer}");
    kubectl
        .run(&["label", "service", "server", "--namespace", apps.namespace, "istio.io/use-waypoint=none"])
        .await?;
    wait::until("requests past the waypoint are refused", SOON, async || match apps.request(cluster).await {
        Ok(answer) => Err(answer),
        Err(_) => Ok(()),
    })
    .await?;
    // It has counted the requests, under the names of client and server.
    let pods = [
        "pods",
        "--namespace",
        apps.namespace,
        "--selector",
        "gateway.networking.k8s.io/gateway-name=waypoint",
    ];
    let mut counted = String::new();
    for pod in kubectl.list(&pods).await? {
        let address = pod["status"]["podIP"].as_str().unwrap_or_default();
        let get = format!("busybox wget -qO- http://{address}:15020/metrics | grep '^istio_requests_total'");
        counted += &cluster.run_on("n1", &["sh", "-c", &get]).await?.output;
    }
    let is_counted = |line: &str| {
        ["reporter=\"waypoint\"", "ns/routed/sa/client", "response_code=\"200\""]
            .iter()
            .all(|part| line.contains(part))
    };
    assert!(counted.lines().any(is_counted), "{counted}");
    // The status of the route says that it is in force.
    let route = kubectl.get(&["httproute", "server", "--namespace", apps.namespace]).await?;
    let entry = &route["status"]["parents"][0];
    assert_eq!(entry["controllerName"], "ambit.dev/mesh-controller", "{route}");
    assert_eq!(entry["conditions"][0]["status"], "True", "{route}");
    // With the control plane's rights alone, a Deployment that is no waypoint's can't be changed.
    let account = format!("--as=system:serviceaccount:{}:ambit-control", mesh::NAMESPACE);
    let patch = r#"{"metadata": {"annotations": {"taken": "over"}}}"#;
    let args = [
        "patch",
        "deployment",
        "server",
        "--namespace",
        apps.namespace,
        "--type=merge",
        "--patch",
        patch,
        &account,
    ];
    let refused = kubectl.run(&args).await.expect_err("a foreign Deployment was changed").to_string();
    assert!(refused.contains("for Gateways only"), "{refused}");
    Ok(apps.stop(cluster).await?)
}

async fn roll(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = start(cluster, NAMESPACE).await?;
    kubectl.apply(LOAD).await?;
    expect_progress(cluster).await?;
    kubectl.run(&["rollout", "restart", "--namespace", NAMESPACE, "deployment/waypoint"]).await?;
    kubectl.rolled_out(NAMESPACE, "deployment/waypoint", ROLLOUT).await?;
    expect_progress(cluster).await.map_err(|error| format!("after a restart of the waypoint: {error}"))?;

    kubectl.run(&["delete", "gateway", "waypoint", "--namespace", NAMESPACE]).await?;
    let parts =
        [PARTS, "--namespace", NAMESPACE, "--selector", "gateway.networking.k8s.io/gateway-name=waypoint"];
    wait::until("the waypoint is gone", SOON, async || match kubectl.list(&parts).await {
        Ok(parts) if parts.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await?;
    // A waypoint that is asked for and missing refuses.
    wait::until("requests are refused", SOON, async || match apps.request(cluster).await {
        Ok(answer) => Err(answer),
        Err(_) => Ok(()),
    })
    .await?;
    Ok(apps.stop(cluster).await?)
}

fn manifests(namespace: &str) -> String {
    format!(
        r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: waypoint, namespace: {namespace}}}
spec:
  gatewayClassName: ambit-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: server, namespace: {namespace}}}
spec:
  parentRefs: [{{group: "", kind: Service, name: server, port: 80}}]
  rules:
  - filters: [{{type: URLRewrite, urlRewrite: {{path: {{type: ReplaceFullPath, replaceFullPath: {REWRITTEN}}}}}}}]
    backendRefs: [{{name: server, port: 80}}]
"#
    )
}

const ONLY_THE_WAYPOINT: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: server, namespace: routed}
spec:
  selector: {matchLabels: {app: server}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/routed/sa/waypoint]}}]
"#;

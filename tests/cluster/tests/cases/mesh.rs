//! Ambit on Kubernetes: installed by Helm, switched on by a label.

use std::fs;
use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::{Apps, MARKER, ROLLOUT};
use super::{Cases, Outcome, Stage};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// Status annotation of enrolled pods.
const REDIRECTION: &str = "ambient.istio.io/redirection";
/// A definition that is there before the chart is installed, and one that is not.
pub(crate) const THEIRS: &str = "referencegrants.gateway.networking.k8s.io";
pub(crate) const OURS: &str = "gateways.gateway.networking.k8s.io";
/// The tunnel's port.
const HBONE: u16 = 15008;

pub(crate) fn add(cases: &mut Cases) {
    cases.add_to(Stage::Cluster, "helm_installs_the_mesh", install);
    cases.add("helm_test_passes", helm_test);
    cases.add("bookinfo_comes_up_in_the_mesh", bookinfo);
    cases.add("a_label_puts_running_pods_under_mutual_tls", label);
    cases.add("probes_pass_under_strict_and_default_deny", probes);
    cases.add("an_init_container_is_captured_from_its_first_packet", init_container);
}

/// Brings the images to the nodes and installs the chart.
pub(crate) async fn install(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    cluster.load(&mesh::images(cluster.layout())?).await?;
    let theirs = cluster
        .layout()
        .repository()
        .join("charts/ambit/files/crds/gateway-api")
        .join(THEIRS.to_owned() + ".yaml");
    kubectl.apply(&fs::read_to_string(theirs)?).await?;
    mesh::install(cluster, &mesh::SETTINGS).await?;
    let owner =
        |definition: &Value| definition["metadata"]["annotations"]["meta.helm.sh/release-name"].clone();
    let definition = kubectl.get(&["customresourcedefinition", THEIRS]).await?;
    assert_eq!(owner(&definition), Value::Null, "a definition that was there became the release's");
    let definition = kubectl.get(&["customresourcedefinition", OURS]).await?;
    assert_eq!(owner(&definition), mesh::RELEASE);
    Ok(())
}

async fn helm_test(cluster: &Cluster) -> Outcome {
    let args = ["test", mesh::RELEASE, "--namespace", mesh::NAMESPACE, "--timeout", "3m"];
    let output = cluster.kubectl().helm(&args).await?;
    assert!(output.contains("Succeeded"), "{output}");
    Ok(())
}

async fn bookinfo(cluster: &Cluster) -> Outcome {
    cluster.load(&[mesh::bookinfo_image(cluster.layout())?]).await?;
    mesh::install_bookinfo(cluster).await?;
    wait_until_enrolled(cluster, mesh::BOOKINFO, true).await?;
    cluster.kubectl().run(&["delete", "namespace", mesh::BOOKINFO, "outside", "--wait"]).await?;
    Ok(())
}

/// Puts a namespace into the mesh, or takes it out, and waits until its pods say so.
pub(crate) async fn set_mode(cluster: &Cluster, namespace: &str, ambient: bool) -> Outcome {
    let label = if ambient { "istio.io/dataplane-mode=ambient" } else { "istio.io/dataplane-mode-" };
    cluster.kubectl().run(&["label", "namespace", namespace, label]).await?;
    wait_until_enrolled(cluster, namespace, ambient).await
}

/// Waits until every running pod of a namespace is in the mesh, or none is. Waypoints are not captured themselves.
pub(crate) async fn wait_until_enrolled(cluster: &Cluster, namespace: &str, ambient: bool) -> Outcome {
    let wanted = if ambient { Some("enabled") } else { None };
    let pods = ["pods", "--namespace", namespace, "--selector", "!gateway.networking.k8s.io/gateway-name"];
    wait::until(&format!("pods of {namespace} are enrolled: {ambient}"), SOON, async || {
        let pods = cluster.kubectl().list(&pods).await.map_err(|error| error.to_string())?;
        let redirection =
            |pod: &Value| pod["metadata"]["annotations"][REDIRECTION].as_str().map(str::to_owned);
        match pods.iter().find(|pod| redirection(pod).as_deref() != wanted) {
            Some(pod) => Err(format!("{}: {:?}", pod["metadata"]["name"], redirection(pod))),
            None => Ok(()),
        }
    })
    .await?;
    Ok(())
}

/// Waits until nothing of a request can be read on the wire of both nodes.
pub(crate) async fn wait_until_tunnelled(cluster: &Cluster, apps: &Apps) -> Outcome {
    // Until both proxies know both pods as enrolled, requests go through in the clear.
    wait::until("requests are tunnelled", SOON, async || {
        let capture = cluster.capture(&["n1", "n2"]).await.map_err(|error| error.to_string())?;
        apps.request(cluster).await.map_err(|error| error.to_string())?;
        let captured = capture.stop().await.map_err(|error| error.to_string())?;
        match captured.find(MARKER.as_bytes()).as_slice() {
            [] => Ok(()),
            clear => Err(format!("{clear:?}")),
        }
    })
    .await?;
    Ok(())
}

/// One request, seen on the wire of both nodes: all of it in the tunnel, nothing readable.
pub(crate) async fn expect_tunnelled_request(cluster: &Cluster, apps: &Apps) -> Outcome {
    let capture = cluster.capture(&["n1", "n2"]).await?;
    let answer = apps.request(cluster).await?;
    let captured = capture.stop().await?;
    assert!(answer.contains(MARKER), "{answer}");
    assert_eq!(captured.dropped, 0);
    assert!(captured.find(MARKER.as_bytes()).is_empty(), "in the clear: {:?}", captured.tcp_ports());
    assert!(captured.tcp_ports().contains_key(&HBONE), "{:?}", captured.tcp_ports());
    Ok(())
}

async fn label(cluster: &Cluster) -> Outcome {
    let apps = Apps::start(cluster, "label", ("n1", "n2")).await?;
    set_mode(cluster, "label", true).await?;
    wait_until_tunnelled(cluster, &apps).await?;
    expect_tunnelled_request(cluster, &apps).await?;
    // The receiving proxy saw the client's own identity.
    let log = proxy_log(cluster, "n2").await?;
    let client = "spiffe://cluster.local/ns/label/sa/client";
    assert!(log.lines().any(|line| line.contains(client) && line.contains("inbound")), "{log}");
    set_mode(cluster, "label", false).await?;
    let answer = apps.request(cluster).await?;
    assert!(answer.contains(MARKER), "{answer}");
    Ok(apps.stop(cluster).await?)
}

/// The log of a node's proxy.
pub(crate) async fn proxy_log(cluster: &Cluster, node: &str) -> ambit_cluster::Result<String> {
    let kubectl = cluster.kubectl();
    let field = format!("--field-selector=spec.nodeName={node}");
    let pods = ["pods", "--namespace", mesh::NAMESPACE, "--selector", "app=ztunnel", &field];
    let pods = kubectl.list(&pods).await?;
    let name = pods.first().and_then(|pod| pod["metadata"]["name"].as_str()).unwrap_or("none").to_owned();
    kubectl.run(&["logs", "--namespace", mesh::NAMESPACE, &name, "--tail=200"]).await
}

async fn probes(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, "probes", ("n1", "n2")).await?;
    kubectl.apply(STRICT_AND_DENY).await?;
    set_mode(cluster, "probes", true).await?;
    wait::until("the policy refuses", SOON, async || match apps.request(cluster).await {
        Ok(answer) => Err(answer),
        Err(_) => Ok(()),
    })
    .await?;
    // A new pod becomes ready only by its probes.
    kubectl.run(&["rollout", "restart", "--namespace", "probes", "deployment/server"]).await?;
    kubectl.rolled_out("probes", "deployment/server", ROLLOUT).await?;
    kubectl.apply(ALLOW_CLIENT).await?;
    wait::until("the client is allowed", SOON, async || {
        apps.request(cluster).await.map_err(|error| error.to_string())
    })
    .await?;
    expect_tunnelled_request(cluster, &apps).await?;
    Ok(apps.stop(cluster).await?)
}

async fn init_container(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, "first", ("n1", "n2")).await?;
    set_mode(cluster, "first", true).await?;
    wait::until("the server is in the tunnel", SOON, async || {
        apps.request(cluster).await.map_err(|error| error.to_string())
    })
    .await?;
    kubectl.apply(STRICT_FIRST).await?;
    let capture = cluster.capture(&["n1", "n2"]).await?;
    kubectl.apply(WITH_INIT_CONTAINER).await?;
    let done = |pod: &Value| pod["status"]["phase"] == "Running";
    kubectl.wait_for(ROLLOUT, &["pod", "early", "--namespace", "first"], done).await?;
    let captured = capture.stop().await?;
    assert_eq!(captured.dropped, 0);
    assert!(captured.find(MARKER.as_bytes()).is_empty(), "in the clear: {:?}", captured.tcp_ports());
    assert!(captured.tcp_ports().contains_key(&HBONE), "{:?}", captured.tcp_ports());
    Ok(apps.stop(cluster).await?)
}

const STRICT_AND_DENY: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: probes}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: default-deny, namespace: probes}
spec: {}
"#;

const ALLOW_CLIENT: &str = r#"
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: client, namespace: probes}
spec:
  selector: {matchLabels: {app: server}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/probes/sa/client]}}]
"#;

const STRICT_FIRST: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: first}
spec: {mtls: {mode: STRICT}}
"#;

const WITH_INIT_CONTAINER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: early, namespace: first}
spec:
  serviceAccountName: client
  nodeName: n1
  terminationGracePeriodSeconds: 1
  initContainers:
  - {name: request, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [get, "http://server/seen-in-the-clear"]}
  containers:
  - {name: wait, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [wait]}
"#;

//! What the node agent says of pods in `ambient.istio.io/redirection`, read back from the API server, and what pods say of
//! themselves in annotations.

use std::time::Duration;

use ambit_cluster::{Cluster, mesh, wait};
use serde_json::Value;

use super::apps::Apps;
use super::cli::json;
use super::mesh::{set_mode, wait_until_enrolled, wait_until_tunnelled};
use super::{Cases, Outcome};

/// How soon a change has its effect on a busy machine.
const SOON: Duration = Duration::from_secs(240);
/// The annotation.
const REDIRECTION: &str = "ambient.istio.io/redirection";

pub(crate) fn add(cases: &mut Cases) {
    cases.add("each_state_of_a_pod_is_read_back_and_survives_restarts", states);
    cases.add("annotations_of_running_pods_change_what_is_captured", captures);
}

async fn states(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, "states", ("n1", "n2")).await?;
    kubectl.apply(SANDBOXED).await?;
    // Without a node proxy: captured, and refused. The pod of a runtime with a network stack of its own is not enrolled.
    set_proxies(cluster, false).await?;
    kubectl.run(&["label", "namespace", "states", "istio.io/dataplane-mode=ambient"]).await?;
    for what in ["app=client", "app=server"] {
        expect(cluster, what, Some("pending")).await?;
    }
    expect(cluster, "run=sandboxed", Some("unsupported-runtime")).await?;
    let pods = kubectl.list(&["pods", "--namespace", "states", "--selector", "app=client"]).await?;
    let client = format!("states/{}", pods[0]["metadata"]["name"].as_str().unwrap_or_default());
    let (code, status) = json(cluster, &["status", &client]).await?;
    assert_eq!((code, &status["redirection"]), (1, &"pending".into()), "{status}");
    let (code, sections) = json(cluster, &["check"]).await?;
    assert!(code == 1 && sections.to_string().contains("no node proxy is connected"), "{sections}");
    assert!(apps.request(cluster).await.is_err(), "a pod that is pending has its requests answered");

    // An agent that starts anew puts right what somebody wrote meanwhile.
    for node in ["n1", "n2"] {
        let ran = cluster.run_on(node, &["sh", "-c", "kill -9 $(busybox pidof ambit-node)"]).await?;
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    annotate(cluster, "enabled").await?;
    expect(cluster, "app=server", Some("pending")).await?;
    expect(cluster, "run=sandboxed", Some("unsupported-runtime")).await?;
    set_proxies(cluster, true).await?;
    for what in ["app=client", "app=server"] {
        expect(cluster, what, Some("enabled")).await?;
    }
    wait_until_tunnelled(cluster, &apps).await?;

    // Somebody else's value does not last.
    annotate(cluster, "somebody-elses").await?;
    expect(cluster, "app=server", Some("enabled")).await?;
    kubectl.run(&["label", "namespace", "states", "istio.io/dataplane-mode-"]).await?;
    for what in ["app=client", "app=server", "run=sandboxed"] {
        expect(cluster, what, None).await?;
    }
    kubectl.run(&["delete", "runtimeclass", "sandboxed"]).await?;
    Ok(apps.stop(cluster).await?)
}

/// Writes a state of the server's pod, as nobody should.
async fn annotate(cluster: &Cluster, state: &str) -> Outcome {
    let pods = ["pods", "--namespace", "states", "--selector", "app=server"];
    let state = format!("{REDIRECTION}={state}");
    cluster.kubectl().run(&[&["annotate", "--overwrite"], &pods[..], &[state.as_str()]].concat()).await?;
    Ok(())
}

/// Waits until the annotation of every pod that a selector finds is as expected.
async fn expect(cluster: &Cluster, selector: &str, wanted: Option<&str>) -> Outcome {
    let pods = ["pods", "--namespace", "states", "--selector", selector];
    let is_right = |pod: &Value| pod["metadata"]["annotations"][REDIRECTION].as_str() == wanted;
    wait::until(&format!("{selector} says {wanted:?}"), SOON, async || {
        let pods = cluster.kubectl().list(&pods).await.map_err(|error| error.to_string())?;
        match pods.iter().find(|pod| !is_right(pod)) {
            None if !pods.is_empty() => Ok(()),
            other => Err(format!("{:?}", other.map(|pod| &pod["metadata"]))),
        }
    })
    .await?;
    Ok(())
}

/// Takes the node proxies away, or puts them back.
async fn set_proxies(cluster: &Cluster, present: bool) -> Outcome {
    let kubectl = cluster.kubectl();
    let selector = if present { "null" } else { "\"x\"" };
    let patch =
        format!(r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"ambit.dev/none":{selector}}}}}}}}}}}"#);
    kubectl.run(&["patch", "--namespace", mesh::NAMESPACE, "daemonset/ztunnel", "--patch", &patch]).await?;
    if present {
        return Ok(kubectl.rolled_out(mesh::NAMESPACE, "daemonset/ztunnel", SOON).await?);
    }
    let pods = ["pods", "--namespace", mesh::NAMESPACE, "--selector", "app=ztunnel"];
    kubectl.wait_for(SOON, &pods, |list| list["items"].as_array().is_some_and(Vec::is_empty)).await?;
    Ok(())
}

/// Incoming connections of a pod pass the mesh, then do not, then do again; its outgoing ones always do.
async fn captures(cluster: &Cluster) -> Outcome {
    const BYPASS: &str = "ambient.istio.io/bypass-inbound-capture";
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, "captures", ("n1", "n2")).await?;
    set_mode(cluster, "captures", true).await?;
    wait_until_tunnelled(cluster, &apps).await?;
    let pods = ["pods", "--namespace", "captures", "--selector", "app=server"];
    for (change, redirects_inbound) in [(format!("{BYPASS}=true"), false), (format!("{BYPASS}-"), true)] {
        let annotate = ["annotate", "--overwrite"];
        kubectl.run(&[&annotate[..], &pods[..], &[change.as_str()]].concat()).await?;
        wait::until(&change, SOON, async || {
            let rules = rules_on(cluster, "n2").await?;
            if rules.contains("redirect to :15006") == redirects_inbound { Ok(()) } else { Err(rules) }
        })
        .await?;
    }
    wait_until_enrolled(cluster, "captures", true).await?;
    wait_until_tunnelled(cluster, &apps).await?;
    Ok(apps.stop(cluster).await?)
}

/// The rules of the pods of a node that are in the mesh.
async fn rules_on(cluster: &Cluster, node: &str) -> Result<String, String> {
    const LIST: &str =
        "for ns in /run/netns/cni-*; do nsenter --net=$ns nft list table inet ambit 2>/dev/null; done; true";
    let ran = cluster.run_on(node, &["sh", "-c", LIST]).await.map_err(|error| error.to_string())?;
    if ran.code == 0 { Ok(ran.output) } else { Err(format!("{ran:?}")) }
}

/// No node has the handler, so the pod never starts: what is said of it is said all the same.
const SANDBOXED: &str = r#"
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: sandboxed}
handler: runsc
---
apiVersion: v1
kind: Pod
metadata: {name: sandboxed, namespace: states, labels: {run: sandboxed}}
spec:
  nodeName: n1
  runtimeClassName: sandboxed
  terminationGracePeriodSeconds: 1
  containers: [{name: wait, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [wait]}]
"#;

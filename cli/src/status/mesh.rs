//! The mesh as a whole: components, namespaces, waypoints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use ambit_node::enrol::REDIRECTION;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::ResourceExt;
use serde::Serialize;

use crate::cluster::{Cluster, Component, is_ready, node_of};
use crate::enrolment::{self, Namespaces};
use crate::gateways::{self, Waypoint};
use crate::output::{Palette, table};

/// Label by which a namespace names its waypoint.
const USE_WAYPOINT: &str = "istio.io/use-waypoint";

/// The mesh.
#[derive(Debug, Serialize)]
pub(super) struct Overview {
    components: Vec<ComponentStatus>,
    namespaces: Vec<NamespaceStatus>,
    waypoints: Vec<Waypoint>,
}

#[derive(Debug, Serialize)]
struct ComponentStatus {
    name: &'static str,
    ready: usize,
    pods: usize,
    versions: BTreeSet<String>,
    /// Nodes on which it is not ready.
    unready_nodes: BTreeSet<String>,
}

#[derive(Debug, Serialize)]
struct NamespaceStatus {
    name: String,
    /// Pods that run.
    pods: usize,
    /// Pods that belong into the mesh.
    enrolled: usize,
    /// Pods that are captured and served.
    captured: usize,
    waypoint: String,
}

/// Reads the mesh.
///
/// # Errors
/// When the API server can't be asked.
pub(super) async fn read(cluster: &Cluster) -> anyhow::Result<Overview> {
    let namespaces = enrolment::by_name(cluster.list_cluster::<Namespace>().await?);
    let pods: Vec<Pod> = cluster.list(None, "").await?;
    let waypoints = gateways::waypoints(cluster, None).await?;
    Ok(overview(&cluster.system, &namespaces, &pods, waypoints))
}

fn overview(system: &str, namespaces: &Namespaces, pods: &[Pod], waypoints: Vec<Waypoint>) -> Overview {
    let components = Component::ALL.map(|component| of_component(system, component, pods)).into();
    let settings = enrolment::settings(system);
    let mut counts: BTreeMap<String, NamespaceStatus> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| is_running(pod)) {
        let name = pod.namespace().unwrap_or_default();
        let status = counts.entry(name.clone()).or_insert_with(|| NamespaceStatus {
            pods: 0,
            enrolled: 0,
            captured: 0,
            waypoint: namespaces
                .get(&name)
                .and_then(|n| n.labels().get(USE_WAYPOINT).cloned())
                .unwrap_or_default(),
            name,
        });
        status.pods += 1;
        status.enrolled += usize::from(enrolment::is_enrolled(pod, namespaces, &settings));
        status.captured += usize::from(pod.annotations().get(REDIRECTION).is_some_and(|v| v == "enabled"));
    }
    let in_mesh = |status: &NamespaceStatus| status.enrolled + status.captured > 0;
    Overview { components, namespaces: counts.into_values().filter(in_mesh).collect(), waypoints }
}

fn of_component(system: &str, component: Component, pods: &[Pod]) -> ComponentStatus {
    let label = |pod: &Pod, key: &str| pod.labels().get(key).cloned();
    let is_of = |pod: &&Pod| {
        pod.namespace().as_deref() == Some(system)
            && label(pod, "app.kubernetes.io/name").as_deref() == Some(component.workload())
    };
    let pods: Vec<&Pod> = pods.iter().filter(is_of).collect();
    ComponentStatus {
        name: component.workload(),
        ready: pods.iter().filter(|pod| is_ready(pod)).count(),
        pods: pods.len(),
        versions: pods.iter().filter_map(|pod| label(pod, "app.kubernetes.io/version")).collect(),
        unready_nodes: pods.iter().filter(|pod| !is_ready(pod)).map(|pod| node_of(pod).to_owned()).collect(),
    }
}

fn is_running(pod: &Pod) -> bool {
    pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Running"))
}

/// The mesh for people.
pub(super) fn render(overview: &Overview, paint: Palette) -> String {
    let Overview { components, namespaces, waypoints } = overview;
    let join = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(",");
    let mut text = table(
        paint,
        ["COMPONENT", "READY", "VERSION", "NOT READY ON"],
        components.iter().map(|c| {
            [c.name.to_owned(), format!("{}/{}", c.ready, c.pods), join(&c.versions), join(&c.unready_nodes)]
        }),
    );
    if namespaces.is_empty() {
        let _ = writeln!(text, "\nNo pod is in the mesh. Put a namespace into it:");
        let _ = writeln!(text, "  kubectl label namespace NAMESPACE istio.io/dataplane-mode=ambient");
    } else {
        let rows = namespaces.iter().map(|n| {
            let [pods, enrolled, captured] = [n.pods, n.enrolled, n.captured].map(|count| count.to_string());
            [n.name.clone(), pods, enrolled, captured, n.waypoint.clone()]
        });
        let rows = table(paint, ["NAMESPACE", "PODS", "IN THE MESH", "CAPTURED", "WAYPOINT"], rows);
        let _ = write!(text, "\n{rows}");
    }
    if !waypoints.is_empty() {
        let _ = write!(text, "\n{}", gateways::render(waypoints, paint));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(namespace: &str, name: &str, labels: &serde_json::Value, captured: bool, ready: bool) -> Pod {
        let annotations = if captured { json!({ REDIRECTION: "enabled" }) } else { json!({}) };
        let ready = if ready { "True" } else { "False" };
        let pod = json!({
            "metadata": { "namespace": namespace, "name": name, "labels": labels, "annotations": annotations },
            "spec": { "nodeName": "n1", "containers": [] },
            "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": ready }] },
        });
        serde_json::from_value(pod).unwrap_or_default()
    }

    #[test]
    fn the_mesh_is_three_tables() {
        let of = |component: &str| {
            json!({ "app.kubernetes.io/name": component, "app.kubernetes.io/version": "0.1.0",
                    "istio.io/dataplane-mode": "none" })
        };
        let pods = [
            pod("ambit-system", "a", &of("ambit-control"), false, true),
            pod("ambit-system", "b", &of("ambit-node"), false, false),
            pod("ambit-system", "c", &of("ztunnel"), false, true),
            pod("shop", "web", &json!({}), true, true),
            pod("shop", "cart", &json!({}), false, true),
            pod("plain", "other", &json!({}), false, true),
        ];
        let namespace = json!({ "metadata": { "name": "shop", "labels": {
            "istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": "waypoint" } } });
        let namespaces = enrolment::by_name(vec![serde_json::from_value(namespace).unwrap_or_default()]);
        let waypoint = Waypoint {
            namespace: "shop".into(),
            name: "waypoint".into(),
            class: "ambit-waypoint".into(),
            serves: "service".into(),
            addresses: vec!["10.96.0.7".into()],
            programmed: Some(true),
            message: String::new(),
        };
        let shown =
            render(&overview("ambit-system", &namespaces, &pods, vec![waypoint]), Palette::new(false));
        insta::assert_snapshot!(shown);
    }
}

//! Parts of manifests that have no effect in a local cluster. Each is reported once.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PodSpec, PodTemplateSpec};
use serde_json::Value;

use crate::manifest::{Key, Object};

/// Kinds that have an effect here, or whose absence of effect is reported elsewhere.
const HONOURED: &[&str] = &[
    "AuthorizationPolicy",
    "BackendTLSPolicy",
    "ConfigMap",
    "CronJob",
    "DaemonSet",
    "Deployment",
    "DestinationRule",
    "EndpointSlice",
    "GRPCRoute",
    "Gateway",
    "GatewayClass",
    "HTTPRoute",
    "Ingress",
    "IngressClass",
    "Job",
    "ListenerSet",
    "Namespace",
    "Node",
    "PeerAuthentication",
    "Pod",
    "ReferenceGrant",
    "ReplicaSet",
    "ReplicationController",
    "RequestAuthentication",
    "Secret",
    "Service",
    "ServiceAccount",
    "ServiceEntry",
    "StatefulSet",
    "TCPRoute",
    "TLSRoute",
    "Telemetry",
    "TrafficPolicy",
    "UDPRoute",
    "VirtualService",
    "WorkloadEntry",
];
/// The label by which a pod may ask for a node.
const HOSTNAME: &str = "kubernetes.io/hostname";

/// A sentence for every kind and field that is ignored, with the objects that have it.
pub(crate) fn ignored(objects: &BTreeMap<Key, Object>, nodes: &[String]) -> Vec<String> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (key, object) in objects {
        if !HONOURED.contains(&key.kind.as_str()) {
            found.entry(format!("kind {}", key.kind)).or_default().push(key.to_string());
        }
        if let Some(spec) = pod_spec(key, &object.body) {
            for what in fields(&spec, nodes) {
                found.entry(what).or_default().push(key.to_string());
            }
        }
    }
    let sentence = |(what, objects): (String, Vec<String>)| {
        let more = match objects.len() {
            0 | 1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        let first = objects.first().map_or("", String::as_str);
        format!("{what} has no effect in a local cluster ({first}{more})")
    };
    found.into_iter().map(sentence).collect()
}

fn pod_spec(key: &Key, body: &Value) -> Option<PodSpec> {
    match key.kind.as_str() {
        "Pod" => serde_json::from_value(body.get("spec")?.clone()).ok(),
        "Deployment" => {
            let template: PodTemplateSpec =
                serde_json::from_value(body.get("spec")?.get("template")?.clone()).ok()?;
            template.spec
        }
        _ => None,
    }
}

fn fields(spec: &PodSpec, nodes: &[String]) -> Vec<String> {
    let mut fields = Vec::new();
    let mut add = |field: &str, present: bool| {
        if present {
            fields.push(field.to_owned());
        }
    };
    let selector = spec.node_selector.iter().flatten();
    add("nodeSelector", selector.clone().any(|(key, _)| key != HOSTNAME));
    add("affinity", spec.affinity.is_some());
    add("topologySpreadConstraints", spec.topology_spread_constraints.is_some());
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let of_container = containers
        .clone()
        .any(|container| container.security_context.as_ref().is_some_and(|c| c.run_as_user.is_some()));
    add("runAsUser", of_pod.is_some() || of_container);
    let host_port = |container: &k8s_openapi::api::core::v1::Container| {
        container.ports.iter().flatten().any(|port| port.host_port.is_some())
    };
    add("hostPort", containers.clone().any(host_port));
    let named =
        spec.node_name.iter().chain(selector.filter(|(key, _)| *key == HOSTNAME).map(|(_, name)| name));
    for name in named.filter(|name| !nodes.contains(name)) {
        add(&format!("node name {name}, which no node has,"), true);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<String> {
        let objects = crate::manifest::parse(std::path::Path::new("t"), text).expect("sound manifests");
        let objects = objects.into_iter().map(|object| (object.key.clone(), object)).collect();
        ignored(&objects, &["node-1".to_owned()])
    }

    #[test]
    fn ignored_kinds_are_named_once_with_their_objects() {
        let policy = |name: &str| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\n"
            )
        };
        let sentences = of(&format!("{}---\n{}", policy("a"), policy("b")));
        assert_eq!(
            sentences,
            ["kind NetworkPolicy has no effect in a local cluster (NetworkPolicy shop/a and 1 more)"]
        );
    }

    #[test]
    fn ignored_fields_are_named() {
        let sentences = of(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeName: elsewhere, nodeSelector: {disk: ssd}, securityContext: {runAsUser: 1000}, containers: [{name: c}]}\n",
        );
        let fields: Vec<&str> = sentences.iter().filter_map(|line| line.split(" has no").next()).collect();
        assert_eq!(fields, ["node name elsewhere, which no node has,", "nodeSelector", "runAsUser"]);
    }

    #[test]
    fn honoured_fields_are_not_named() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {nodeSelector: {kubernetes.io/hostname: node-1}, containers: [{name: c}]}\n";
        assert_eq!(of(text), Vec::<String>::new());
    }
}

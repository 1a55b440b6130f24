//! A cluster of 1,000 nodes, 10,000 pods and 1,000 services as an API server would show it, object by object.

use serde_json::{Value, json};

/// Nodes of the cluster.
pub const NODES: u32 = 1_000;
/// Pods of the cluster: ten a service, ten a node.
pub const PODS: u32 = 10_000;
/// Services of the cluster.
pub const SERVICES: u32 = 1_000;
/// Namespaces of the cluster, all enrolled.
pub const NAMESPACES: u32 = 50;

/// An object with the name of the file that it is put into.
#[derive(Clone, Debug)]
pub struct File {
    /// Unique; without directory.
    pub name: String,
    /// YAML or JSON.
    pub text: String,
}

/// The namespace of a service and its pods.
pub fn namespace_of(service: u32) -> String {
    format!("ns-{}", service % NAMESPACES)
}

/// The name of a pod.
pub fn pod_name(number: u32) -> String {
    format!("app-{}-5d4b8f7c9-{number:05}", number % SERVICES)
}

/// The service account of a service's pods.
pub fn account_of(service: u32) -> String {
    format!("sa-{}", service % 20)
}

/// Every object: namespaces and services as YAML, nodes and pods as JSON.
pub fn everything() -> impl Iterator<Item = File> {
    namespaces().chain(nodes()).chain(services()).chain((0..PODS).map(pod))
}

/// The namespaces, as YAML.
pub fn namespaces() -> impl Iterator<Item = File> {
    (0..NAMESPACES).map(namespace)
}

/// The nodes, as JSON.
pub fn nodes() -> impl Iterator<Item = File> {
    (0..NODES).map(node)
}

/// The services, as YAML.
pub fn services() -> impl Iterator<Item = File> {
    (0..SERVICES).map(service)
}

fn namespace(number: u32) -> File {
    let text = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: ns-{number}\n  labels:\n    istio.io/dataplane-mode: ambient\n"
    );
    File { name: format!("namespace-{number}.yaml"), text }
}

fn node(number: u32) -> File {
    let body = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": format!("node-{number}"), "labels": {
            "kubernetes.io/hostname": format!("node-{number}"),
            "topology.kubernetes.io/region": "r1",
            "topology.kubernetes.io/zone": format!("r1-{}", number % 3),
        } },
        "status": { "addresses": [{ "type": "InternalIP", "address": address(172, number) }] },
    });
    File { name: format!("node-{number}.json"), text: body.to_string() }
}

fn service(number: u32) -> File {
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: svc-{number}\n  namespace: {}\nspec:\n  clusterIP: {}\n  \
         clusterIPs: [{}]\n  selector:\n    app: app-{number}\n  ports:\n  - name: http\n    port: 80\n    targetPort: 8080\n",
        namespace_of(number),
        address(11, number),
        address(11, number),
    );
    File { name: format!("service-{number}.yaml"), text }
}

/// A pod that is ready and captured; of numbers from [`PODS`] on, one that is not there at first.
pub fn pod(number: u32) -> File {
    let service = number % SERVICES;
    let (name, ip) = (pod_name(number), address(10, number));
    let body: Value = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": namespace_of(service), "uid": format!("00000000-0000-4000-8000-{number:012}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": { "app": format!("app-{service}"), "version": "v1", "pod-template-hash": "5d4b8f7c9" },
            "annotations": { "ambient.istio.io/redirection": "enabled" },
            "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("app-{service}-5d4b8f7c9"),
                "uid": format!("r-{service}"), "controller": true }],
        },
        "spec": {
            "serviceAccountName": account_of(service), "nodeName": format!("node-{}", number % NODES),
            "containers": [{ "name": "app", "image": format!("registry.example/app-{service}:1.0"),
                "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" }],
                "resources": { "requests": { "cpu": "100m", "memory": "64Mi" } } }],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }], "hostIP": address(172, number % NODES),
            "startTime": "2026-01-01T00:00:00Z",
            "conditions": [{ "type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" }],
            "containerStatuses": [{ "name": "app", "image": "app", "imageID": "", "ready": true, "restartCount": 0 }],
        },
    });
    File { name: format!("pod-{number}.json"), text: body.to_string() }
}

fn address(first: u8, number: u32) -> String {
    let [_, second, third, fourth] = (number + 1).to_be_bytes();
    format!("{first}.{second}.{third}.{fourth}")
}

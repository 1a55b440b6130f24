//! The objects that an API server would serve: pure functions from objects and pods to published objects.
//!
//! Only what the manifests don't hold is published: pods with their status, the ReplicaSets between them and
//! their Deployments, services with their VIPs, namespaces, nodes, and objects that were applied by call.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::addresses::{Plan, ServiceRange};
use crate::cluster::mesh::SYSTEM_NAMESPACE;
use crate::cluster::shared::Shared;
use crate::error::{Error, Result};
use crate::manifest::{Key, Object};
use crate::pod::{Origin, Pod};
use crate::services::Backend;

/// Labels and annotations of a namespace.
#[derive(Debug, Default)]
pub(crate) struct Namespace {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
}

/// Every namespace that is declared or that contains an object.
pub(crate) fn namespaces(objects: &BTreeMap<Key, Object>, pods: &[Pod]) -> BTreeMap<String, Namespace> {
    let mut namespaces: BTreeMap<String, Namespace> = BTreeMap::new();
    let mentioned = objects.keys().map(|key| key.namespace.as_str()).filter(|name| !name.is_empty());
    let inhabited = pods.iter().map(Pod::namespace);
    for name in mentioned.chain(inhabited).chain(["default", "kube-system", SYSTEM_NAMESPACE]) {
        namespaces.entry(name.to_owned()).or_default();
    }
    for (key, object) in objects.iter().filter(|(key, _)| key.kind == "Namespace") {
        let strings = |field: &str| {
            let values = object.body["metadata"][field].as_object().into_iter().flatten();
            values.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
        };
        let namespace = Namespace { labels: strings("labels"), annotations: strings("annotations") };
        namespaces.insert(key.name.clone(), namespace);
    }
    for (name, namespace) in &mut namespaces {
        // Kubernetes itself sets this one.
        namespace.labels.insert("kubernetes.io/metadata.name".to_owned(), name.clone());
    }
    namespaces
}

/// All objects of a kind as their type. Those that do not fit are reported and left out.
pub(crate) fn typed<T: DeserializeOwned>(
    objects: &BTreeMap<Key, Object>,
    kind: &str,
    problems: &mut BTreeMap<String, String>,
) -> Vec<T> {
    let mut typed = Vec::new();
    for (key, object) in objects.iter().filter(|(key, _)| key.kind == kind) {
        match object.read() {
            Ok(object) => typed.push(object),
            Err(error) => drop(problems.insert(key.to_string(), error.to_string())),
        }
    }
    typed
}

/// Reports workloads that run under a service account that is not defined. A cluster refuses such pods; here, a
/// typing error would give them an identity that no policy names.
pub(crate) fn check_service_accounts(
    objects: &BTreeMap<Key, Object>,
    problems: &mut BTreeMap<String, String>,
) {
    for (key, object) in objects {
        let spec = match key.kind.as_str() {
            "Pod" => &object.body["spec"],
            "Deployment" => &object.body["spec"]["template"]["spec"],
            _ => continue,
        };
        let account = spec["serviceAccountName"].as_str().unwrap_or("default");
        let defined = objects.contains_key(&Key::new("ServiceAccount", &key.namespace, account));
        if account != "default" && !defined {
            problems.insert(
                key.to_string(),
                format!("there is no service account {account} in {}", key.namespace),
            );
        }
    }
}

/// Services with VIPs for those that want one and name none, and the cluster DNS.
pub(crate) fn services(
    objects: &BTreeMap<Key, Object>,
    range: &mut ServiceRange,
    plan: Plan,
    problems: &mut BTreeMap<String, String>,
) -> Vec<Service> {
    let mut services: Vec<Service> = typed(objects, "Service", problems);
    for service in &mut services {
        if let Err(error) = give_vips(service, range) {
            let name = service.metadata.name.clone().unwrap_or_default();
            problems.insert(format!("Service {name}"), error.to_string());
        }
    }
    services.extend(dns_service(plan));
    services
}

fn give_vips(service: &mut Service, range: &mut ServiceRange) -> Result<()> {
    let name = service.metadata.name.clone().unwrap_or_default();
    let namespace = service.metadata.namespace.clone().unwrap_or_default();
    let Some(spec) = &mut service.spec else { return Ok(()) };
    if spec.type_.as_deref() == Some("ExternalName") || spec.cluster_ip.as_deref() == Some("None") {
        return Ok(());
    }
    if let Some(given) = spec.cluster_ip.clone().filter(|given| !given.is_empty()) {
        spec.cluster_ips.get_or_insert_with(|| vec![given]);
        return Ok(());
    }
    let families = spec.ip_families.clone().unwrap_or_default();
    let single = spec.ip_family_policy.as_deref() == Some("SingleStack");
    let of_family = |ip: &std::net::IpAddr| {
        families.is_empty() || families.iter().any(|family| (family == "IPv4") == ip.is_ipv4())
    };
    let vips: Vec<String> = range
        .of(&namespace, &name)?
        .all()
        .iter()
        .filter(|ip| of_family(ip))
        .take(if single { 1 } else { 2 })
        .map(ToString::to_string)
        .collect();
    spec.cluster_ip = vips.first().cloned();
    spec.cluster_ips = Some(vips);
    Ok(())
}

/// The service of the cluster DNS. Its endpoint is published separately.
fn dns_service(plan: Plan) -> Option<Service> {
    let vips: Vec<String> = plan.dns().all().iter().map(ToString::to_string).collect();
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "kube-dns", "namespace": "kube-system" },
        "spec": {
            "clusterIP": vips.first(), "clusterIPs": vips,
            "ports": [
                { "name": "dns", "protocol": "UDP", "port": 53 },
                { "name": "dns-tcp", "protocol": "TCP", "port": 53 },
            ],
        },
    });
    serde_json::from_value(service).ok()
}

/// The slices of the cluster DNS, one a family.
pub(crate) fn dns_slices(plan: Plan) -> Vec<Value> {
    let slice = |ip: std::net::IpAddr| {
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("kube-dns-{}", family.to_ascii_lowercase()), "namespace": "kube-system",
                "labels": { "kubernetes.io/service-name": "kube-dns" },
            },
            "addressType": family,
            "endpoints": [{ "addresses": [ip.to_string()], "conditions": { "ready": true } }],
            "ports": [
                { "name": "dns", "protocol": "UDP", "port": 53 },
                { "name": "dns-tcp", "protocol": "TCP", "port": 53 },
            ],
        })
    };
    plan.control().all().into_iter().map(slice).collect()
}

/// A pod as services see it.
pub(crate) fn backend(pod: &Pod) -> Backend {
    let object = pod.inner.object.read();
    let spec = object.spec.as_ref();
    Backend {
        namespace: pod.namespace().to_owned(),
        labels: object.metadata.labels.clone().unwrap_or_default(),
        addresses: pod.ips(),
        ready: pod.is_ready(),
        hostname: spec.and_then(|spec| spec.hostname.clone()),
        subdomain: spec.and_then(|spec| spec.subdomain.clone()),
        containers: spec.map(|spec| spec.containers.clone()).unwrap_or_default(),
    }
}

/// Gathers everything that is to be published.
pub(crate) fn collect(
    shared: &Shared,
    objects: &BTreeMap<Key, Object>,
    namespaces: &BTreeMap<String, Namespace>,
    services: &[Service],
    out: &mut BTreeMap<Key, Value>,
) {
    let applied: Vec<Key> = shared.objects.lock().applied().map(|object| object.key.clone()).collect();
    for key in applied {
        if let Some(object) = objects.get(&key) {
            out.insert(key, object.body.clone());
        }
    }
    for (name, Namespace { labels, annotations: _ }) in namespaces {
        let key = Key::new("Namespace", "", name);
        let mut body = objects.get(&key).map_or_else(
            || json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } }),
            |object| object.body.clone(),
        );
        body["metadata"]["labels"] = json!(labels);
        out.insert(key, body);
    }
    for node in &shared.nodes {
        let addresses = node.attached.addresses.all();
        let addresses: Vec<Value> =
            addresses.iter().map(|ip| json!({ "type": "InternalIP", "address": ip.to_string() })).collect();
        let body = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": { "name": node.name, "labels": node.labels },
            "status": {
                "addresses": addresses,
                "conditions": [{ "type": "Ready", "status": "True" }],
            },
        });
        out.insert(Key::new("Node", "", &node.name), body);
    }
    for service in services {
        insert(out, "Service", "v1", service);
    }
    for slice in dns_slices(shared.plan) {
        insert(out, "EndpointSlice", "discovery.k8s.io/v1", &slice);
    }
    for pod in shared.pods() {
        insert(out, "Pod", "v1", &pod.published());
        if let Origin::Deployment { namespace, name, hash } = &pod.inner.origin {
            let set = format!("{name}-{hash}");
            let body = json!({
                "apiVersion": "apps/v1", "kind": "ReplicaSet",
                "metadata": {
                    "name": set, "namespace": namespace,
                    "ownerReferences": [{
                        "apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": name,
                        "controller": true,
                    }],
                },
            });
            out.insert(Key::new("ReplicaSet", namespace, &set), body);
        }
    }
}

fn insert<T: Serialize>(out: &mut BTreeMap<Key, Value>, kind: &str, api_version: &str, object: &T) {
    match encode(kind, api_version, object) {
        Ok((key, body)) => drop(out.insert(key, body)),
        Err(error) => tracing::error!(kind, %error, "an object can't be published"),
    }
}

fn encode<T: Serialize>(kind: &str, api_version: &str, object: &T) -> Result<(Key, Value)> {
    let mut body = serde_json::to_value(object)
        .map_err(|error| Error::System { attempt: format!("encode a {kind}"), source: error.into() })?;
    body["apiVersion"] = json!(api_version);
    body["kind"] = json!(kind);
    let text = |field: &str| body["metadata"][field].as_str().unwrap_or_default().to_owned();
    Ok((Key::new(kind, &text("namespace"), &text("name")), body))
}

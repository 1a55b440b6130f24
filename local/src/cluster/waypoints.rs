//! What a cluster runs for a Gateway of class `ambit-waypoint` or `ambit`: a service account, a Service and a Deployment of
//! its name, as the control plane deploys them in Kubernetes; and the Gateway's status, which says where it is reached.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ::http::Method;
use ambit_api::ports;
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use crate::addresses::CONTROL_V4;
use crate::cluster::Cluster;
use crate::cluster::mesh::{SYSTEM_NAMESPACE, root_file};
use crate::cluster::shared::Shared;
use crate::error::{Error, Result};
use crate::http::{self, Stream};
use crate::manifest::{Key, Object};
use crate::metrics::Metrics;
use crate::pod::Pod;
use crate::token::Subject;

/// `gatewayClassName` of waypoints, and of gateways for clients outside the mesh.
const CLASSES: [&str; 2] = ["ambit-waypoint", "ambit"];
/// Name of the program, and of the image that stands for it.
const PROGRAM: &str = "ambit-waypoint";
/// Annotation of a Gateway: how many pods its waypoint has here.
const REPLICAS: &str = "local.ambit.dev/replicas";
/// Annotation of an Ingress with its class.
const INGRESS_CLASS: &str = "kubernetes.io/ingress.class";
/// Says whose gateway a pod or Service is (Gateway API, GEP-1762).
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

impl Cluster {
    /// The pods of waypoints.
    #[must_use]
    pub fn waypoints(&self) -> Vec<Pod> {
        let mut pods = self.pods();
        pods.retain(|pod| pod.labels().contains_key(GATEWAY_NAME));
        pods
    }

    /// One scrape of the metrics of a waypoint's pod.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn waypoint_metrics(&self, pod: &Pod) -> Result<Metrics> {
        let at = SocketAddr::new(IpAddr::V4(pod.ip()), ports::METRICS);
        let (_, text) = http::request(&pod.inner.sandbox, at, Method::GET, "/metrics").await?;
        Ok(Metrics::parse(&String::from_utf8_lossy(&text)))
    }
}

impl Cluster {
    /// `GET` of a path at the admin server of a waypoint's pod; returns status and text.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn waypoint_admin(&self, pod: &Pod, path: &str) -> Result<(u16, String)> {
        let at = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ports::ADMIN);
        let (status, text) = http::request(&pod.inner.sandbox, at, Method::GET, path).await?;
        Ok((status.as_u16(), String::from_utf8_lossy(&text).into_owned()))
    }
}

impl Cluster {
    /// `GET` of a path at the admin server of a waypoint's pod whose answer goes on; returns status and answer.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn waypoint_admin_stream(&self, pod: &Pod, path: &str) -> Result<(u16, Stream)> {
        let at = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ports::ADMIN);
        let (status, stream) = http::stream(&pod.inner.sandbox, at, path).await?;
        Ok((status.as_u16(), stream))
    }
}

/// The Gateways that are run here.
fn gateways(objects: &BTreeMap<Key, Object>) -> Vec<Key> {
    let is_run = |object: &Object| {
        object.body["spec"]["gatewayClassName"].as_str().is_some_and(|class| CLASSES.contains(&class))
    };
    let of_kind = objects.iter().filter(|(key, object)| key.kind == "Gateway" && is_run(object));
    of_kind.map(|(key, _)| key.clone()).collect()
}

/// Adds the Gateways that serve the Ingresses of IngressClasses without parameters, as the control plane makes them in Kubernetes.
fn add_ingress_gateways(objects: &mut BTreeMap<Key, Object>) {
    let classes = classes_without_parameters(objects);
    let of_kind = objects.iter().filter(|(key, _)| key.kind == "Ingress");
    let served = of_kind.filter_map(|(_, object)| {
        let metadata = &object.body["metadata"]["annotations"][INGRESS_CLASS];
        let named = metadata.as_str().or(object.body["spec"]["ingressClassName"].as_str());
        let mut matching = classes.iter().filter(|class| match named {
            Some(name) => class.name == name,
            None => class.is_default,
        });
        Some((matching.next()?.name.clone(), object.file.clone()))
    });
    let served: BTreeMap<String, std::path::PathBuf> = served.collect();
    for (class, file) in served {
        let key = Key::new("Gateway", SYSTEM_NAMESPACE, &format!("{class}-ingress"));
        let body = json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": { "name": key.name, "namespace": key.namespace },
            "spec": { "gatewayClassName": "ambit", "listeners": [{ "name": "http", "port": 80, "protocol": "HTTP" }] },
        });
        objects.entry(key.clone()).or_insert(Object { key, file, body });
    }
}

/// An IngressClass of the mesh.
struct IngressClass {
    name: String,
    is_default: bool,
}

/// The IngressClasses of the mesh that name no Gateway of their own; the one that the chart makes is there without its object.
fn classes_without_parameters(objects: &BTreeMap<Key, Object>) -> Vec<IngressClass> {
    let of_kind = || objects.iter().filter(|(key, _)| key.kind == "IngressClass");
    let is_served = |object: &Object| {
        let spec = &object.body["spec"];
        spec["controller"] == "ambit.dev/ingress-controller" && spec["parameters"].is_null()
    };
    let mut classes: Vec<IngressClass> = of_kind()
        .filter(|(_, object)| is_served(object))
        .map(|(key, object)| {
            let annotations = &object.body["metadata"]["annotations"];
            let is_default = annotations["ingressclass.kubernetes.io/is-default-class"] == "true";
            IngressClass { name: key.name.clone(), is_default }
        })
        .collect();
    if of_kind().all(|(key, _)| key.name != "ambit") {
        classes.push(IngressClass { name: "ambit".to_owned(), is_default: false });
    }
    classes
}

/// Adds what each waypoint needs, except where the user's own objects have the names. A token that can't be written is a
/// problem of its Gateway.
pub(crate) fn add(
    shared: &Shared,
    env: &BTreeMap<String, String>,
    objects: &mut BTreeMap<Key, Object>,
    problems: &mut BTreeMap<String, String>,
) {
    add_ingress_gateways(objects);
    for gateway in gateways(objects) {
        let token = match token(shared, &gateway) {
            Ok(token) => token,
            Err(error) => {
                problems.insert(gateway.to_string(), error.to_string());
                continue;
            }
        };
        for (kind, body) in [
            ("ServiceAccount", account(&gateway)),
            ("Service", service(&gateway, &ports(objects, &gateway))),
            ("Deployment", deployment(shared, &gateway, replicas(objects, &gateway), env, &token)),
        ] {
            let key = Key::new(kind, &gateway.namespace, &gateway.name);
            let file = objects.get(&gateway).map(|object| object.file.clone()).unwrap_or_default();
            objects.entry(key.clone()).or_insert(Object { key, file, body });
        }
    }
}

/// The Gateways with their addresses, once their Services have some.
pub(crate) fn statuses(objects: &BTreeMap<Key, Object>, services: &[Service]) -> Vec<(Key, Value)> {
    let with_status = |gateway: Key| {
        let mut body = objects.get(&gateway)?.body.clone();
        let service = services.iter().find(|service| {
            service.metadata.name.as_deref() == Some(&gateway.name)
                && service.metadata.namespace.as_deref() == Some(&gateway.namespace)
        });
        let addresses = service?.spec.as_ref()?.cluster_ips.clone().unwrap_or_default();
        let address = |value: String| json!({ "type": "IPAddress", "value": value });
        body["status"]["addresses"] = addresses.into_iter().map(address).collect();
        Some((gateway, body))
    };
    gateways(objects).into_iter().filter_map(with_status).collect()
}

/// The file with the token of a waypoint's service account, written when it is asked for first and renewed with the others.
fn token(shared: &Shared, gateway: &Key) -> Result<std::path::PathBuf> {
    let directory = shared.directory.join("waypoints");
    let file = directory.join(format!("{}_{}.token", gateway.namespace, gateway.name));
    let mut tokens = shared.tokens.lock();
    if tokens.iter().any(|(_, known)| *known == file) {
        return Ok(file);
    }
    std::fs::create_dir_all(&directory)
        .map_err(Error::system(format!("make directory {}", directory.display())))?;
    let subject = Subject {
        namespace: gateway.namespace.clone(),
        service_account: gateway.name.clone(),
        pod: None,
        node: None,
    };
    shared.signer.write(&subject, shared.token_lifetime, &file)?;
    tokens.push((subject, file.clone()));
    Ok(file)
}

fn metadata(gateway: &Key) -> Value {
    json!({
        "name": gateway.name,
        "namespace": gateway.namespace,
        "labels": { GATEWAY_NAME: gateway.name },
    })
}

fn account(gateway: &Key) -> Value {
    json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(gateway) })
}

/// The ports of a gateway's Service: those of its listeners and of its ListenerSets, each once.
fn ports(objects: &BTreeMap<Key, Object>, gateway: &Key) -> Vec<Value> {
    let is_parent = |key: &Key, body: &Value| {
        let parent = &body["spec"]["parentRef"];
        let namespace = parent["namespace"].as_str().unwrap_or(&key.namespace);
        parent["name"] == gateway.name && namespace == gateway.namespace
    };
    let sets = objects.iter().filter(|(key, set)| key.kind == "ListenerSet" && is_parent(key, &set.body));
    let all = objects.get(gateway).into_iter().chain(sets.map(|(_, set)| set));
    let listeners = all.flat_map(|object| object.body["spec"]["listeners"].as_array().into_iter().flatten());
    let mut ports = BTreeMap::new();
    let https = json!({ "port": 443, "protocol": "HTTPS" });
    // Whichever Gateway serves an Ingress with certificates needs the port.
    let has_tls = |(key, object): (&Key, &Object)| {
        key.kind == "Ingress" && object.body["spec"]["tls"].as_array().is_some_and(|tls| !tls.is_empty())
    };
    let is_gateway =
        objects.get(gateway).is_some_and(|object| object.body["spec"]["gatewayClassName"] == "ambit");
    let of_ingresses = (is_gateway && objects.iter().any(has_tls)).then_some(&https);
    for listener in listeners.chain(of_ingresses) {
        let Some(port) = listener["port"].as_u64() else { continue };
        let is_udp = listener["protocol"] == "UDP";
        let object = match listener["protocol"].as_str() {
            Some("HBONE") => json!({ "name": "mesh", "port": port, "appProtocol": "hbone" }),
            Some("UDP") => json!({ "name": format!("udp-{port}"), "port": port, "protocol": "UDP" }),
            // Nothing is known of what passes a port before the gateway has read it.
            _ => json!({ "name": format!("tcp-{port}"), "port": port }),
        };
        ports.entry((port, is_udp)).or_insert(object);
    }
    ports.into_values().collect()
}

fn service(gateway: &Key, ports: &[Value]) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(gateway),
        "spec": {
            "selector": { GATEWAY_NAME: gateway.name },
            "ports": ports,
        },
    })
}

/// Its pods: one, unless its annotation says more.
fn replicas(objects: &BTreeMap<Key, Object>, gateway: &Key) -> u32 {
    let annotations = objects.get(gateway).map(|object| &object.body["metadata"]["annotations"]);
    let replicas = annotations.and_then(|annotations| annotations[REPLICAS].as_str());
    replicas.and_then(|replicas| replicas.parse().ok()).unwrap_or(1)
}

fn deployment(
    shared: &Shared,
    gateway: &Key,
    replicas: u32,
    env: &BTreeMap<String, String>,
    token: &std::path::Path,
) -> Value {
    let field =
        |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let value = |name: &str, value: String| json!({ "name": name, "value": value });
    let root = root_file(shared).display().to_string();
    let control = SocketAddr::new(IpAddr::V4(CONTROL_V4), ports::CONTROL_PLANE).to_string();
    let mut variables = vec![
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        value("SERVICE_ACCOUNT", gateway.name.clone()),
        value("XDS_ADDRESS", control),
        value("XDS_ROOT_CA", root.clone()),
        value("AUTH_TOKEN", token.display().to_string()),
        value("AMBIT_WAYPOINT_WORKLOAD_ROOT", root),
        value("AMBIT_WAYPOINT_TRUST_DOMAIN", shared.trust_domain.clone()),
        // Peers on one machine learn soon, and nobody wants to wait for the end of a mesh.
        value("AMBIT_WAYPOINT_DRAIN_MINIMUM", "1s".to_owned()),
    ];
    variables.extend(env.iter().map(|(name, text)| value(name, text.clone())));
    let labels = json!({ GATEWAY_NAME: gateway.name, "istio.io/dataplane-mode": "none" });
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(gateway),
        "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": { GATEWAY_NAME: gateway.name } },
            "template": {
                "metadata": { "labels": labels },
                "spec": {
                    "serviceAccountName": gateway.name,
                    "terminationGracePeriodSeconds": 60,
                    "containers": [{
                        "name": "waypoint",
                        "image": PROGRAM,
                        "env": variables,
                        "readinessProbe": {
                            "httpGet": { "path": "/healthz/ready", "port": ports::READINESS },
                            "periodSeconds": 1,
                        },
                    }],
                },
            },
        },
    })
}

//! The objects of a waypoint or gateway: what each must be, and whether it is. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use ambit_api::ports;
use kube::core::{ApiResource, GroupVersionKind};
use serde::Deserialize;
use serde_json::{Value, json};

use super::overlay::overlay;
use super::template::Template;
use crate::api_server::FIELD_MANAGER;
use crate::object::Transport;

/// Label that names the Gateway of an object, by which pods and Services of waypoints are found.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const GATEWAY_CLASS: &str = "gateway.networking.k8s.io/gateway-class-name";
/// Label by which Kiali and other tools for Istio recognise waypoints.
const MANAGED: (&str, &str) = ("gateway.istio.io/managed", "istio.io-mesh-controller");
/// The same for gateways.
const MANAGED_GATEWAY: (&str, &str) = ("gateway.istio.io/managed", "istio.io-gateway-controller");
/// Annotation of a Gateway: the type of its Service.
const SERVICE_TYPE: &str = "networking.istio.io/service-type";
/// The type of a gateway's Service unless its annotation names another one.
const LOAD_BALANCER: &str = "LoadBalancer";
/// The routability of an address that is a Service's cluster IP.
const CLUSTER: &str = "Cluster";
const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
/// Annotation that changes with the manifest, so that fields that it no longer has are removed.
const MANIFEST_HASH: &str = "ambit.dev/manifest-hash";
/// Longest value of a label, and longest name of a Service.
const LONGEST_NAME: usize = 63;
/// The setting of the program that says how long it drains.
const DRAIN_TIMEOUT: &str = "AMBIT_WAYPOINT_DRAIN_TIMEOUT";
/// Seconds of a grace period that are left when the drain time is over: to close and report what is still open.
const AFTER_DRAIN: u64 = 5;
/// What the API server takes where a pod has no grace period of its own.
const DEFAULT_GRACE: u64 = 30;

/// A kind of object that a waypoint has one of, under the name of its Gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    ServiceAccount,
    Service,
    Deployment,
    PodDisruptionBudget,
    HorizontalPodAutoscaler,
}

impl Part {
    /// Every part, what serves last.
    pub(super) const ALL: [Part; 5] = [
        Part::HorizontalPodAutoscaler,
        Part::PodDisruptionBudget,
        Part::Service,
        Part::Deployment,
        Part::ServiceAccount,
    ];

    /// The kind as the API server has it.
    pub(super) fn resource(self) -> ApiResource {
        let (group, version, kind, plural) = match self {
            Part::ServiceAccount => ("", "v1", "ServiceAccount", "serviceaccounts"),
            Part::Service => ("", "v1", "Service", "services"),
            Part::Deployment => ("apps", "v1", "Deployment", "deployments"),
            Part::PodDisruptionBudget => ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
            Part::HorizontalPodAutoscaler => {
                ("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
            }
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
    }
}

/// What the manifests of a waypoint need of its Gateway.
#[derive(Debug, Deserialize)]
pub(super) struct WaypointGateway {
    metadata: GatewayMetadata,
    spec: GatewaySpec,
    #[serde(skip)]
    role: Role,
    /// Ports of listeners that are not its own.
    #[serde(skip)]
    added_ports: BTreeSet<(u16, Transport)>,
}

/// Whose connections a Gateway takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Role {
    /// Those of the mesh.
    #[default]
    Waypoint,
    /// Those of clients outside of it.
    Gateway,
}

#[derive(Debug, Deserialize)]
struct GatewayMetadata {
    name: String,
    namespace: String,
    uid: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct GatewaySpec {
    gateway_class_name: String,
    #[serde(default)]
    infrastructure: Infrastructure,
    #[serde(default)]
    listeners: Vec<GatewayListener>,
    #[serde(default)]
    addresses: Vec<GatewayAddress>,
}

#[derive(Debug, Deserialize)]
struct GatewayListener {
    port: u16,
    #[serde(default)]
    protocol: String,
}

impl GatewayListener {
    fn transport(&self) -> Transport {
        if self.protocol == "UDP" { Transport::Udp } else { Transport::Tcp }
    }
}

#[derive(Debug, Deserialize)]
struct GatewayAddress {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    value: String,
    #[serde(default)]
    routability: String,
}

/// Addresses that a Gateway asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct WantedAddresses<'g> {
    /// Values of those of the load balancer. Its Service asks for the first.
    pub(super) default: Vec<&'g str>,
    /// Whether the cluster IP is asked for (`routability: Cluster`), ...
    pub(super) in_cluster: bool,
    /// ... and which.
    pub(super) cluster_ips: Vec<&'g str>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Infrastructure {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    parameters_ref: Option<ParametersRef>,
}

#[derive(Debug, Deserialize)]
struct ParametersRef {
    group: String,
    kind: String,
    name: String,
}

impl WaypointGateway {
    pub(super) fn class(&self) -> &str {
        &self.spec.gateway_class_name
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    pub(super) fn with_role(self, role: Role) -> Self {
        Self { role, ..self }
    }

    /// With the ports of listeners that ListenerSets add.
    pub(super) fn with_added_ports(self, added_ports: BTreeSet<(u16, Transport)>) -> Self {
        Self { added_ports, ..self }
    }

    /// The type of a gateway's Service: that of its annotation, else as its addresses are to be reached.
    ///
    /// # Errors
    /// When its annotation names none.
    pub(super) fn service_type(&self) -> Result<&str, String> {
        let addresses = &self.spec.addresses;
        let in_cluster = !addresses.is_empty() && addresses.iter().all(|it| it.routability == CLUSTER);
        let default = if in_cluster { "ClusterIP" } else { LOAD_BALANCER };
        match self.metadata.annotations.get(SERVICE_TYPE).map_or(default, String::as_str) {
            known @ (LOAD_BALANCER | "NodePort" | "ClusterIP") => Ok(known),
            other => Err(format!("{SERVICE_TYPE} is {other:?}, not LoadBalancer, NodePort or ClusterIP")),
        }
    }

    /// The addresses that a gateway is to have.
    ///
    /// # Errors
    /// What is wrong with those that it asks for.
    pub(super) fn wanted_addresses(&self) -> Result<WantedAddresses<'_>, String> {
        let mut wanted = WantedAddresses::default();
        for GatewayAddress { kind, value, routability } in &self.spec.addresses {
            let is_ip = kind.as_deref().is_none_or(|kind| kind == "IPAddress");
            if !is_ip && (!value.is_empty() || routability == CLUSTER) {
                let kind = kind.as_deref().unwrap_or_default();
                return Err(format!("an address of type {kind} can't be asked for, only an IPAddress"));
            }
            match routability.as_str() {
                "" => wanted.default.extend(Some(value.as_str()).filter(|value| !value.is_empty())),
                CLUSTER => {
                    wanted.in_cluster = true;
                    wanted.cluster_ips.extend(Some(value.as_str()).filter(|value| !value.is_empty()));
                }
                other => return Err(format!("addresses can't have the routability {other}, only {CLUSTER}")),
            }
        }
        let kind = self.service_type().unwrap_or_default();
        if !wanted.default.is_empty() && kind != LOAD_BALANCER {
            return Err(format!(
                "a Service of type {kind} can't have the address that spec.addresses asks for"
            ));
        }
        Ok(wanted)
    }

    /// The ConfigMap with the Gateway's parameters, if it names one.
    ///
    /// # Errors
    /// When it names something else.
    pub(super) fn config_map(&self) -> Result<Option<&str>, String> {
        match &self.spec.infrastructure.parameters_ref {
            None => Ok(None),
            Some(ParametersRef { group, kind, name }) if group.is_empty() && kind == "ConfigMap" => {
                Ok(Some(name))
            }
            Some(ParametersRef { kind, name, .. }) => {
                Err(format!("parameters are read from a ConfigMap, not from {kind} {name}"))
            }
        }
    }

    /// Whether an object was made for this Gateway.
    pub(super) fn owns(&self, object: &Value) -> bool {
        let owners = object["metadata"]["ownerReferences"].as_array();
        owners.into_iter().flatten().any(|owner| {
            owner["uid"].as_str() == Some(&self.metadata.uid) && owner["controller"].as_bool() == Some(true)
        })
    }

    /// Whether an object was made for this Gateway by this control plane, for one of its classes: another controller may have
    /// made one of the same name for the class that the Gateway has now.
    pub(super) fn is_left(&self, object: &Value, classes: &[Arc<str>]) -> bool {
        let metadata = &object["metadata"];
        let class = metadata["labels"][GATEWAY_CLASS].as_str();
        self.owns(object)
            && metadata["annotations"][MANIFEST_HASH].is_string()
            && classes.iter().any(|ours| class == Some(ours))
    }

    fn labels(&self) -> BTreeMap<&str, &str> {
        let GatewayMetadata { name, labels, .. } = &self.metadata;
        let copied = self.spec.infrastructure.labels.iter();
        let mut all: BTreeMap<&str, &str> =
            copied.map(|(key, value)| (key.as_str(), value.as_str())).collect();
        // Ours come last: by them the mesh recognises what belongs to a waypoint.
        all.extend([(GATEWAY_NAME, name.as_str()), (GATEWAY_CLASS, self.class())]);
        match self.role {
            Role::Waypoint => {
                let waypoint_for = labels.get(WAYPOINT_FOR).map_or("service", String::as_str);
                all.extend([MANAGED, (WAYPOINT_FOR, waypoint_for)]);
            }
            Role::Gateway => all.extend([MANAGED_GATEWAY]),
        }
        all
    }

    fn metadata(&self) -> Value {
        let GatewayMetadata { name, namespace, uid, .. } = &self.metadata;
        let owner = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "name": name, "uid": uid, "controller": true,
        });
        json!({
            "name": name, "namespace": namespace, "labels": self.labels(),
            "annotations": self.spec.infrastructure.annotations, "ownerReferences": [owner],
        })
    }
}

/// What each part of a waypoint must be; `None` for one that it must not have.
///
/// # Errors
/// Why there can be no waypoint for the Gateway.
pub(super) fn manifests(
    gateway: &WaypointGateway,
    template: &Template,
    parameters: Option<&Template>,
) -> Result<Vec<(Part, Option<Value>)>, String> {
    if gateway.metadata.name.len() > LONGEST_NAME {
        return Err(format!("the name of a Gateway has at most {LONGEST_NAME} characters"));
    }
    let none = Template::default();
    let layers = [template, parameters.unwrap_or(&none)];
    let of = |part: Part, spec: Value, patches: [&Value; 2]| (part, manifest(gateway, part, spec, patches));
    let budget = layers.map(|layer| layer.pod_disruption_budget.as_ref());
    let scaler = layers.map(|layer| layer.horizontal_pod_autoscaler.as_ref());
    let (scales, is_limited) = (scaler.iter().any(Option::is_some), budget.iter().any(Option::is_some));
    let (account, service) = (layers.map(|l| &l.service_account), layers.map(|l| &l.service));
    let mut deployment = of(Part::Deployment, deployment_spec(gateway), layers.map(|l| &l.deployment)).1;
    set_drain_time(&mut deployment, parameters);
    if scales && let Some(spec) = deployment["spec"].as_object_mut() {
        // The autoscaler's number must not be overwritten.
        spec.remove("replicas");
    }
    let null = Value::Null;
    let budget = of(Part::PodDisruptionBudget, budget_spec(gateway), budget.map(|b| b.unwrap_or(&null)));
    let scaler = of(Part::HorizontalPodAutoscaler, scaler_spec(gateway), scaler.map(|s| s.unwrap_or(&null)));
    let service_spec = match gateway.role {
        Role::Waypoint => service_spec(gateway),
        Role::Gateway => gateway_service_spec(gateway)?,
    };
    let parts = [
        of(Part::ServiceAccount, Value::Null, account),
        of(Part::Service, service_spec, service),
        (Part::Deployment, deployment),
    ];
    let wanted = parts.into_iter().map(|(part, manifest)| (part, Some(manifest)));
    let optional =
        [(budget.0, Some(budget.1).filter(|_| is_limited)), (scaler.0, Some(scaler.1).filter(|_| scales))];
    Ok(wanted.chain(optional).map(|(part, manifest)| (part, manifest.map(with_hash))).collect())
}

/// A part: what it must have, under everything that may be changed of it.
fn manifest(gateway: &WaypointGateway, part: Part, spec: Value, patches: [&Value; 2]) -> Value {
    let mut manifest = json!({ "metadata": { "annotations": gateway.spec.infrastructure.annotations } });
    if !spec.is_null() {
        manifest["spec"] = spec;
    }
    for patch in patches {
        if patch.is_object() {
            overlay(&mut manifest, patch);
        }
    }
    let ApiResource { api_version, kind, .. } = part.resource();
    let fixed = json!({ "apiVersion": api_version, "kind": kind, "metadata": gateway.metadata() });
    overlay(&mut manifest, &fixed);
    if part == Part::Deployment {
        // No label may take a pod out of its waypoint, or into the mesh that it is a part of.
        let mut labels = json!(gateway.labels());
        labels["istio.io/dataplane-mode"] = "none".into();
        labels["sidecar.istio.io/inject"] = "false".into();
        overlay(&mut manifest, &json!({ "spec": { "template": { "metadata": { "labels": labels } } } }));
    }
    manifest
}

/// Lets the program drain for as long as its pod's grace period allows. A time that the installation sets holds unless the
/// Gateway has a grace period of its own.
fn set_drain_time(deployment: &mut Value, parameters: Option<&Template>) {
    const POD: &str = "/spec/template/spec";
    const GRACE: &str = "terminationGracePeriodSeconds";
    let Some(pod) = deployment.pointer(POD) else { return };
    let own = parameters.and_then(|parameters| parameters.deployment.pointer(POD));
    let is_own = own.is_some_and(|pod| pod.get(GRACE).is_some());
    let containers = pod["containers"].as_array().into_iter().flatten();
    let mut variables = containers.flat_map(|container| container["env"].as_array().into_iter().flatten());
    if variables.any(|variable| variable["name"] == DRAIN_TIMEOUT) && !is_own {
        return;
    }
    let grace = pod[GRACE].as_u64().unwrap_or(DEFAULT_GRACE);
    let drain = format!("{}s", grace.saturating_sub(AFTER_DRAIN).max(1));
    let variable = json!({ "name": DRAIN_TIMEOUT, "value": drain });
    let container = json!({ "name": "waypoint", "env": [variable] });
    let pod = json!({ "spec": { "containers": [container] } });
    overlay(deployment, &json!({ "spec": { "template": pod } }));
}

fn selector(gateway: &WaypointGateway) -> Value {
    json!({ GATEWAY_NAME: gateway.metadata.name })
}

fn service_spec(gateway: &WaypointGateway) -> Value {
    json!({
        "selector": selector(gateway),
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{ "name": "mesh", "port": ports::INBOUND_HBONE, "targetPort": ports::INBOUND_HBONE, "appProtocol": "hbone" }],
    })
}

/// The Service of a gateway: the ports of its listeners, each once.
fn gateway_service_spec(gateway: &WaypointGateway) -> Result<Value, String> {
    let own = gateway.spec.listeners.iter().map(|listener| (listener.port, listener.transport()));
    let ports: BTreeSet<(u16, Transport)> = own.chain(gateway.added_ports.iter().copied()).collect();
    let port = |(port, transport): (u16, Transport)| {
        // Ports of a Service have names of their own, and one number may be there for both.
        let (name, protocol) = match transport {
            Transport::Tcp => (format!("port-{port}"), "TCP"),
            Transport::Udp => (format!("port-{port}-udp"), "UDP"),
        };
        json!({ "name": name, "port": port, "targetPort": port, "protocol": protocol })
    };
    let kind = gateway.service_type()?;
    let mut spec = json!({
        "selector": selector(gateway),
        "type": kind,
        "ipFamilyPolicy": "PreferDualStack",
        "ports": ports.into_iter().map(port).collect::<Vec<_>>(),
    });
    let wanted = gateway.wanted_addresses()?;
    if let Some(address) = wanted.default.first() {
        spec["loadBalancerIP"] = (*address).into();
    }
    if let Some(address) = wanted.cluster_ips.first() {
        spec["clusterIP"] = (*address).into();
    }
    Ok(spec)
}

fn budget_spec(gateway: &WaypointGateway) -> Value {
    json!({ "selector": { "matchLabels": selector(gateway) } })
}

fn scaler_spec(gateway: &WaypointGateway) -> Value {
    let target = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "name": gateway.metadata.name });
    json!({ "scaleTargetRef": target })
}

fn deployment_spec(gateway: &WaypointGateway) -> Value {
    let field =
        |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let port = |name: &str, number: u16| json!({ "name": name, "containerPort": number });
    let mount = |name: &str, path: &str| json!({ "name": name, "mountPath": path, "readOnly": true });
    let (metrics, readiness) = (("http-metrics", ports::METRICS), ("readiness", ports::READINESS));
    let ports: Vec<Value> = match gateway.role {
        Role::Waypoint => vec![("mesh", ports::INBOUND_HBONE), metrics, readiness],
        Role::Gateway => vec![metrics, readiness],
    }
    .into_iter()
    .map(|(name, number)| port(name, number))
    .collect();
    let security = match gateway.role {
        Role::Waypoint => json!({}),
        // Listeners have ports such as 80; no capability is needed for that in a pod of its own.
        Role::Gateway => {
            json!({ "sysctls": [{ "name": "net.ipv4.ip_unprivileged_port_start", "value": "0" }] })
        }
    };
    let token = json!({ "path": "istio-token", "audience": "istio-ca", "expirationSeconds": 43200 });
    json!({
        "selector": { "matchLabels": selector(gateway) },
        // The next pod serves before one ends, and requests find a waypoint all the time.
        "strategy": { "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } },
        "template": {
            "metadata": { "annotations": gateway.spec.infrastructure.annotations },
            "spec": {
                "serviceAccountName": gateway.metadata.name,
                "securityContext": security,
                "automountServiceAccountToken": false,
                "containers": [{
                    "name": "waypoint",
                    "env": [
                        field("POD_NAME", "metadata.name"),
                        field("POD_NAMESPACE", "metadata.namespace"),
                        field("INSTANCE_IP", "status.podIP"),
                        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
                    ],
                    "ports": ports,
                    "readinessProbe": {
                        "httpGet": { "path": "/healthz/ready", "port": "readiness" }, "periodSeconds": 3,
                    },
                    "volumeMounts": [
                        mount("root-certificate", "/var/run/secrets/istio"),
                        mount("token", "/var/run/secrets/tokens"),
                    ],
                }],
                "volumes": [
                    { "name": "root-certificate", "configMap": { "name": "istio-ca-root-cert" } },
                    { "name": "token", "projected": { "sources": [{ "serviceAccountToken": token }] } },
                ],
            },
        },
    })
}

fn with_hash(mut manifest: Value) -> Value {
    let mut hasher = DefaultHasher::new();
    manifest.to_string().hash(&mut hasher);
    manifest["metadata"]["annotations"][MANIFEST_HASH] = format!("{:016x}", hasher.finish()).into();
    manifest
}

/// Whether the apply of `manifest` would take the number of pods back to the default, because it no longer names the number
/// that this control plane set. Then this is what another field manager must apply before, so that the number stays.
pub(super) fn kept_replicas(present: &Value, manifest: &Value) -> Option<Value> {
    let replicas = present["spec"]["replicas"].as_u64()?;
    if manifest["kind"] != "Deployment" || manifest["spec"].get("replicas").is_some() {
        return None;
    }
    let entries = present["metadata"]["managedFields"].as_array();
    let is_ours = entries.into_iter().flatten().any(|entry| {
        let owns = !entry["fieldsV1"]["f:spec"]["f:replicas"].is_null();
        entry["manager"] == FIELD_MANAGER && entry["operation"] == "Apply" && owns
    });
    let metadata = &present["metadata"];
    is_ours.then(|| {
        json!({
            "apiVersion": manifest["apiVersion"], "kind": manifest["kind"],
            "metadata": { "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"] },
            "spec": { "replicas": replicas },
        })
    })
}

/// Whether an object has everything that a manifest says.
pub(super) fn has_all_of(object: &Value, manifest: &Value) -> bool {
    match (object, manifest) {
        (Value::Object(object), Value::Object(manifest)) => manifest.iter().all(|(key, wanted)| {
            // The API server leaves out what is empty.
            let is_empty = *wanted == json!({}) || *wanted == json!("");
            object.get(key).map_or(is_empty, |value| has_all_of(value, wanted))
        }),
        (Value::Array(object), Value::Array(manifest)) => {
            object.len() == manifest.len() && object.iter().zip(manifest).all(|(a, b)| has_all_of(a, b))
        }
        (object, manifest) => object == manifest,
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;

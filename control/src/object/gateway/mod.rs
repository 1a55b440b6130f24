//! Gateways: waypoints, gateways for clients outside the mesh, and the ways into other networks.

pub(super) mod backend_tls;
pub(super) mod binding;
pub(super) mod external_auth;
pub(super) mod grant;
pub(super) mod grpc;
pub(super) mod http;
pub(super) mod listener;
pub(super) mod listener_set;
pub(super) mod roots;
pub(super) mod route;
mod session;
pub(super) mod stream;
pub(super) mod tls;
pub(super) mod topology;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::ports::INBOUND_HBONE;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::Deserialize;

use super::NamespacedName;
use super::core::cluster::NETWORK;
use super::meta::{Invalid, Labels, Meta, annotation};
use listener::Listener;
use tls::GatewayTls;
use topology::Topology;

/// What a waypoint is for (label `istio.io/waypoint-for`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaypointFor {
    /// Connections to services; the default.
    Service,
    /// Connections to workload addresses.
    Workload,
    /// Both.
    All,
    /// Neither.
    None,
}

/// A requirement of a label selector beyond equality.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelRequirement {
    /// The label.
    pub key: Arc<str>,
    /// What it must be.
    pub requirement: Requirement,
}

/// What a label must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    /// Present with one of these values.
    In(Vec<Arc<str>>),
    /// Absent, or with none of these values.
    NotIn(Vec<Arc<str>>),
    /// Present.
    Exists,
    /// Absent.
    DoesNotExist,
}

impl LabelRequirement {
    fn is_met(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        let among = |values: &[Arc<str>]| value.is_some_and(|v| values.iter().any(|o| &**o == v));
        match &self.requirement {
            Requirement::In(values) => among(values),
            Requirement::NotIn(values) => !among(values),
            Requirement::Exists => value.is_some(),
            Requirement::DoesNotExist => value.is_none(),
        }
    }
}

/// From which namespaces the gateway may be used (`allowedRoutes.namespaces`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedNamespaces {
    /// None, not even its own.
    Nobody,
    /// Its own; the default.
    Same,
    /// Every one.
    All,
    /// Those whose labels match.
    Selector {
        /// By equality.
        labels: Labels,
        /// By expressions.
        requirements: Vec<LabelRequirement>,
    },
}

impl AllowedNamespaces {
    /// Whether a namespace with these labels, other than the gateway's own, may use it.
    pub fn allows(&self, namespace: &Labels) -> bool {
        match self {
            AllowedNamespaces::Nobody | AllowedNamespaces::Same => false,
            AllowedNamespaces::All => true,
            AllowedNamespaces::Selector { labels, requirements } => {
                namespace.satisfy(labels) && requirements.iter().all(|r| r.is_met(namespace))
            }
        }
    }
}

/// An address of a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressValue {
    /// An IP address.
    Ip(IpAddr),
    /// A DNS name.
    Hostname(Arc<str>),
}

/// How the gateway's own pods want their connections, if not by HBONE
/// (annotation `ambient.istio.io/waypoint-inbound-binding`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    /// With a PROXY header in front.
    pub proxy: bool,
    /// To this port; 0 keeps the port that was dialled.
    pub port: u16,
}

/// A gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Name, labels and age.
    pub meta: Meta,
    /// `gatewayClassName`
    pub class: Arc<str>,
    /// What it is for, as a waypoint.
    pub waypoint_for: WaypointFor,
    /// Who may use its HBONE listener; `None` when it has no such listener.
    pub hbone: Option<AllowedNamespaces>,
    /// Its listeners.
    pub listeners: Vec<Listener>,
    /// From which namespaces ListenerSets may add listeners.
    pub listener_sets: AllowedNamespaces,
    /// What is asked of certificates of clients, and what is shown to endpoints.
    pub tls: GatewayTls,
    /// `status.addresses`: where it is reached, once it is ready.
    pub addresses: Vec<AddressValue>,
    /// `spec.addresses`: where a gateway of another network is.
    pub requested: Vec<AddressValue>,
    /// The network that it leads into.
    pub network: Option<Arc<str>>,
    /// Identity of a gateway of another network (annotation `gateway.istio.io/service-account`).
    pub service_account: Option<Arc<str>>,
    /// Trust domain of a gateway of another network (annotation `gateway.istio.io/trust-domain`).
    pub trust_domain: Option<Arc<str>>,
    /// How its pods want their connections.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Whether it reports to endpoints who the client is (annotation `ambient.istio.io/xfcc-include-client-identity`).
    pub forwards_client_identity: bool,
    /// Which proxies in front of it are believed, or what of that can't be read.
    pub topology: Result<Topology, String>,
    /// The gateways that it believes about their clients, as a waypoint.
    pub trusted_gateways: Vec<NamespacedName>,
}

impl Gateway {
    /// The IP addresses among `spec.addresses`.
    pub fn requested_ips(&self) -> impl Iterator<Item = IpAddr> {
        self.requested.iter().filter_map(|address| match address {
            AddressValue::Ip(address) => Some(*address),
            AddressValue::Hostname(_) => None,
        })
    }
}

/// The manifest; fields that the mesh does not read are not listed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    gateway_class_name: String,
    #[serde(default)]
    listeners: Vec<listener::Manifest>,
    #[serde(default)]
    tls: tls::Manifest,
    #[serde(default)]
    allowed_listeners: AllowedListeners,
    #[serde(default)]
    addresses: Vec<Address>,
    #[serde(default)]
    infrastructure: Infrastructure,
}

#[derive(Debug, Default, Deserialize)]
struct Infrastructure {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Default, Deserialize)]
struct AllowedListeners {
    #[serde(default)]
    namespaces: RouteNamespaces,
}

#[derive(Debug, Default, Deserialize)]
struct AllowedRoutes {
    #[serde(default)]
    namespaces: RouteNamespaces,
    #[serde(default)]
    kinds: Vec<listener::RouteKind>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct RouteNamespaces {
    from: Option<Admitted>,
    selector: Option<LabelSelector>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum Admitted {
    Same,
    All,
    Selector,
    None,
}

#[derive(Debug, Default, Deserialize)]
struct Status {
    #[serde(default)]
    addresses: Vec<Address>,
}

#[derive(Debug, Deserialize)]
struct Address {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    value: String,
}

impl TryFrom<Manifest> for Gateway {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<Gateway, Invalid> {
        let Manifest { metadata, spec, status } = manifest;
        let meta = Meta::read(&metadata)?;
        let hbone =
            spec.listeners.iter().find(|l| l.port == i32::from(INBOUND_HBONE) && l.protocol == "HBONE");
        let tunnel = annotation(&metadata, "ambient.istio.io/waypoint-inbound-binding");
        Ok(Gateway {
            class: spec.gateway_class_name.into(),
            waypoint_for: match meta.labels.get("istio.io/waypoint-for") {
                Some("workload") => WaypointFor::Workload,
                Some("all") => WaypointFor::All,
                Some("none") => WaypointFor::None,
                _ => WaypointFor::Service,
            },
            hbone: hbone.map(|l| allowed(l.allowed_routes.namespaces.clone())),
            tls: spec.tls.read(&meta.id.namespace),
            // Gateway API: without the field nobody may.
            listener_sets: match spec.allowed_listeners.namespaces {
                RouteNamespaces { from: None, .. } => AllowedNamespaces::Nobody,
                namespaces => allowed(namespaces),
            },
            listeners: spec.listeners.into_iter().filter_map(|l| l.read(&meta.id.namespace)).collect(),
            addresses: read_addresses("status.addresses", &status.addresses)?,
            requested: read_addresses("spec.addresses", &spec.addresses)?,
            network: meta.labels.get(NETWORK).map(Arc::from),
            service_account: annotation(&metadata, "gateway.istio.io/service-account").map(Arc::from),
            trust_domain: annotation(&metadata, "gateway.istio.io/trust-domain").map(Arc::from),
            application_tunnel: tunnel.map(application_tunnel).transpose()?,
            forwards_client_identity: annotation(&metadata, "ambient.istio.io/xfcc-include-client-identity")
                == Some("true"),
            topology: Topology::read(
                &metadata,
                &ObjectMeta { annotations: spec.infrastructure.annotations, ..ObjectMeta::default() },
            ),
            trusted_gateways: topology::trusted_gateways(&metadata, &meta.id.namespace),
            meta,
        })
    }
}

fn allowed(namespaces: RouteNamespaces) -> AllowedNamespaces {
    match namespaces.from {
        None | Some(Admitted::Same) => AllowedNamespaces::Same,
        Some(Admitted::None) => AllowedNamespaces::Nobody,
        Some(Admitted::All) => AllowedNamespaces::All,
        // Gateway API: a selector that is missing selects nothing.
        Some(Admitted::Selector) => namespaces.selector.map_or(AllowedNamespaces::Same, read_selector),
    }
}

fn read_selector(selector: LabelSelector) -> AllowedNamespaces {
    let mut requirements = Vec::new();
    for expression in selector.match_expressions.into_iter().flatten() {
        let values = expression.values.into_iter().flatten().map(Arc::from).collect();
        let requirement = match expression.operator.as_str() {
            "In" => Requirement::In(values),
            "NotIn" => Requirement::NotIn(values),
            "Exists" => Requirement::Exists,
            "DoesNotExist" => Requirement::DoesNotExist,
            // An operator that is not known can't be met, so it admits nobody.
            _ => Requirement::In(Vec::new()),
        };
        requirements.push(LabelRequirement { key: expression.key.into(), requirement });
    }
    let labels = selector.match_labels.into_iter().flatten().collect();
    AllowedNamespaces::Selector { labels, requirements }
}

fn read_addresses(field: &str, addresses: &[Address]) -> Result<Vec<AddressValue>, Invalid> {
    let mut values = Vec::new();
    for address in addresses.iter().filter(|a| !a.value.is_empty()) {
        match address.kind.as_deref() {
            None | Some("IPAddress") => {
                let ip = address.value.parse();
                let ip =
                    ip.map_err(|_| Invalid::new(field, format!("{:?} is no IP address", address.value)))?;
                values.push(AddressValue::Ip(ip));
            }
            Some("Hostname") => values.push(AddressValue::Hostname(address.value.as_str().into())),
            Some(_) => {}
        }
    }
    Ok(values)
}

/// `PROXY`, `PROXY/15088` or `NONE/15088`.
fn application_tunnel(text: &str) -> Result<ApplicationTunnel, Invalid> {
    let invalid = || {
        let field = "metadata.annotations[ambient.istio.io/waypoint-inbound-binding]";
        Invalid::new(field, format!("{text:?} is neither PROXY nor NONE with an optional /port"))
    };
    let (protocol, port) = text.split_once('/').unwrap_or((text, "0"));
    let proxy = match protocol {
        "PROXY" => true,
        "NONE" => false,
        _ => return Err(invalid()),
    };
    Ok(ApplicationTunnel { proxy, port: port.parse().map_err(|_| invalid())? })
}

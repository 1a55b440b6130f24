//! Routes of Gateway API, whatever their protocol: what is theirs alone is in its final form already, and what refers to
//! other objects waits for the index.

use std::collections::BTreeSet;
use std::sync::Arc;

use ambit_api::l7;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::object::meta::{Invalid, Meta, annotation};
use crate::object::{Kind, NamespacedName, ObjectRef, Transport};

/// A route.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Name, labels and age.
    pub meta: Meta,
    /// What it is for.
    pub protocol: RouteProtocol,
    /// What it wants to be attached to.
    pub parents: Vec<ParentRef>,
    /// Hosts that it is for; a service has its own.
    pub hostnames: Vec<Arc<str>>,
    /// Its rules.
    pub rules: Vec<RouteRule>,
}

/// What a route is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteProtocol {
    /// Requests.
    Http,
    /// Calls.
    Grpc,
    /// Connections.
    Tcp,
    /// Connections that begin with TLS.
    Tls,
    /// Datagrams.
    Udp,
}

impl Route {
    /// The kinds of routes.
    pub const KINDS: [Kind; 5] =
        [Kind::HttpRoute, Kind::GrpcRoute, Kind::TcpRoute, Kind::TlsRoute, Kind::UdpRoute];

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self.protocol {
            RouteProtocol::Http => Kind::HttpRoute,
            RouteProtocol::Grpc => Kind::GrpcRoute,
            RouteProtocol::Tcp => Kind::TcpRoute,
            RouteProtocol::Tls => Kind::TlsRoute,
            RouteProtocol::Udp => Kind::UdpRoute,
        }
    }

    /// What the ports of its backends take.
    pub fn transport(&self) -> Transport {
        match self.protocol {
            RouteProtocol::Http | RouteProtocol::Grpc | RouteProtocol::Tcp | RouteProtocol::Tls => {
                Transport::Tcp
            }
            RouteProtocol::Udp => Transport::Udp,
        }
    }

    /// The Services, ServiceEntries, Gateways and ListenerSets that it wants to be attached to.
    pub fn attaches_to(&self) -> impl Iterator<Item = ObjectRef> {
        self.parents.iter().filter_map(|parent| {
            let kind = match parent.kind {
                TargetKind::Service => Kind::Service,
                TargetKind::ServiceEntry => Kind::ServiceEntry,
                TargetKind::Gateway => Kind::Gateway,
                TargetKind::ListenerSet => Kind::ListenerSet,
                TargetKind::Hostname | TargetKind::Other => return None,
            };
            Some(ObjectRef { kind, name: parent.name.clone() })
        })
    }

    /// Whether it is for the requests of its own namespace to this Service and for nothing else (GEP-1426, consumer routes).
    pub fn is_consumer_of(&self, service: &NamespacedName) -> bool {
        let is_service = |parent: &ParentRef| parent.kind == TargetKind::Service && parent.name == *service;
        !self.parents.is_empty() && self.parents.iter().all(is_service)
    }

    /// Whether it wants to be attached to the same as another, with the same hosts, and refers to the same Services.
    pub fn has_ends_of(&self, other: &Route) -> bool {
        let services = |route: &Route| route.services().collect::<BTreeSet<_>>();
        self.meta.id == other.meta.id
            && self.meta.created == other.meta.created
            && self.protocol == other.protocol
            && self.parents == other.parents
            && self.hostnames == other.hostnames
            && services(self) == services(other)
    }

    /// The Services that it refers to.
    pub fn services(&self) -> impl Iterator<Item = NamespacedName> {
        let references = self.rules.iter().flat_map(RouteRule::references);
        references.filter_map(|reference| match reference.kind {
            TargetKind::Service => Some(reference.name_in(&self.meta.id.namespace)),
            TargetKind::ServiceEntry
            | TargetKind::Hostname
            | TargetKind::Gateway
            | TargetKind::ListenerSet
            | TargetKind::Other => None,
        })
    }
}

/// A rule.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteRule {
    /// The rule without filters and backends.
    pub own: l7::Rule,
    /// In order.
    pub filters: Vec<RouteFilter>,
    /// Where requests go.
    pub backends: Vec<RuleBackend>,
}

impl RouteRule {
    /// A rule that could not be read.
    pub(super) fn unreadable(reason: String) -> RouteRule {
        let own = l7::Rule { invalid: reason, ..l7::Rule::default() };
        RouteRule { own, filters: Vec::new(), backends: Vec::new() }
    }

    fn references(&self) -> impl Iterator<Item = &BackendRef> {
        let of_backends = self.backends.iter().flat_map(|backend| &backend.filters);
        let mirrors = self.filters.iter().chain(of_backends).filter_map(|filter| match filter {
            RouteFilter::Mirror { backend, .. } => Some(backend),
            RouteFilter::Own(_) => None,
        });
        self.backends.iter().map(|backend| &backend.to).chain(mirrors)
    }
}

/// A filter.
#[derive(Clone, Debug, PartialEq)]
pub enum RouteFilter {
    /// One that refers to nothing.
    Own(l7::filter::Kind),
    /// A copy for another backend.
    Mirror {
        /// Where it goes.
        backend: BackendRef,
        /// Of this many requests ...
        denominator: u32,
        /// ... this many are copied.
        numerator: u32,
    },
}

/// A backend with its share.
#[derive(Clone, Debug, PartialEq)]
pub struct RuleBackend {
    /// Where requests go.
    pub to: BackendRef,
    /// In proportion to the others.
    pub weight: u32,
    /// Filters of its share, in order.
    pub filters: Vec<RouteFilter>,
}

/// What kind of thing is referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// A Kubernetes Service.
    Service,
    /// A ServiceEntry: all of its hosts.
    ServiceEntry,
    /// A host name of the mesh (`networking.istio.io/Hostname`).
    Hostname,
    /// A Gateway.
    Gateway,
    /// A ListenerSet.
    ListenerSet,
    /// Anything else.
    Other,
}

impl TargetKind {
    fn of(group: Option<&str>, kind: Option<&str>, default: (&str, &str)) -> TargetKind {
        match (group.unwrap_or(default.0), kind.unwrap_or(default.1)) {
            ("" | "core", "Service") => TargetKind::Service,
            ("networking.istio.io", "ServiceEntry") => TargetKind::ServiceEntry,
            ("networking.istio.io", "Hostname") => TargetKind::Hostname,
            ("gateway.networking.k8s.io", "Gateway") => TargetKind::Gateway,
            ("gateway.networking.k8s.io", "ListenerSet") => TargetKind::ListenerSet,
            _ => TargetKind::Other,
        }
    }
}

/// A reference to a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendRef {
    /// What it is.
    pub kind: TargetKind,
    /// Its kind as written.
    pub kind_name: Arc<str>,
    /// Its namespace; `None`: that of the route.
    pub namespace: Option<Arc<str>>,
    /// Its name.
    pub name: Arc<str>,
    /// Its port.
    pub port: Option<u16>,
}

impl BackendRef {
    /// The object, as a route in `namespace` means it.
    pub fn name_in(&self, namespace: &Arc<str>) -> NamespacedName {
        NamespacedName::new(self.namespace.as_ref().unwrap_or(namespace).clone(), self.name.clone())
    }
}

/// The manifest of a route of any protocol. Rules are read one by one: a bad one spoils no other.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default)]
    parent_refs: Vec<Parent>,
    #[serde(default)]
    hostnames: Vec<String>,
    rules: Option<Vec<Value>>,
}

impl Manifest {
    /// An annotation of the route.
    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        annotation(&self.metadata, key)
    }

    /// The route; `lower` makes one of its rules, and a route without any has those of `default`.
    pub(super) fn read<R: DeserializeOwned>(
        self,
        protocol: RouteProtocol,
        default: Vec<Value>,
        lower: fn(R) -> Result<RouteRule, String>,
    ) -> Result<Route, Invalid> {
        let Manifest { metadata, spec } = self;
        let meta = Meta::read(&metadata)?;
        let read = |value| match serde_path_to_error::deserialize::<_, R>(value) {
            Ok(rule) => lower(rule).unwrap_or_else(RouteRule::unreadable),
            Err(error) => RouteRule::unreadable(error.to_string()),
        };
        Ok(Route {
            protocol,
            parents: spec.parent_refs.into_iter().map(|parent| parent.read(&meta.id.namespace)).collect(),
            hostnames: spec.hostnames.iter().map(|host| host.to_ascii_lowercase().into()).collect(),
            rules: spec.rules.unwrap_or(default).into_iter().map(read).collect(),
            meta,
        })
    }
}

/// What a route wants to be attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentRef {
    /// What it is.
    pub kind: TargetKind,
    /// Its name.
    pub name: NamespacedName,
    /// A single port of it.
    pub port: Option<u16>,
    /// A single section of it: a port of a Service by its name, a listener of a Gateway.
    pub section: Option<Arc<str>>,
}

impl ParentRef {
    /// The `parentRef` of a route in `namespace`, as the API has it.
    pub(crate) fn of_value(value: &Value, namespace: &Arc<str>) -> Option<ParentRef> {
        Parent::deserialize(value).ok().map(|parent| parent.read(namespace))
    }
}

/// A `parentRef` as written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Parent {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<u16>,
    section_name: Option<String>,
}

impl Parent {
    pub(super) fn read(self, namespace: &Arc<str>) -> ParentRef {
        let default = ("gateway.networking.k8s.io", "Gateway");
        ParentRef {
            kind: TargetKind::of(self.group.as_deref(), self.kind.as_deref(), default),
            name: NamespacedName::new(self.namespace.map_or_else(|| namespace.clone(), Arc::from), self.name),
            port: self.port,
            section: self.section_name.map(Arc::from),
        }
    }
}

/// A `backendRef` as written, weight and filters apart.
#[derive(Debug, Deserialize)]
pub(super) struct Reference {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<u16>,
}

impl From<Reference> for BackendRef {
    fn from(reference: Reference) -> BackendRef {
        let Reference { group, kind, namespace, name, port } = reference;
        BackendRef {
            kind: TargetKind::of(group.as_deref(), kind.as_deref(), ("", "Service")),
            kind_name: kind.as_deref().unwrap_or("Service").into(),
            namespace: namespace.map(Arc::from),
            name: name.into(),
            port,
        }
    }
}

/// A length of time as Gateway API writes it: `1h`, `1m30s`, `500ms` (GEP-2257). In nanoseconds.
pub(in crate::object) fn duration(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no duration");
    let mut rest = text;
    let mut millis = 0_u64;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let units = [("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)];
        let unit = units.iter().find_map(|(unit, scale)| Some((tail.strip_prefix(unit)?, *scale)));
        let (tail, scale) = unit.ok_or_else(wrong)?;
        millis = number.checked_mul(scale).and_then(|more| millis.checked_add(more)).ok_or_else(wrong)?;
        rest = tail;
    }
    millis.checked_mul(1_000_000).ok_or_else(wrong)
}

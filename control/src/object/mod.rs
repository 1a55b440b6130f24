//! The Kubernetes objects that the mesh reads, reduced to what it reads of them.
//!
//! `TryFrom` and `Deserialize` turn foreign objects into these at the edge, so the index has nothing left to check. Made
//! by [`crate::intake`], read by [`crate::index`]; nothing here knows files or sockets.

mod core;
mod gateway;
mod istio;
mod meta;
mod traffic_policy;

use std::fmt;
use std::sync::Arc;

pub(crate) use self::core::cluster::identity;
pub use self::core::cluster::{Namespace, Node, ReplicaSet};
pub use self::core::endpoints::{Endpoint, EndpointSlice};
pub use self::core::ingress::{
    BackendPort, HTTPS, INGRESS_CONTROLLER, Ingress, IngressBackend, IngressClass, IngressPath, IngressRule,
};
pub use self::core::pod::Pod;
pub use self::core::secret::{KeyPair, Secret};
pub use self::core::service::{
    AppProtocol, Distribution, IpFamilies, Service, ServicePort, TargetPort, Transport, Visibility,
};
pub use gateway::backend_tls::{BackendTlsPolicy, TlsTarget};
pub(crate) use gateway::binding::CANARY_WEIGHT;
pub use gateway::binding::{Canary, Choice, WaypointBinding};
pub use gateway::external_auth::{ExternalAuth, ExternalAuthProtocol};
pub use gateway::grant::ReferenceGrant;
pub use gateway::listener::{CertificateRef, Listener, ListenerProtocol, ListenerTls};
pub use gateway::listener_set::ListenerSet;
pub use gateway::roots::{RootsHolder, RootsRef};
pub use gateway::route::{
    BackendRef, ParentRef, Route, RouteFilter, RouteProtocol, RouteRule, RuleBackend, TargetKind,
};
pub use gateway::tls::{ClientValidation, GatewayTls};
pub(crate) use gateway::topology::Manifest as GatewayTopology;
pub use gateway::topology::Topology;
pub use gateway::{
    AddressValue, AllowedNamespaces, ApplicationTunnel, Gateway, LabelRequirement, Requirement, WaypointFor,
};
pub use istio::authentication::{MutualTls, PeerAuthentication};
pub(crate) use istio::authorization::service_account;
pub use istio::authorization::{
    Action, AuthorizationPolicy, IpBlock, Operation, PathPattern, Pattern, PolicyBody, PolicyTarget,
    PolicyTargetKind, PortNumber, Rule, Source, TrustDomainPattern,
};
pub use istio::condition::{Attribute, Condition, HttpAttribute, TextKey};
pub use istio::destination_rule::DestinationRule;
pub(crate) use istio::destination_rule::tls::subject_name;
pub use istio::entry::{EntryAddress, EntryPort, Resolution, ServiceEntry, WorkloadEntry, WorkloadSpec};
pub use istio::request_authentication::{JwtRule, KeyAddress, KeySource, RequestAuthentication};
pub use istio::telemetry::{AccessLogRule, MetricOverride, MetricsRule, Mode, Telemetry, TracingRule};
pub use istio::virtual_service::{Destination, Export, PortSelector, ReadRule, VirtualService};
pub use istio::virtual_service_delegate::joined;
pub use istio::virtual_service_http::{Http, Referents};
pub use istio::virtual_service_tcp::{ReadTcp, Tcp};
pub use meta::{Invalid, Labels, Meta, Owner, OwnerKind};
pub use traffic_policy::{TrafficPolicy, TrafficTarget};

pub use crate::kind::Kind;

/// Manifests of the kinds that no library of ours knows.
pub(crate) mod manifest {
    pub(crate) use super::core::secret::Manifest as Secret;
    pub(crate) use super::gateway::Manifest as Gateway;
    pub(crate) use super::gateway::backend_tls::Manifest as BackendTlsPolicy;
    pub(crate) use super::gateway::grant::Manifest as ReferenceGrant;
    pub(crate) use super::gateway::grpc::Manifest as GrpcRoute;
    pub(crate) use super::gateway::http::Manifest as HttpRoute;
    pub(crate) use super::gateway::listener_set::Manifest as ListenerSet;
    pub(crate) use super::gateway::roots::BundleManifest as ClusterTrustBundle;
    pub(crate) use super::gateway::stream::{
        TcpManifest as TcpRoute, TlsManifest as TlsRoute, UdpManifest as UdpRoute,
    };
    pub(crate) use super::istio::authentication::Manifest as PeerAuthentication;
    pub(crate) use super::istio::authorization::Manifest as AuthorizationPolicy;
    pub(crate) use super::istio::destination_rule::Manifest as DestinationRule;
    pub(crate) use super::istio::entry::{
        ServiceManifest as ServiceEntry, WorkloadManifest as WorkloadEntry,
    };
    pub(crate) use super::istio::request_authentication::Manifest as RequestAuthentication;
    pub(crate) use super::istio::telemetry::Manifest as Telemetry;
    pub(crate) use super::istio::virtual_service::Manifest as VirtualService;
    pub(crate) use super::traffic_policy::Manifest as TrafficPolicy;
}

/// The namespace of objects that name none, as `kubectl` has it.
pub const DEFAULT_NAMESPACE: &str = "default";

/// A namespaced name; cluster-scoped objects have an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespacedName {
    /// The namespace, empty for cluster-scoped objects.
    pub namespace: Arc<str>,
    /// The object's name.
    pub name: Arc<str>,
}

impl NamespacedName {
    /// A name in a namespace.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> NamespacedName {
        NamespacedName { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What identifies an object among all.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace and name.
    pub name: NamespacedName,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind.is_namespaced() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}", self.kind, self.name.name)
        }
    }
}

/// An object that the mesh reads; cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A namespace.
    Namespace(Arc<Namespace>),
    /// A node.
    Node(Arc<Node>),
    /// A pod.
    Pod(Arc<Pod>),
    /// A service.
    Service(Arc<Service>),
    /// A service account, of which only the existence is read.
    ServiceAccount(NamespacedName),
    /// A certificate with its key.
    Secret(Arc<Secret>),
    /// Endpoints of a service.
    EndpointSlice(Arc<EndpointSlice>),
    /// A deployment, of which only the existence is read: pods reach it through their owner references.
    Deployment(NamespacedName),
    /// The owner between a pod and its deployment.
    ReplicaSet(Arc<ReplicaSet>),
    /// Who serves Ingresses.
    IngressClass(Arc<IngressClass>),
    /// Where requests of clients outside the mesh go.
    Ingress(Arc<Ingress>),
    /// Who may talk to whom.
    AuthorizationPolicy(Arc<AuthorizationPolicy>),
    /// Whether plaintext is accepted.
    PeerAuthentication(Arc<PeerAuthentication>),
    /// A service outside of Kubernetes.
    ServiceEntry(Arc<ServiceEntry>),
    /// A workload outside of Kubernetes.
    WorkloadEntry(Arc<WorkloadEntry>),
    /// A gateway: a waypoint, or the way into another network.
    Gateway(Arc<Gateway>),
    /// Listeners that are added to a gateway.
    ListenerSet(Arc<ListenerSet>),
    /// Where HTTP requests go.
    HttpRoute(Arc<Route>),
    /// Where gRPC calls go.
    GrpcRoute(Arc<Route>),
    /// Where connections go.
    TcpRoute(Arc<Route>),
    /// Where connections that begin with TLS go.
    TlsRoute(Arc<Route>),
    /// Where datagrams go.
    UdpRoute(Arc<Route>),
    /// Who may refer to objects of a namespace from outside.
    ReferenceGrant(Arc<ReferenceGrant>),
    /// Where requests to hosts go.
    VirtualService(Arc<VirtualService>),
    /// How requests to a host are balanced and limited.
    DestinationRule(Arc<DestinationRule>),
    /// Which tokens of requests are valid.
    RequestAuthentication(Arc<RequestAuthentication>),
    /// One that may hold roots.
    ConfigMap(Arc<RootsHolder>),
    /// One that holds roots.
    ClusterTrustBundle(Arc<RootsHolder>),
    /// TLS to endpoints.
    BackendTlsPolicy(Arc<BackendTlsPolicy>),
    /// How many requests there may be, and which.
    TrafficPolicy(Arc<TrafficPolicy>),
    /// What is reported of requests, and to whom.
    Telemetry(Arc<Telemetry>),
}

impl Object {
    /// The kind of the object.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Namespace(_) => Kind::Namespace,
            Object::Node(_) => Kind::Node,
            Object::Pod(_) => Kind::Pod,
            Object::Service(_) => Kind::Service,
            Object::ServiceAccount(_) => Kind::ServiceAccount,
            Object::Secret(_) => Kind::Secret,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Deployment(_) => Kind::Deployment,
            Object::ReplicaSet(_) => Kind::ReplicaSet,
            Object::IngressClass(_) => Kind::IngressClass,
            Object::Ingress(_) => Kind::Ingress,
            Object::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Object::PeerAuthentication(_) => Kind::PeerAuthentication,
            Object::ServiceEntry(_) => Kind::ServiceEntry,
            Object::WorkloadEntry(_) => Kind::WorkloadEntry,
            Object::Gateway(_) => Kind::Gateway,
            Object::ListenerSet(_) => Kind::ListenerSet,
            Object::HttpRoute(_) => Kind::HttpRoute,
            Object::GrpcRoute(_) => Kind::GrpcRoute,
            Object::TcpRoute(_) => Kind::TcpRoute,
            Object::TlsRoute(_) => Kind::TlsRoute,
            Object::UdpRoute(_) => Kind::UdpRoute,
            Object::ReferenceGrant(_) => Kind::ReferenceGrant,
            Object::VirtualService(_) => Kind::VirtualService,
            Object::DestinationRule(_) => Kind::DestinationRule,
            Object::RequestAuthentication(_) => Kind::RequestAuthentication,
            Object::ConfigMap(_) => Kind::ConfigMap,
            Object::ClusterTrustBundle(_) => Kind::ClusterTrustBundle,
            Object::BackendTlsPolicy(_) => Kind::BackendTlsPolicy,
            Object::TrafficPolicy(_) => Kind::TrafficPolicy,
            Object::Telemetry(_) => Kind::Telemetry,
        }
    }

    /// The identity of the object.
    pub fn reference(&self) -> ObjectRef {
        let name = match self {
            Object::Namespace(o) => NamespacedName::new("", o.name.clone()),
            Object::Node(o) => NamespacedName::new("", o.name.clone()),
            Object::Pod(o) => o.meta.id.clone(),
            Object::Service(o) => o.meta.id.clone(),
            Object::ServiceAccount(id) | Object::Deployment(id) => id.clone(),
            Object::Secret(o) => o.id.clone(),
            Object::EndpointSlice(o) => o.id.clone(),
            Object::ReplicaSet(o) => o.id.clone(),
            Object::IngressClass(o) => NamespacedName::new("", o.name.clone()),
            Object::Ingress(o) => o.meta.id.clone(),
            Object::AuthorizationPolicy(o) => o.id.clone(),
            Object::PeerAuthentication(o) => o.id.clone(),
            Object::ServiceEntry(o) => o.meta.id.clone(),
            Object::WorkloadEntry(o) => o.meta.id.clone(),
            Object::Gateway(o) => o.meta.id.clone(),
            Object::ListenerSet(o) => o.meta.id.clone(),
            Object::HttpRoute(o)
            | Object::GrpcRoute(o)
            | Object::TcpRoute(o)
            | Object::TlsRoute(o)
            | Object::UdpRoute(o) => o.meta.id.clone(),
            Object::ReferenceGrant(o) => o.id.clone(),
            Object::VirtualService(o) => o.meta.id.clone(),
            Object::DestinationRule(o) => o.meta.id.clone(),
            Object::RequestAuthentication(o) => o.meta.id.clone(),
            Object::ConfigMap(o) | Object::ClusterTrustBundle(o) => o.id.clone(),
            Object::BackendTlsPolicy(o) => o.meta.id.clone(),
            Object::TrafficPolicy(o) => o.meta.id.clone(),
            Object::Telemetry(o) => o.meta.id.clone(),
        };
        ObjectRef { kind: self.kind(), name }
    }
}

/// What happened to an object.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// It is new, or is now like this.
    Apply(Object),
    /// It is gone.
    Delete(ObjectRef),
}

impl Change {
    /// The kind of the object.
    pub fn kind(&self) -> Kind {
        match self {
            Change::Apply(object) => object.kind(),
            Change::Delete(reference) => reference.kind,
        }
    }

    /// The object that it happened to.
    pub fn reference(&self) -> ObjectRef {
        match self {
            Change::Apply(object) => object.reference(),
            Change::Delete(reference) => reference.clone(),
        }
    }
}

/// Nanoseconds of a duration as Istio's API writes it.
///
/// # Errors
/// When the text is none.
pub(crate) fn istio_duration(text: &str) -> Result<u64, String> {
    istio::request_authentication::nanoseconds(text)
}

//! The kinds of objects that the control plane reads, in one table: every source and the index go by it.

use std::fmt;

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Defaults of what lives in it.
    Namespace,
    /// Where pods are, and whose addresses nobody may claim.
    Node,
    /// A workload.
    Pod,
    /// A name and addresses for workloads.
    Service,
    /// Checked, without effect on any resource.
    ServiceAccount,
    /// Roots that servers outside the mesh are verified by.
    ConfigMap,
    /// Certificates of gateways with their keys.
    Secret,
    /// A part of a service's endpoints.
    EndpointSlice,
    /// Checked, without effect on any resource.
    Deployment,
    /// The owner between a pod and its deployment.
    ReplicaSet,
    /// Who serves Ingresses.
    IngressClass,
    /// Where requests of clients outside the mesh go.
    Ingress,
    /// Who may talk to whom.
    AuthorizationPolicy,
    /// Whether plaintext is accepted.
    PeerAuthentication,
    /// A service outside of Kubernetes.
    ServiceEntry,
    /// A workload outside of Kubernetes.
    WorkloadEntry,
    /// A waypoint, or the way into another network.
    Gateway,
    /// Listeners that are added to a gateway.
    ListenerSet,
    /// Where HTTP requests go.
    HttpRoute,
    /// Where gRPC calls go.
    GrpcRoute,
    /// Where connections go.
    TcpRoute,
    /// Where connections that begin with TLS go.
    TlsRoute,
    /// Where datagrams go.
    UdpRoute,
    /// Who may refer to objects of a namespace from outside.
    ReferenceGrant,
    /// Where requests to hosts go.
    VirtualService,
    /// How requests to a host are balanced and limited.
    DestinationRule,
    /// Which tokens of requests are valid.
    RequestAuthentication,
    /// TLS to endpoints.
    BackendTlsPolicy,
    /// How many requests there may be, and which.
    TrafficPolicy,
    /// Roots for the whole cluster.
    ClusterTrustBundle,
    /// `telemetry.istio.io`
    Telemetry,
}

/// Where objects of a kind live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Beside the namespaces.
    Cluster,
    /// In a namespace.
    Namespaced,
}

/// How much of an object is needed: a watch can ask for no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// Its metadata.
    Metadata,
    /// All of it.
    Everything,
}

/// What a source needs to know of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KindInfo {
    /// The kind as manifests spell it.
    pub name: &'static str,
    /// Its name in paths of the API.
    pub plural: &'static str,
    /// Its API group, empty for the core group.
    pub group: &'static str,
    /// Versions that are understood, the preferred one first.
    pub versions: &'static [&'static str],
    /// Where its objects live.
    pub scope: Scope,
    /// How much of them is needed.
    pub needed: Needed,
}

/// A kind of Kubernetes itself.
const fn core(
    group: &'static str,
    name: &'static str,
    plural: &'static str,
    scope: Scope,
    needed: Needed,
) -> KindInfo {
    KindInfo { name, plural, group, versions: &["v1"], scope, needed }
}

/// A kind of an extension, all of it and in namespaces.
const fn extension(
    group: &'static str,
    versions: &'static [&'static str],
    name: &'static str,
    plural: &'static str,
) -> KindInfo {
    KindInfo { name, plural, group, versions, scope: Scope::Namespaced, needed: Needed::Everything }
}

const SECURITY: (&str, &[&str]) = ("security.istio.io", &["v1", "v1beta1"]);
const NETWORKING: (&str, &[&str]) = ("networking.istio.io", &["v1", "v1beta1", "v1alpha3"]);
const GATEWAY: (&str, &[&str]) = ("gateway.networking.k8s.io", &["v1", "v1beta1"]);

impl KindInfo {
    /// The objects of the kind that are read, as a field selector; none: all. Other Secrets are nobody's business here.
    pub fn field_selector(&self) -> Option<&'static str> {
        matches!((self.group, self.name), ("", "Secret")).then_some("type=kubernetes.io/tls")
    }

    /// Whether every API server serves the kind, so that a server that does not is starting or is not one.
    pub fn is_built_in(&self) -> bool {
        matches!(self.group, "" | "apps" | "discovery.k8s.io" | "networking.k8s.io")
    }
}

impl Kind {
    /// Every kind, in declaration order.
    pub const ALL: [Kind; 31] = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::Service,
        Kind::ServiceAccount,
        Kind::ConfigMap,
        Kind::Secret,
        Kind::EndpointSlice,
        Kind::Deployment,
        Kind::ReplicaSet,
        Kind::IngressClass,
        Kind::Ingress,
        Kind::AuthorizationPolicy,
        Kind::PeerAuthentication,
        Kind::ServiceEntry,
        Kind::WorkloadEntry,
        Kind::Gateway,
        Kind::ListenerSet,
        Kind::HttpRoute,
        Kind::GrpcRoute,
        Kind::TcpRoute,
        Kind::TlsRoute,
        Kind::UdpRoute,
        Kind::ReferenceGrant,
        Kind::VirtualService,
        Kind::DestinationRule,
        Kind::RequestAuthentication,
        Kind::BackendTlsPolicy,
        Kind::TrafficPolicy,
        Kind::ClusterTrustBundle,
        Kind::Telemetry,
    ];

    /// The table.
    pub const fn info(self) -> KindInfo {
        use Needed::{Everything, Metadata};
        use Scope::{Cluster, Namespaced};
        match self {
            Kind::Namespace => core("", "Namespace", "namespaces", Cluster, Metadata),
            Kind::Node => core("", "Node", "nodes", Cluster, Everything),
            Kind::Pod => core("", "Pod", "pods", Namespaced, Everything),
            Kind::Service => core("", "Service", "services", Namespaced, Everything),
            Kind::ServiceAccount => core("", "ServiceAccount", "serviceaccounts", Namespaced, Metadata),
            Kind::ConfigMap => core("", "ConfigMap", "configmaps", Namespaced, Everything),
            Kind::Secret => core("", "Secret", "secrets", Namespaced, Everything),
            Kind::EndpointSlice => {
                core("discovery.k8s.io", "EndpointSlice", "endpointslices", Namespaced, Everything)
            }
            Kind::Deployment => core("apps", "Deployment", "deployments", Namespaced, Metadata),
            Kind::ReplicaSet => core("apps", "ReplicaSet", "replicasets", Namespaced, Metadata),
            Kind::IngressClass => {
                core("networking.k8s.io", "IngressClass", "ingressclasses", Cluster, Everything)
            }
            Kind::Ingress => core("networking.k8s.io", "Ingress", "ingresses", Namespaced, Everything),
            Kind::AuthorizationPolicy => {
                extension(SECURITY.0, SECURITY.1, "AuthorizationPolicy", "authorizationpolicies")
            }
            Kind::PeerAuthentication => {
                extension(SECURITY.0, SECURITY.1, "PeerAuthentication", "peerauthentications")
            }
            Kind::ServiceEntry => extension(NETWORKING.0, NETWORKING.1, "ServiceEntry", "serviceentries"),
            Kind::WorkloadEntry => extension(NETWORKING.0, NETWORKING.1, "WorkloadEntry", "workloadentries"),
            Kind::Gateway => extension(GATEWAY.0, GATEWAY.1, "Gateway", "gateways"),
            Kind::ListenerSet => extension(GATEWAY.0, &["v1"], "ListenerSet", "listenersets"),
            Kind::HttpRoute => extension(GATEWAY.0, GATEWAY.1, "HTTPRoute", "httproutes"),
            Kind::GrpcRoute => extension(GATEWAY.0, GATEWAY.1, "GRPCRoute", "grpcroutes"),
            Kind::TcpRoute => extension(GATEWAY.0, &["v1", "v1alpha2"], "TCPRoute", "tcproutes"),
            Kind::TlsRoute => extension(GATEWAY.0, &["v1", "v1alpha3", "v1alpha2"], "TLSRoute", "tlsroutes"),
            Kind::UdpRoute => extension(GATEWAY.0, &["v1", "v1alpha2"], "UDPRoute", "udproutes"),
            Kind::ReferenceGrant => extension(GATEWAY.0, GATEWAY.1, "ReferenceGrant", "referencegrants"),
            Kind::VirtualService => {
                extension(NETWORKING.0, NETWORKING.1, "VirtualService", "virtualservices")
            }
            Kind::DestinationRule => {
                extension(NETWORKING.0, NETWORKING.1, "DestinationRule", "destinationrules")
            }
            Kind::RequestAuthentication => {
                extension(SECURITY.0, SECURITY.1, "RequestAuthentication", "requestauthentications")
            }
            Kind::BackendTlsPolicy => {
                extension(GATEWAY.0, &["v1", "v1alpha3"], "BackendTLSPolicy", "backendtlspolicies")
            }
            Kind::Telemetry => {
                extension("telemetry.istio.io", &["v1", "v1alpha1"], "Telemetry", "telemetries")
            }
            Kind::TrafficPolicy => extension("ambit.dev", &["v1alpha1"], "TrafficPolicy", "trafficpolicies"),
            Kind::ClusterTrustBundle => KindInfo {
                name: "ClusterTrustBundle",
                plural: "clustertrustbundles",
                group: "certificates.k8s.io",
                versions: &["v1", "v1beta1"],
                scope: Cluster,
                needed: Everything,
            },
        }
    }

    /// The kind as manifests spell it.
    pub const fn as_str(self) -> &'static str {
        self.info().name
    }

    /// The API group of the kind, empty for the core group.
    pub const fn group(self) -> &'static str {
        self.info().group
    }

    /// Whether objects of the kind live in a namespace.
    pub const fn is_namespaced(self) -> bool {
        matches!(self.info().scope, Scope::Namespaced)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_has_every_kind_once() {
        assert!(Kind::ALL.is_sorted());
        let resources: BTreeSet<_> =
            Kind::ALL.iter().map(|kind| (kind.group(), kind.info().plural)).collect();
        assert_eq!(resources.len(), Kind::ALL.len());
        let built_in = Kind::ALL.into_iter().filter(|kind| kind.info().is_built_in());
        assert!(built_in.eq(Kind::ALL.into_iter().take_while(|kind| *kind <= Kind::Ingress)));
        for info in Kind::ALL.map(Kind::info) {
            // Ambit's own kinds are not stable yet.
            let preferred = if info.group == "ambit.dev" { "v1alpha1" } else { "v1" };
            assert_eq!(info.versions.first(), Some(&preferred), "{info:?}");
            assert_eq!(info.plural, info.plural.to_lowercase(), "{info:?}");
        }
    }
}

//! What each producer of resources looked at, so that a change finds whom it concerns.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::object::{KeyAddress, NamespacedName, ObjectRef};

/// Something that a resource may depend on beside its own object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Dependency {
    /// The defaults of a namespace.
    Namespace(Arc<str>),
    /// The labels of a namespace.
    NamespaceLabels(Arc<str>),
    /// A node's locality.
    Node(Arc<str>),
    /// A replica set's owner.
    ReplicaSet(NamespacedName),
    /// A Secret.
    Secret(NamespacedName),
    /// The IngressClasses.
    IngressClasses,
    /// Which Ingresses of a class there are, and whether they have certificates; empty: those that name none.
    IngressesOfClass(Arc<str>),
    /// The Ingresses with a certificate for a host; empty: for all.
    IngressTls(Arc<str>),
    /// The Ingresses that send requests to this Service.
    IngressesTo(NamespacedName),
    /// A gateway.
    Gateway(NamespacedName),
    /// A ListenerSet.
    ListenerSet(NamespacedName),
    /// The ListenerSets of a gateway.
    ListenerSetsOf(NamespacedName),
    /// The gateways of a class.
    GatewayClass(Arc<str>),
    /// The Services and namespaces that name a waypoint, and whether gateways send requests through it.
    BoundTo(NamespacedName),
    /// The gateways into a network.
    Network(Arc<str>),
    /// Whether a pod of this name is there.
    Pod(NamespacedName),
    /// The pods, Services and nodes that own this address.
    Address(IpAddr),
    /// The entries and gateways that claim this address.
    Claims(IpAddr),
    /// Who offers a host.
    Host(Arc<str>),
    /// The selectors of policies of a namespace, for what is no member that they select.
    Selectors(Arc<str>),
    /// The PeerAuthentications without selector of a namespace.
    Authentication(Arc<str>),
    /// A ServiceEntry.
    ServiceEntry(NamespacedName),
    /// The routes that send requests to this Service.
    RoutesTo(NamespacedName),
    /// The ReferenceGrants of a namespace.
    Grants(Arc<str>),
    /// The routes that want to be attached to a Service, ServiceEntry, Gateway or ListenerSet.
    RoutesOf(ObjectRef),
    /// Which hosts Services and ServiceEntries have.
    Hosts,
    /// The VirtualServices for a host, as they name it.
    VirtualServicesFor(Arc<str>),
    /// The VirtualServices that send requests to a host, and those that take over the rules of these.
    VirtualServicesTo(Arc<str>),
    /// The VirtualServices that take over the rules of this one.
    Delegators(NamespacedName),
    /// A VirtualService.
    VirtualService(NamespacedName),
    /// The pods with this label.
    Label(Arc<str>, Arc<str>),
    /// The policies that ask this provider about requests.
    Asking(Arc<str>),
    /// The Gateways and ListenerSets whose listeners ask a Service.
    ListenersAsking(NamespacedName),
    /// A ConfigMap or ClusterTrustBundle.
    Roots(ObjectRef),
    /// The BackendTLSPolicies for a Service or ServiceEntry.
    TlsPoliciesOf(ObjectRef),
    /// The TrafficPolicies for something.
    TrafficPoliciesOf(ObjectRef),
    /// The Telemetry objects.
    Telemetries,
    /// A route.
    Route(ObjectRef),
    /// Keys that are fetched.
    Keys(KeyAddress),
}

/// Dependencies by producer, and producers by dependency.
#[derive(Debug, Default)]
pub(super) struct Dependencies {
    /// In order; a few each.
    of: HashMap<ObjectRef, Box<[Dependency]>>,
    users: HashMap<Dependency, BTreeSet<ObjectRef>>,
}

impl Dependencies {
    /// Replaces what a producer depends on.
    pub(super) fn set(&mut self, producer: &ObjectRef, new: BTreeSet<Dependency>) {
        let old = self.of.remove(producer).unwrap_or_default();
        for gone in old.iter().filter(|dependency| !new.contains(*dependency)) {
            if let Some(users) = self.users.get_mut(gone) {
                users.remove(producer);
                if users.is_empty() {
                    self.users.remove(gone);
                }
            }
        }
        for added in new.iter().filter(|dependency| old.binary_search(dependency).is_err()) {
            self.users.entry(added.clone()).or_default().insert(producer.clone());
        }
        if !new.is_empty() {
            self.of.insert(producer.clone(), new.into_iter().collect());
        }
    }

    /// The producers that depend on something.
    pub(super) fn users(&self, dependency: &Dependency) -> impl Iterator<Item = &ObjectRef> {
        self.users.get(dependency).into_iter().flatten()
    }
}

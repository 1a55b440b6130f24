//! What a producer sees of the objects. Every look at another object is noted as a dependency.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::dependencies::Dependency;
use super::l7::ingresses::default_gateway;
use super::l7::request_authentications::FetchedKeys;
use super::store::{Store, is_addressable};
use super::{Finding, Settings};
use crate::object::{
    AuthorizationPolicy, BackendTlsPolicy, Gateway, Ingress, KeyAddress, Kind, Labels, ListenerSet,
    Namespace, NamespacedName, Node, ObjectRef, PeerAuthentication, Pod, ReplicaSet, RootsHolder, Route,
    Secret, Service, ServiceEntry, Telemetry, TrafficPolicy, VirtualService, Visibility,
};

/// The IngressClass that the chart makes.
const DEFAULT_CLASS: &str = "ambit";

/// The objects, for the time of one computation.
pub(super) struct Reader<'a> {
    pub(super) store: &'a Store,
    pub(super) settings: &'a Settings,
    dependencies: RefCell<BTreeSet<Dependency>>,
    findings: RefCell<Vec<Finding>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(store: &'a Store, settings: &'a Settings) -> Reader<'a> {
        Reader { store, settings, dependencies: RefCell::default(), findings: RefCell::default() }
    }

    /// What was looked at, and what was found out about the object itself.
    pub(super) fn finish(self) -> (BTreeSet<Dependency>, Vec<Finding>) {
        (self.dependencies.into_inner(), self.findings.into_inner())
    }

    pub(super) fn find(&self, finding: Finding) {
        let mut findings = self.findings.borrow_mut();
        // The hosts of a ServiceEntry all find out the same.
        if !findings.contains(&finding) {
            findings.push(finding);
        }
    }

    fn depend(&self, dependency: Dependency) {
        self.dependencies.borrow_mut().insert(dependency);
    }

    pub(super) fn namespace(&self, name: &Arc<str>) -> Option<&'a Namespace> {
        self.depend(Dependency::Namespace(name.clone()));
        self.store.namespaces.get(name).map(AsRef::as_ref)
    }

    /// Labels of a namespace; those of one that has no object are empty but for its name.
    pub(super) fn namespace_labels(&self, name: &Arc<str>) -> Labels {
        self.depend(Dependency::NamespaceLabels(name.clone()));
        // Kubernetes sets this label on every namespace.
        const NAME: &str = "kubernetes.io/metadata.name";
        let labels = self.store.namespaces.get(name).map(|n| n.labels.clone()).unwrap_or_default();
        let given = labels.iter().map(|(k, v)| (k.clone(), v.clone()));
        given.chain([(Arc::from(NAME), name.clone())]).collect()
    }

    pub(super) fn node(&self, name: &Arc<str>) -> Option<&'a Node> {
        self.depend(Dependency::Node(name.clone()));
        self.store.nodes.get(name).map(AsRef::as_ref)
    }

    pub(super) fn replica_set(&self, id: &NamespacedName) -> Option<&'a ReplicaSet> {
        self.depend(Dependency::ReplicaSet(id.clone()));
        self.store.replica_sets.get(id).map(AsRef::as_ref)
    }

    pub(super) fn gateway(&self, id: &NamespacedName) -> Option<&'a Gateway> {
        self.depend(Dependency::Gateway(id.clone()));
        self.store.gateways.get(id).map(AsRef::as_ref)
    }

    pub(super) fn listener_set(&self, id: &NamespacedName) -> Option<&'a ListenerSet> {
        self.depend(Dependency::ListenerSet(id.clone()));
        self.store.listener_sets.get(id).map(AsRef::as_ref)
    }

    /// The ListenerSets that name a gateway as their parent, the senior first.
    pub(super) fn listener_sets_of(&self, gateway: &NamespacedName) -> Vec<&'a ListenerSet> {
        self.depend(Dependency::ListenerSetsOf(gateway.clone()));
        let ids = self.store.listener_sets_by_gateway.of(gateway);
        let mut sets: Vec<&ListenerSet> =
            ids.filter_map(|id| self.store.listener_sets.get(id)).map(AsRef::as_ref).collect();
        sets.sort_by_key(|set| set.meta.seniority());
        sets
    }

    /// The Gateway that serves Ingresses of a class; `None` where that is another controller's. The class of those that name none is the
    /// default one.
    ///
    /// # Errors
    /// What is wrong with the parameters of the class.
    pub(super) fn gateway_of_class(
        &self,
        class: Option<&Arc<str>>,
    ) -> Option<Result<NamespacedName, String>> {
        self.depend(Dependency::IngressClasses);
        if self.settings.gateway_classes.is_empty() {
            return None;
        }
        let classes = &self.store.ingress_classes;
        let default = |name: &str| Ok(default_gateway(&self.settings.ingress_namespace, name));
        let known = match class {
            Some(name) => classes.get(name),
            None => {
                classes.values().filter(|it| it.is_default && it.is_ours).min_by_key(|it| it.name.clone())
            }
        };
        match (known, class) {
            (Some(known), _) if !known.is_ours => None,
            (Some(known), _) => Some(match &known.gateway {
                Ok(Some(gateway)) => Ok(gateway.clone()),
                Ok(None) => default(&known.name),
                Err(problem) => Err(format!("IngressClass {}: {problem}", known.name)),
            }),
            // The chart makes this class; without the object, as where files are the source, it is the same.
            (None, Some(name)) if **name == *DEFAULT_CLASS => Some(default(name)),
            (None, _) => None,
        }
    }

    /// The Ingresses that a Gateway serves, in no order.
    pub(super) fn ingresses_of(&self, gateway: &NamespacedName) -> Vec<&'a Ingress> {
        let names = self.store.ingress_classes.keys().cloned().chain([DEFAULT_CLASS.into(), "".into()]);
        let classes: BTreeSet<Arc<str>> = names.collect();
        let mut found = Vec::new();
        for class in classes {
            let named = Some(&class).filter(|class| !class.is_empty());
            if self.gateway_of_class(named).is_some_and(|known| known.as_ref() == Ok(gateway)) {
                self.depend(Dependency::IngressesOfClass(class.clone()));
                let ids = self.store.ingresses_by_class.of(&class);
                found.extend(ids.filter_map(|id| self.store.ingresses.get(id)).map(AsRef::as_ref));
            }
        }
        found
    }

    /// The Ingresses with a certificate for a host, the senior first; for an empty one, for all hosts.
    pub(super) fn ingresses_with_tls(&self, host: &str) -> Vec<&'a Ingress> {
        let host: Arc<str> = host.into();
        self.depend(Dependency::IngressTls(host.clone()));
        let ids = self.store.ingresses_by_tls_host.of(&host);
        let mut ingresses: Vec<&Ingress> =
            ids.filter_map(|id| self.store.ingresses.get(id)).map(AsRef::as_ref).collect();
        ingresses.sort_by_key(|ingress| ingress.meta.seniority());
        ingresses
    }

    /// The Ingresses that send requests to a Service.
    pub(super) fn ingresses_to(&self, service: &NamespacedName) -> Vec<&'a Ingress> {
        self.depend(Dependency::IngressesTo(service.clone()));
        let ids = self.store.ingresses_by_backend.of(service);
        ids.filter_map(|id| self.store.ingresses.get(id)).map(AsRef::as_ref).collect()
    }

    /// What a waypoint or gateway authenticates tokens of sessions with; empty while nothing is known to derive it from. All of them are
    /// computed again when that changes.
    pub(super) fn session_key(&self, gateway: &NamespacedName) -> Vec<u8> {
        self.store.session_secret.map(|secret| secret.key_of(gateway)).unwrap_or_default()
    }

    pub(super) fn secret(&self, id: &NamespacedName) -> Option<&'a Secret> {
        self.depend(Dependency::Secret(id.clone()));
        self.store.secrets.get(id).map(AsRef::as_ref)
    }

    /// Whether gateways send requests through a waypoint: something that names it says so.
    pub(super) fn is_ingress_waypoint(&self, waypoint: &NamespacedName) -> bool {
        self.depend(Dependency::BoundTo(waypoint.clone()));
        let of_namespace = |name: &Arc<str>| self.namespace(name).and_then(|it| it.waypoint.ingress);
        let mut services = self.store.services_by_waypoint.of(waypoint);
        let by_service = services.any(|id| {
            let own = self.store.services.get(id).and_then(|service| service.waypoint.ingress);
            own.or_else(|| of_namespace(&id.namespace)) == Some(true)
        });
        let mut namespaces = self.store.namespaces_by_waypoint.of(waypoint);
        by_service
            || namespaces.any(|name| {
                of_namespace(name) == Some(true) || self.store.ingress_services.of(name).next().is_some()
            })
    }

    /// The gateways of a class, in order.
    pub(super) fn gateways_of_class(&self, class: &Arc<str>) -> Vec<&'a Gateway> {
        self.depend(Dependency::GatewayClass(class.clone()));
        let all = self.store.gateways.values().map(AsRef::as_ref);
        let mut gateways: Vec<&Gateway> = all.filter(|gateway: &&Gateway| gateway.class == *class).collect();
        gateways.sort_by(|a, b| a.meta.id.cmp(&b.meta.id));
        gateways
    }

    /// The gateways into a network, the senior first.
    pub(super) fn gateways_into(&self, network: &Arc<str>) -> Vec<&'a Gateway> {
        self.depend(Dependency::Network(network.clone()));
        let ids = self.store.gateways_by_network.of(network);
        let mut gateways: Vec<&Gateway> =
            ids.filter_map(|id| self.store.gateways.get(id)).map(AsRef::as_ref).collect();
        gateways.sort_by_key(|g| g.meta.seniority());
        gateways
    }

    /// Whether there is a pod of this name that has or will have its own address.
    pub(super) fn has_pod(&self, id: &NamespacedName) -> bool {
        self.depend(Dependency::Pod(id.clone()));
        self.store.pods.get(id).is_some_and(|pod| !pod.finished)
    }

    /// Whether a pod has this address for itself.
    pub(super) fn has_pod_at(&self, address: IpAddr) -> bool {
        self.pods_at(address).next().is_some()
    }

    /// The pods that have this address for themselves, in order.
    pub(super) fn pods_at(&self, address: IpAddr) -> impl Iterator<Item = &'a Pod> {
        self.depend(Dependency::Address(address));
        let ids = self.store.pods_by_address.of(&address);
        ids.filter_map(|id| self.store.pods.get(id)).map(AsRef::as_ref)
    }

    /// The Services that have this cluster IP, in order.
    pub(super) fn services_at(&self, address: IpAddr) -> impl Iterator<Item = &'a NamespacedName> {
        self.depend(Dependency::Address(address));
        self.store.services_by_address.of(&address)
    }

    /// The nodes that have this address, in order.
    pub(super) fn nodes_at(&self, address: IpAddr) -> impl Iterator<Item = &'a NamespacedName> {
        self.depend(Dependency::Address(address));
        self.store.nodes_by_address.of(&address)
    }

    /// The pods that share this address with their node, in order.
    pub(super) fn host_pods_at(&self, address: IpAddr) -> impl Iterator<Item = &'a Pod> {
        self.depend(Dependency::Address(address));
        let ids = self.store.host_pods_by_address.of(&address);
        ids.filter_map(|id| self.store.pods.get(id)).map(AsRef::as_ref)
    }

    /// The ServiceEntries, WorkloadEntries and gateways that name this address, in order.
    pub(super) fn claims_at(&self, address: IpAddr) -> impl Iterator<Item = &'a ObjectRef> {
        self.depend(Dependency::Claims(address));
        self.store.claims_by_address.of(&address)
    }

    /// Notes that selectors of policies in `namespace` and in the root namespace are asked for labels of no member.
    pub(super) fn depend_on_selectors(&self, namespace: &Arc<str>) {
        self.depend(Dependency::Selectors(namespace.clone()));
        self.depend(Dependency::Selectors(self.settings.root_namespace.clone()));
    }

    /// The Kubernetes service of a host.
    fn service_of_host(&self, host: &Arc<str>) -> Option<&'a NamespacedName> {
        let id = self.settings.service_of_host(host)?;
        self.depend(Dependency::Host(self.settings.host_of_service(&id).into()));
        self.store.services.get_key_value(&id).map(|(id, _)| id)
    }

    /// Whether a ServiceEntry is the first to offer a host, and no Service does.
    pub(super) fn is_first_for_host(&self, id: &NamespacedName, host: &Arc<str>) -> bool {
        if self.service_of_host(host).is_some() {
            return false;
        }
        let first = self.entries_of_host(host).min_by_key(|entry| entry.meta.seniority());
        first.is_some_and(|first| first.meta.id == *id)
    }

    /// What keeps a ServiceEntry from offering a host: the Service of that host, or an older ServiceEntry of its namespace.
    pub(super) fn host_owner(&self, entry: &ServiceEntry, host: &Arc<str>) -> Option<ObjectRef> {
        if let Some(service) = self.service_of_host(host) {
            return Some(ObjectRef { kind: Kind::Service, name: service.clone() });
        }
        let id = &entry.meta.id;
        let rivals = self.entries_of_host(host).filter(|other| other.meta.id.namespace == id.namespace);
        let oldest = rivals.min_by_key(|other| other.meta.seniority())?;
        let name = &oldest.meta.id;
        (name != id).then(|| ObjectRef { kind: Kind::ServiceEntry, name: name.clone() })
    }

    /// The ServiceEntries that offer a host to somebody, in order.
    pub(super) fn entries_of_host(&self, host: &Arc<str>) -> impl Iterator<Item = &'a ServiceEntry> {
        self.depend(Dependency::Host(host.clone()));
        let ids = self.store.entries_by_host.of(host);
        let entries = ids.filter_map(|id| self.store.service_entries.get(id)).map(AsRef::as_ref);
        entries.filter(|entry: &&ServiceEntry| entry.visibility != Visibility::Hidden)
    }

    /// A Service that is no `ExternalName`.
    pub(super) fn service(&self, id: &NamespacedName) -> Option<&'a Service> {
        self.depend(Dependency::Host(self.settings.host_of_service(id).into()));
        self.store.services.get(id).map(AsRef::as_ref).filter(|service| !service.external_name)
    }

    /// A ServiceEntry.
    pub(super) fn service_entry(&self, id: &NamespacedName) -> Option<&'a ServiceEntry> {
        self.depend(Dependency::ServiceEntry(id.clone()));
        self.store.service_entries.get(id).map(AsRef::as_ref)
    }

    /// The Gateways and ListenerSets whose listeners ask a Service about requests, in order.
    pub(super) fn listeners_asking(&self, service: &NamespacedName) -> impl Iterator<Item = &'a ObjectRef> {
        self.depend(Dependency::ListenersAsking(service.clone()));
        self.store.listeners_by_authorizer.of(service)
    }

    /// The routes that send requests to a Service, in order.
    pub(super) fn routes_to(&self, id: &NamespacedName) -> impl Iterator<Item = &'a Route> {
        self.depend(Dependency::RoutesTo(id.clone()));
        let routes = self.store.routes_by_backend.of(id);
        // Routes of several kinds may have one name.
        routes.flat_map(|id| Route::KINDS.map(|kind| (kind, id))).filter_map(|(kind, name)| {
            self.store.routes.get(&ObjectRef { kind, name: name.clone() }).map(AsRef::as_ref)
        })
    }

    /// The routes of Gateway API that want to be attached to a Service, ServiceEntry or Gateway, in order.
    pub(super) fn routes_of(&self, parent: &ObjectRef) -> impl Iterator<Item = &'a Route> {
        self.depend(Dependency::RoutesOf(parent.clone()));
        let ids = self.store.routes_by_parent.of(parent);
        ids.filter_map(|id| self.store.routes.get(id)).map(AsRef::as_ref)
    }

    /// A ConfigMap or ClusterTrustBundle that holds roots.
    pub(super) fn roots(&self, object: &ObjectRef) -> Option<&'a RootsHolder> {
        self.depend(Dependency::Roots(object.clone()));
        self.store.roots.get(object).map(AsRef::as_ref)
    }

    /// The BackendTLSPolicies that name a Service or ServiceEntry, in order.
    pub(super) fn tls_policies_of(&self, target: &ObjectRef) -> impl Iterator<Item = &'a BackendTlsPolicy> {
        self.depend(Dependency::TlsPoliciesOf(target.clone()));
        let ids = self.store.tls_policies_by_target.of(target);
        ids.filter_map(|id| self.store.backend_tls_policies.get(id)).map(AsRef::as_ref)
    }

    /// The TrafficPolicies that name something, in order.
    pub(super) fn traffic_policies_of(&self, target: &ObjectRef) -> impl Iterator<Item = &'a TrafficPolicy> {
        self.depend(Dependency::TrafficPoliciesOf(target.clone()));
        let ids = self.store.traffic_policies_by_target.of(target);
        ids.filter_map(|id| self.store.traffic_policies.get(id)).map(AsRef::as_ref)
    }

    /// The Telemetry objects, the oldest first.
    pub(super) fn telemetries(&self) -> Vec<&'a Telemetry> {
        self.depend(Dependency::Telemetries);
        let mut all: Vec<&Telemetry> = self.store.telemetries.values().map(AsRef::as_ref).collect();
        all.sort_by_key(|telemetry| telemetry.meta.seniority());
        all
    }

    /// A route of Gateway API.
    pub(super) fn route(&self, id: &ObjectRef) -> Option<&'a Route> {
        self.depend(Dependency::Route(id.clone()));
        self.store.routes.get(id).map(AsRef::as_ref)
    }

    /// The policies that ask a provider about requests, in order.
    pub(super) fn policies_asking(&self, provider: &Arc<str>) -> Vec<&'a AuthorizationPolicy> {
        self.depend(Dependency::Asking(provider.clone()));
        let ids = self.store.policies_by_provider.of(provider);
        ids.filter_map(|id| self.store.policies.get(id)).map(AsRef::as_ref).collect()
    }

    /// Keys of a token issuer, once they were asked for.
    pub(super) fn keys(&self, address: &KeyAddress) -> Option<&'a FetchedKeys> {
        self.depend(Dependency::Keys(address.clone()));
        self.store.keys.get(address)
    }

    /// A VirtualService.
    pub(super) fn virtual_service(&self, id: &NamespacedName) -> Option<&'a VirtualService> {
        self.depend(Dependency::VirtualService(id.clone()));
        self.store.virtual_services.get(id).map(AsRef::as_ref)
    }

    /// The VirtualServices for a host as they name it: a full name or a wildcard.
    pub(super) fn virtual_services_for(&self, host: &Arc<str>) -> impl Iterator<Item = &'a VirtualService> {
        self.depend(Dependency::VirtualServicesFor(host.clone()));
        let ids = self.store.virtual_services_by_host.of(host);
        ids.filter_map(|id| self.store.virtual_services.get(id)).map(AsRef::as_ref)
    }

    /// The VirtualServices that send requests to a host.
    pub(super) fn virtual_services_to(&self, host: &Arc<str>) -> impl Iterator<Item = &'a VirtualService> {
        self.depend(Dependency::VirtualServicesTo(host.clone()));
        let ids = self.store.virtual_services_by_destination.of(host);
        ids.filter_map(|id| self.store.virtual_services.get(id)).map(AsRef::as_ref)
    }

    /// The VirtualServices that take over the rules of another.
    pub(super) fn delegators(&self, id: &NamespacedName) -> impl Iterator<Item = &'a VirtualService> {
        self.depend(Dependency::Delegators(id.clone()));
        let ids = self.store.virtual_services_by_delegate.of(id);
        ids.filter_map(|id| self.store.virtual_services.get(id)).map(AsRef::as_ref)
    }

    /// All Services and ServiceEntries. What is read of one beside its hosts is asked for by its name.
    pub(super) fn offered_hosts(&self) -> Vec<(ObjectRef, Vec<Arc<str>>)> {
        self.depend(Dependency::Hosts);
        let services = self.store.services.values().filter(|service| !service.external_name).map(|service| {
            let name = service.meta.id.clone();
            let host = self.settings.host_of_service(&name).into();
            (ObjectRef { kind: Kind::Service, name }, vec![host])
        });
        let entries = self.store.service_entries.values().map(|entry| {
            let name = entry.meta.id.clone();
            (ObjectRef { kind: Kind::ServiceEntry, name }, entry.hosts.clone())
        });
        let mut all: Vec<_> = services.chain(entries).collect();
        all.sort();
        all
    }

    /// The addresses of the pods with these labels, in a namespace or in all, in order.
    pub(super) fn addresses_of_pods(&self, namespace: Option<&Arc<str>>, labels: &Labels) -> Vec<IpAddr> {
        for (key, value) in labels.iter() {
            self.depend(Dependency::Label(key.clone(), value.clone()));
        }
        let members = self.store.members.selected(namespace, labels);
        let pods = members.iter().filter(|(_, kind)| *kind == Kind::Pod);
        let pods = pods.filter_map(|(id, _)| self.store.pods.get(id)).filter(|pod| is_addressable(pod));
        let mut addresses: Vec<IpAddr> = pods.flat_map(|pod| pod.addresses.iter().copied()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }

    /// The service accounts of the pods with these labels in a namespace, in order.
    pub(super) fn accounts_of_pods(&self, namespace: &Arc<str>, labels: &Labels) -> BTreeSet<Arc<str>> {
        for (key, value) in labels.iter() {
            self.depend(Dependency::Label(key.clone(), value.clone()));
        }
        let members = self.store.members.selected(Some(namespace), labels);
        let pods = members.iter().filter(|(_, kind)| *kind == Kind::Pod);
        let pods = pods.filter_map(|(id, _)| self.store.pods.get(id)).filter(|pod| is_addressable(pod));
        pods.map(|pod| pod.service_account.clone()).filter(|account| !account.is_empty()).collect()
    }

    /// The first of the pods and WorkloadEntries with these labels in a namespace that no proxy of the mesh serves.
    pub(super) fn uncaptured_member(&self, namespace: &Arc<str>, labels: &Labels) -> Option<ObjectRef> {
        for (key, value) in labels.iter() {
            self.depend(Dependency::Label(key.clone(), value.clone()));
        }
        let is_uncaptured = |(id, kind): &(NamespacedName, Kind)| match kind {
            Kind::Pod => {
                let pod = self.store.pods.get(id);
                pod.is_some_and(|pod| !pod.finished && !pod.addresses.is_empty() && !pod.captured)
            }
            Kind::WorkloadEntry => {
                let entry = self.store.workload_entries.get(id);
                entry.is_some_and(|entry| !entry.captured && !entry.native_tunnel)
            }
            _ => false,
        };
        let mut members = self.store.members.selected(Some(namespace), labels).into_iter();
        members.find(is_uncaptured).map(|(name, kind)| ObjectRef { kind, name })
    }

    /// Whether a ReferenceGrant of `to`'s namespace allows objects of `kind` in `from` to refer to it.
    pub(super) fn is_granted(&self, kind: Kind, from: &Arc<str>, to: &ObjectRef) -> bool {
        self.depend(Dependency::Grants(to.name.namespace.clone()));
        let grants = self.store.grants_by_namespace.of(&to.name.namespace);
        grants.filter_map(|id| self.store.grants.get(id)).any(|grant| grant.allows(kind, from, to))
    }

    /// The PeerAuthentication without selector in force for a namespace itself: its oldest.
    pub(super) fn wide_authentication(&self, namespace: &Arc<str>) -> Option<&'a PeerAuthentication> {
        self.depend(Dependency::Authentication(namespace.clone()));
        let ids = self.store.wide_authentications.of(namespace);
        let all = ids.filter_map(|id| self.store.authentications.get(id)).map(AsRef::as_ref);
        // One that cannot be read refuses plaintext, however old the others are.
        all.min_by_key(|a: &&PeerAuthentication| (!a.unreadable, a.meta.seniority()))
    }
}

//! The objects as they are, and the relations between them.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::l7::hosts;
use super::l7::request_authentications::FetchedKeys;
use super::relations::{Members, Reverse, Selectors};
use super::{SessionSecret, Settings};
use crate::object::{
    AuthorizationPolicy, BackendTlsPolicy, DestinationRule, EndpointSlice, Gateway, Ingress, IngressClass,
    KeyAddress, Kind, Listener, ListenerSet, Namespace, NamespacedName, Node, ObjectRef, PeerAuthentication,
    Pod, ReferenceGrant, ReplicaSet, RequestAuthentication, RootsHolder, Route, Secret, Service,
    ServiceEntry, Telemetry, TrafficPolicy, VirtualService, WorkloadEntry, WorkloadSpec,
};

/// Objects by kind, with what finds them by other things than their name.
#[derive(Debug, Default)]
pub(super) struct Store {
    pub(super) namespaces: HashMap<Arc<str>, Arc<Namespace>>,
    pub(super) nodes: HashMap<Arc<str>, Arc<Node>>,
    pub(super) pods: HashMap<NamespacedName, Arc<Pod>>,
    pub(super) services: HashMap<NamespacedName, Arc<Service>>,
    pub(super) slices: HashMap<NamespacedName, Arc<EndpointSlice>>,
    pub(super) replica_sets: HashMap<NamespacedName, Arc<ReplicaSet>>,
    pub(super) secrets: HashMap<NamespacedName, Arc<Secret>>,
    pub(super) ingress_classes: HashMap<Arc<str>, Arc<IngressClass>>,
    pub(super) ingresses: HashMap<NamespacedName, Arc<Ingress>>,
    pub(super) policies: HashMap<NamespacedName, Arc<AuthorizationPolicy>>,
    pub(super) authentications: HashMap<NamespacedName, Arc<PeerAuthentication>>,
    pub(super) service_entries: HashMap<NamespacedName, Arc<ServiceEntry>>,
    pub(super) workload_entries: HashMap<NamespacedName, Arc<WorkloadEntry>>,
    pub(super) gateways: HashMap<NamespacedName, Arc<Gateway>>,
    pub(super) listener_sets: HashMap<NamespacedName, Arc<ListenerSet>>,
    pub(super) routes: HashMap<ObjectRef, Arc<Route>>,
    pub(super) grants: HashMap<NamespacedName, Arc<ReferenceGrant>>,
    pub(super) virtual_services: HashMap<NamespacedName, Arc<VirtualService>>,
    pub(super) destination_rules: HashMap<NamespacedName, Arc<DestinationRule>>,
    pub(super) request_authentications: HashMap<NamespacedName, Arc<RequestAuthentication>>,
    /// Those that hold roots.
    /// Gateways and ListenerSets by the Services that their listeners ask about requests.
    pub(super) listeners_by_authorizer: Reverse<NamespacedName, ObjectRef>,
    /// ConfigMaps and ClusterTrustBundles that hold roots.
    pub(super) roots: HashMap<ObjectRef, Arc<RootsHolder>>,
    pub(super) backend_tls_policies: HashMap<NamespacedName, Arc<BackendTlsPolicy>>,
    pub(super) traffic_policies: HashMap<NamespacedName, Arc<TrafficPolicy>>,
    pub(super) telemetries: HashMap<NamespacedName, Arc<Telemetry>>,
    /// Keys of token issuers, as far as they were fetched.
    pub(super) keys: HashMap<KeyAddress, FetchedKeys>,
    /// What keys of sessions are derived from.
    pub(super) session_secret: Option<SessionSecret>,

    /// Pods and WorkloadEntries by label.
    pub(super) members: Members,
    /// Services by the waypoints that they name themselves.
    pub(super) services_by_waypoint: Reverse<NamespacedName>,
    /// Services whose ingress passes the waypoint of their namespace, by namespace.
    pub(super) ingress_services: Reverse<Arc<str>>,
    /// Namespaces by the waypoints that they name.
    pub(super) namespaces_by_waypoint: Reverse<NamespacedName, Arc<str>>,
    /// Services by selector.
    pub(super) service_selectors: Selectors,
    /// ServiceEntries by selector.
    pub(super) entry_selectors: Selectors,
    /// AuthorizationPolicies by selector; those of the root namespace select everywhere.
    pub(super) policy_selectors: Selectors,
    /// AuthorizationPolicies by the provider that they ask.
    pub(super) policies_by_provider: Reverse<Arc<str>>,
    /// PeerAuthentications by selector.
    pub(super) authentication_selectors: Selectors,
    /// PeerAuthentications without selector, by namespace.
    pub(super) wide_authentications: Reverse<Arc<str>>,
    /// Pods by address, without those on their node's.
    pub(super) pods_by_address: Reverse<IpAddr>,
    /// EndpointSlices by service.
    pub(super) slices_by_service: Reverse<NamespacedName>,
    /// EndpointSlices by the pod that an endpoint names.
    pub(super) slices_by_pod: Reverse<NamespacedName>,
    /// EndpointSlices by the address of an endpoint.
    pub(super) slices_by_address: Reverse<IpAddr>,
    /// Services by cluster IP.
    pub(super) services_by_address: Reverse<IpAddr>,
    /// Nodes by address.
    pub(super) nodes_by_address: Reverse<IpAddr>,
    /// Pods on their node's network by address.
    pub(super) host_pods_by_address: Reverse<IpAddr>,
    /// ServiceEntries by virtual address and endpoint, WorkloadEntries, and gateways of other networks; ranges are left out.
    pub(super) claims_by_address: Reverse<IpAddr, ObjectRef>,
    /// ServiceEntries by host.
    pub(super) entries_by_host: Reverse<Arc<str>>,
    /// Routes by the Services that they send requests to.
    pub(super) routes_by_backend: Reverse<NamespacedName>,
    /// Routes by the Services, ServiceEntries and Gateways that they want to be attached to.
    pub(super) routes_by_parent: Reverse<ObjectRef, ObjectRef>,
    /// VirtualServices for clients in the mesh, by their hosts.
    pub(super) virtual_services_by_host: Reverse<Arc<str>>,
    /// VirtualServices by the hosts that their rules send requests to.
    pub(super) virtual_services_by_destination: Reverse<Arc<str>>,
    /// VirtualServices by those whose rules they take over.
    pub(super) virtual_services_by_delegate: Reverse<NamespacedName>,
    /// DestinationRules by their host in full.
    pub(super) destination_rules_by_host: Reverse<Arc<str>>,
    /// BackendTLSPolicies by the Services and ServiceEntries that they name.
    pub(super) tls_policies_by_target: Reverse<ObjectRef>,
    /// TrafficPolicies by what they name.
    pub(super) traffic_policies_by_target: Reverse<ObjectRef>,
    /// ReferenceGrants by namespace.
    pub(super) grants_by_namespace: Reverse<Arc<str>>,
    /// ListenerSets by their gateway.
    pub(super) listener_sets_by_gateway: Reverse<NamespacedName>,
    /// Ingresses by class; empty for those that name none.
    pub(super) ingresses_by_class: Reverse<Arc<str>>,
    /// Ingresses by the hosts that they have certificates for; empty for all.
    pub(super) ingresses_by_tls_host: Reverse<Arc<str>>,
    /// Ingresses by the Services that they send requests to.
    pub(super) ingresses_by_backend: Reverse<NamespacedName>,
    /// Gateways by the network that they lead into.
    pub(super) gateways_by_network: Reverse<Arc<str>>,
}

impl Store {
    /// Puts a pod in place of the one of that name and returns the latter.
    pub(super) fn set_pod(&mut self, id: &NamespacedName, new: Option<&Arc<Pod>>) -> Option<Arc<Pod>> {
        let old = replace(&mut self.pods, id, new);
        if let Some(old) = old.as_ref().filter(|old| !old.finished) {
            let by_address = self.pods_by_address_of(old);
            old.addresses.iter().for_each(|address| by_address.remove(address, id));
        }
        if let Some(new) = new.filter(|new| !new.finished) {
            let by_address = self.pods_by_address_of(new);
            new.addresses.iter().for_each(|address| by_address.insert(*address, id.clone()));
        }
        let labels = new.filter(|pod| !pod.finished).map(|pod| pod.meta.labels.clone());
        match labels {
            Some(labels) => self.members.apply((id.clone(), Kind::Pod), labels),
            None => self.members.delete(&(id.clone(), Kind::Pod)),
        }
        old
    }

    fn pods_by_address_of(&mut self, pod: &Pod) -> &mut Reverse<IpAddr> {
        if pod.host_network { &mut self.host_pods_by_address } else { &mut self.pods_by_address }
    }

    /// Puts a namespace in place and returns what was there.
    pub(super) fn set_namespace(
        &mut self,
        name: &Arc<str>,
        new: Option<&Arc<Namespace>>,
    ) -> Option<Arc<Namespace>> {
        let old = replace(&mut self.namespaces, name, new);
        for waypoint in old.iter().flat_map(|namespace| namespace.waypoint.names()) {
            self.namespaces_by_waypoint.remove(waypoint, name);
        }
        for waypoint in new.into_iter().flat_map(|namespace| namespace.waypoint.names()) {
            self.namespaces_by_waypoint.insert(waypoint.clone(), name.clone());
        }
        old
    }

    /// Puts a node in place and returns what was there.
    pub(super) fn set_node(&mut self, name: &Arc<str>, new: Option<&Arc<Node>>) -> Option<Arc<Node>> {
        let old = replace(&mut self.nodes, name, new);
        let id = NamespacedName::new("", name.clone());
        let addresses = |node: Option<&Arc<Node>>| node.map(|n| n.addresses.clone()).unwrap_or_default();
        addresses(old.as_ref()).iter().for_each(|address| self.nodes_by_address.remove(address, &id));
        addresses(new).into_iter().for_each(|a| self.nodes_by_address.insert(a, id.clone()));
        old
    }

    /// Notes that the object claims other addresses than before.
    fn set_claims(&mut self, object: &ObjectRef, old: &[IpAddr], new: &[IpAddr]) {
        old.iter().for_each(|address| self.claims_by_address.remove(address, object));
        new.iter().for_each(|address| self.claims_by_address.insert(*address, object.clone()));
    }

    /// Puts a WorkloadEntry in place and returns what was there.
    pub(super) fn set_workload_entry(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<WorkloadEntry>>,
    ) -> Option<Arc<WorkloadEntry>> {
        let member = (id.clone(), Kind::WorkloadEntry);
        match new {
            Some(new) => self.members.apply(member, new.meta.labels.clone()),
            None => self.members.delete(&member),
        }
        let old = replace(&mut self.workload_entries, id, new);
        let object = ObjectRef { kind: Kind::WorkloadEntry, name: id.clone() };
        self.set_claims(&object, &entry_claims(old.as_ref()), &entry_claims(new));
        old
    }

    /// Puts a service in place and returns what was there.
    pub(super) fn set_service(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<Service>>,
    ) -> Option<Arc<Service>> {
        match new.filter(|s| !s.external_name).and_then(|s| s.selector.as_ref()) {
            Some(selector) => self.service_selectors.apply(id, selector, false),
            None => self.service_selectors.delete(id),
        }
        let old = replace(&mut self.services, id, new);
        let is_inherited = |s: &Service| s.waypoint.choice.is_none() && s.waypoint.ingress == Some(true);
        if let Some(old) = &old {
            old.waypoint.names().for_each(|waypoint| self.services_by_waypoint.remove(waypoint, id));
            self.ingress_services.remove(&id.namespace, id);
        }
        if let Some(new) = new {
            new.waypoint.names().for_each(|name| self.services_by_waypoint.insert(name.clone(), id.clone()));
            if is_inherited(new) {
                self.ingress_services.insert(id.namespace.clone(), id.clone());
            }
        }
        cluster_ips(old.as_ref()).for_each(|address| self.services_by_address.remove(address, id));
        cluster_ips(new).for_each(|address| self.services_by_address.insert(*address, id.clone()));
        old
    }

    /// Puts a route in place and returns what was there.
    pub(super) fn set_route(&mut self, id: &ObjectRef, new: Option<&Arc<Route>>) -> Option<Arc<Route>> {
        let old = replace(&mut self.routes, id, new);
        // A route of another kind may have the same name and the same backends.
        let same_name = |kind| self.routes.get(&ObjectRef { kind, name: id.name.clone() });
        let named = Route::KINDS.into_iter().filter_map(same_name);
        let backends: Vec<NamespacedName> = named.flat_map(|route| route.services()).collect();
        for gone in old.iter().flat_map(|route| route.services()) {
            self.routes_by_backend.remove(&gone, &id.name);
        }
        for backend in backends {
            self.routes_by_backend.insert(backend, id.name.clone());
        }
        for parent in old.iter().flat_map(|route| route.attaches_to()) {
            self.routes_by_parent.remove(&parent, id);
        }
        for parent in new.iter().flat_map(|route| route.attaches_to()) {
            self.routes_by_parent.insert(parent, id.clone());
        }
        old
    }

    /// Puts an Ingress in place and returns what was there.
    pub(super) fn set_ingress(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<Ingress>>,
    ) -> Option<Arc<Ingress>> {
        let old = replace(&mut self.ingresses, id, new);
        if let Some(old) = &old {
            self.ingresses_by_class.remove(&class_of(old), id);
            old.tls_hosts().for_each(|host| self.ingresses_by_tls_host.remove(&Arc::from(host), id));
            old.services().iter().for_each(|service| self.ingresses_by_backend.remove(service, id));
        }
        if let Some(new) = new {
            self.ingresses_by_class.insert(class_of(new), id.clone());
            new.tls_hosts().for_each(|host| self.ingresses_by_tls_host.insert(host.into(), id.clone()));
            new.services()
                .into_iter()
                .for_each(|service| self.ingresses_by_backend.insert(service, id.clone()));
        }
        old
    }

    /// Puts a VirtualService in place and returns what was there.
    pub(super) fn set_virtual_service(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<VirtualService>>,
        settings: &Settings,
    ) -> Option<Arc<VirtualService>> {
        let old = replace(&mut self.virtual_services, id, new);
        if let Some(old) = &old {
            hosts::of_virtual_service(settings, old)
                .for_each(|h| self.virtual_services_by_host.remove(&h, id));
            hosts::of_destinations(settings, old)
                .for_each(|h| self.virtual_services_by_destination.remove(&h, id));
            old.delegates().for_each(|delegate| self.virtual_services_by_delegate.remove(&delegate, id));
        }
        if let Some(new) = new {
            hosts::of_virtual_service(settings, new)
                .for_each(|h| self.virtual_services_by_host.insert(h, id.clone()));
            hosts::of_destinations(settings, new)
                .for_each(|h| self.virtual_services_by_destination.insert(h, id.clone()));
            new.delegates()
                .for_each(|delegate| self.virtual_services_by_delegate.insert(delegate, id.clone()));
        }
        old
    }

    /// Puts a ReferenceGrant in place and returns what was there.
    pub(super) fn set_grant(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<ReferenceGrant>>,
    ) -> Option<Arc<ReferenceGrant>> {
        match new {
            Some(_) => self.grants_by_namespace.insert(id.namespace.clone(), id.clone()),
            None => self.grants_by_namespace.remove(&id.namespace, id),
        }
        replace(&mut self.grants, id, new)
    }

    /// Puts a BackendTLSPolicy in place and returns what was there.
    pub(super) fn set_backend_tls_policy(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<BackendTlsPolicy>>,
    ) -> Option<Arc<BackendTlsPolicy>> {
        let old = replace(&mut self.backend_tls_policies, id, new);
        let targets = |policy: &Arc<BackendTlsPolicy>| -> Vec<ObjectRef> {
            policy.targets.iter().filter_map(|target| target.object.clone()).collect()
        };
        for target in old.iter().flat_map(targets) {
            self.tls_policies_by_target.remove(&target, id);
        }
        for target in new.into_iter().flat_map(targets) {
            self.tls_policies_by_target.insert(target, id.clone());
        }
        old
    }

    /// Puts a TrafficPolicy in place and returns what was there.
    pub(super) fn set_traffic_policy(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<TrafficPolicy>>,
    ) -> Option<Arc<TrafficPolicy>> {
        let old = replace(&mut self.traffic_policies, id, new);
        for target in old.iter().flat_map(|policy| policy.known_targets()) {
            self.traffic_policies_by_target.remove(&target.object, id);
        }
        for target in new.into_iter().flat_map(|policy| policy.known_targets()) {
            self.traffic_policies_by_target.insert(target.object.clone(), id.clone());
        }
        old
    }

    /// Puts a DestinationRule in place and returns what was there. `host` is the full form of a rule's host.
    pub(super) fn set_destination_rule(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<DestinationRule>>,
        host: impl Fn(&DestinationRule) -> Arc<str>,
    ) -> Option<Arc<DestinationRule>> {
        let old = replace(&mut self.destination_rules, id, new);
        if let Some(old) = &old {
            self.destination_rules_by_host.remove(&host(old), id);
        }
        if let Some(new) = new {
            self.destination_rules_by_host.insert(host(new), id.clone());
        }
        old
    }

    /// Puts an EndpointSlice in place and returns what was there.
    pub(super) fn set_slice(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<EndpointSlice>>,
    ) -> Option<Arc<EndpointSlice>> {
        let old = replace(&mut self.slices, id, new);
        if let Some(old) = &old {
            self.slices_by_service.remove(&service_of(old), id);
            for endpoint in &old.endpoints {
                endpoint.pod.iter().for_each(|pod| self.slices_by_pod.remove(pod, id));
                endpoint.addresses.iter().for_each(|a| self.slices_by_address.remove(a, id));
            }
        }
        if let Some(new) = new {
            self.slices_by_service.insert(service_of(new), id.clone());
            for endpoint in &new.endpoints {
                endpoint.pod.iter().for_each(|pod| self.slices_by_pod.insert(pod.clone(), id.clone()));
                endpoint.addresses.iter().for_each(|a| self.slices_by_address.insert(*a, id.clone()));
            }
        }
        old
    }

    /// Puts an AuthorizationPolicy in place and returns what was there.
    pub(super) fn set_policy(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<AuthorizationPolicy>>,
        everywhere: bool,
    ) -> Option<Arc<AuthorizationPolicy>> {
        match new.and_then(|p| p.listed_by()) {
            Some(selector) => self.policy_selectors.apply(id, selector, everywhere),
            None => self.policy_selectors.delete(id),
        }
        let old = replace(&mut self.policies, id, new);
        if let Some(provider) = old.as_ref().and_then(|old| old.asks()) {
            self.policies_by_provider.remove(provider, id);
        }
        if let Some(provider) = new.and_then(|new| new.asks()) {
            self.policies_by_provider.insert(provider.clone(), id.clone());
        }
        old
    }

    /// Puts a PeerAuthentication in place and returns what was there.
    pub(super) fn set_authentication(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<PeerAuthentication>>,
    ) -> Option<Arc<PeerAuthentication>> {
        self.authentication_selectors.delete(id);
        self.wide_authentications.remove(&id.namespace, id);
        match new.map(|a| &a.selector) {
            Some(Some(selector)) => self.authentication_selectors.apply(id, selector, false),
            Some(None) => self.wide_authentications.insert(id.namespace.clone(), id.clone()),
            None => {}
        }
        replace(&mut self.authentications, id, new)
    }

    /// Puts a ServiceEntry in place and returns what was there.
    pub(super) fn set_service_entry(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<ServiceEntry>>,
    ) -> Option<Arc<ServiceEntry>> {
        let old = replace(&mut self.service_entries, id, new);
        for host in old.iter().flat_map(|e| &e.hosts) {
            self.entries_by_host.remove(host, id);
        }
        for host in new.iter().flat_map(|e| &e.hosts) {
            self.entries_by_host.insert(host.clone(), id.clone());
        }
        let object = ObjectRef { kind: Kind::ServiceEntry, name: id.clone() };
        self.set_claims(&object, &service_claims(old.as_ref()), &service_claims(new));
        match new.and_then(|e| e.selector.as_ref()) {
            Some(selector) => self.entry_selectors.apply(id, selector, false),
            None => self.entry_selectors.delete(id),
        }
        old
    }

    /// Puts a ListenerSet in place and returns what was there.
    pub(super) fn set_listener_set(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<ListenerSet>>,
    ) -> Option<Arc<ListenerSet>> {
        let old = replace(&mut self.listener_sets, id, new);
        if let Some(gateway) = old.as_ref().and_then(|set| set.gateway.as_ref()) {
            self.listener_sets_by_gateway.remove(gateway, id);
        }
        if let Some(gateway) = new.and_then(|set| set.gateway.clone()) {
            self.listener_sets_by_gateway.insert(gateway, id.clone());
        }
        let listeners = |set: Option<&Arc<ListenerSet>>| asked(set.map(|set| &set.listeners[..]), id);
        let (before, after) = (listeners(old.as_ref()), listeners(new));
        self.set_authorizers(Kind::ListenerSet, id, before, after);
        old
    }

    /// Notes which Services the listeners of an object ask.
    fn set_authorizers(
        &mut self,
        kind: Kind,
        id: &NamespacedName,
        before: Vec<NamespacedName>,
        after: Vec<NamespacedName>,
    ) {
        let owner = ObjectRef { kind, name: id.clone() };
        for service in before {
            self.listeners_by_authorizer.remove(&service, &owner);
        }
        for service in after {
            self.listeners_by_authorizer.insert(service, owner.clone());
        }
    }

    /// Puts a gateway in place and returns what was there.
    pub(super) fn set_gateway(
        &mut self,
        id: &NamespacedName,
        new: Option<&Arc<Gateway>>,
    ) -> Option<Arc<Gateway>> {
        let old = replace(&mut self.gateways, id, new);
        if let Some(network) = old.as_ref().and_then(|g| g.network.as_ref()) {
            self.gateways_by_network.remove(network, id);
        }
        if let Some(network) = new.and_then(|g| g.network.clone()) {
            self.gateways_by_network.insert(network, id.clone());
        }
        let listeners = |gateway: Option<&Arc<Gateway>>| asked(gateway.map(|it| &it.listeners[..]), id);
        let (before, after) = (listeners(old.as_ref()), listeners(new));
        self.set_authorizers(Kind::Gateway, id, before, after);
        let object = ObjectRef { kind: Kind::Gateway, name: id.clone() };
        self.set_claims(&object, &gateway_claims(old.as_ref()), &gateway_claims(new));
        old
    }
}

/// The Services that listeners of an object ask about requests.
pub(super) fn asked(listeners: Option<&[Listener]>, owner: &NamespacedName) -> Vec<NamespacedName> {
    let listeners = listeners.into_iter().flatten();
    listeners.flat_map(|listener| listener.asked(&owner.namespace)).collect()
}

/// Whether the pod's addresses are its own: not its node's, and not given back.
pub(super) fn is_addressable(pod: &Pod) -> bool {
    !pod.host_network && !pod.finished
}

/// The cluster IPs of a service.
pub(super) fn cluster_ips(service: Option<&Arc<Service>>) -> impl Iterator<Item = &IpAddr> {
    service.into_iter().filter(|service| !service.external_name).flat_map(|service| &service.addresses)
}

/// The single virtual addresses of a ServiceEntry.
pub(super) fn virtual_addresses(entry: Option<&Arc<ServiceEntry>>) -> impl Iterator<Item = IpAddr> {
    let blocks = entry.into_iter().flat_map(|entry| {
        entry.addresses.iter().chain(entry.allocated.iter().map(|(_, block)| block)).copied()
    });
    blocks.filter(|block| block.prefix_len() == block.max_prefix_len()).map(|block| block.addr())
}

/// The addresses that a ServiceEntry claims: its virtual ones and those of its endpoints.
pub(super) fn service_claims(entry: Option<&Arc<ServiceEntry>>) -> Vec<IpAddr> {
    let endpoints = entry.into_iter().flat_map(|entry| &entry.endpoints).filter_map(WorkloadSpec::ip);
    virtual_addresses(entry).chain(endpoints).collect()
}

/// The address that a WorkloadEntry claims.
pub(super) fn entry_claims(entry: Option<&Arc<WorkloadEntry>>) -> Vec<IpAddr> {
    entry.and_then(|entry| entry.spec.ip()).into_iter().collect()
}

/// The addresses that a gateway claims, if it is one of another network.
pub(super) fn gateway_claims(gateway: Option<&Arc<Gateway>>) -> Vec<IpAddr> {
    gateway.into_iter().flat_map(|gateway| gateway.requested_ips()).collect()
}

/// The class of an Ingress; empty where it names none.
pub(super) fn class_of(ingress: &Ingress) -> Arc<str> {
    ingress.class.clone().unwrap_or_default()
}

/// The service that a slice belongs to.
pub(super) fn service_of(slice: &EndpointSlice) -> NamespacedName {
    NamespacedName::new(slice.id.namespace.clone(), slice.service.clone())
}

/// Inserts or removes and returns what was there.
pub(super) fn replace<K: Clone + Eq + std::hash::Hash, V>(
    map: &mut HashMap<K, Arc<V>>,
    id: &K,
    new: Option<&Arc<V>>,
) -> Option<Arc<V>> {
    match new {
        Some(new) => map.insert(id.clone(), new.clone()),
        None => map.remove(id),
    }
}

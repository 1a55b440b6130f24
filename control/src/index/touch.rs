//! Which producers a change concerns.
//!
//! The rule of completeness: whatever a producer's computation looks at is either noted by its reader as a
//! dependency, or related to it by a selector, label, address or name that is followed here, before
//! and after the change. `tests/incremental.rs` compares with an index built from scratch.

use std::sync::Arc;

use super::Index;
use super::dependencies::Dependency;
use super::l7::hosts;
use super::l7::request_authentications::FetchedKeys;
use super::placements::PodPlacement;
use super::store::{
    asked, class_of, cluster_ips, entry_claims, gateway_claims, replace, service_claims, service_of,
};
use crate::object::{
    AuthorizationPolicy, BackendTlsPolicy, Change, DestinationRule, EndpointSlice, Gateway, Ingress,
    IngressClass, KeyAddress, Kind, Labels, ListenerSet, Namespace, NamespacedName, Node, Object, ObjectRef,
    PeerAuthentication, Pod, ReferenceGrant, ReplicaSet, RequestAuthentication, RootsHolder, Route, Secret,
    Service, ServiceEntry, Telemetry, TrafficPolicy, VirtualService, WorkloadEntry,
};

impl Index {
    /// Takes one change into the store and marks what it concerns.
    pub(super) fn take(&mut self, change: Change) {
        match change {
            Change::Apply(object) => self.apply_object(object),
            Change::Delete(ObjectRef { kind, name }) => self.delete_object(kind, &name),
        }
    }

    fn apply_object(&mut self, object: Object) {
        let id = object.reference().name;
        match object {
            Object::Namespace(new) => self.take_namespace(&id.name, Some(&new)),
            Object::Node(new) => self.take_node(&id.name, Some(&new)),
            Object::Pod(new) => self.take_pod(&id, Some(&new)),
            Object::Service(new) => self.take_service(&id, Some(&new)),
            Object::EndpointSlice(new) => self.take_slice(&id, Some(&new)),
            Object::Secret(new) => self.take_secret(&id, Some(&new)),
            Object::ReplicaSet(new) => self.take_replica_set(&id, Some(&new)),
            Object::IngressClass(new) => self.take_ingress_class(&id.name, Some(&new)),
            Object::Ingress(new) => self.take_ingress(&id, Some(&new)),
            Object::AuthorizationPolicy(new) => self.take_policy(&id, Some(&new)),
            Object::PeerAuthentication(new) => self.take_authentication(&id, Some(&new)),
            Object::ServiceEntry(new) => self.take_service_entry(&id, Some(&new)),
            Object::WorkloadEntry(new) => self.take_workload_entry(&id, Some(&new)),
            Object::Gateway(new) => self.take_gateway(&id, Some(&new)),
            Object::ListenerSet(new) => self.take_listener_set(&id, Some(&new)),
            Object::HttpRoute(new) => self.take_route(Kind::HttpRoute, &id, Some(&new)),
            Object::GrpcRoute(new) => self.take_route(Kind::GrpcRoute, &id, Some(&new)),
            Object::TcpRoute(new) => self.take_route(Kind::TcpRoute, &id, Some(&new)),
            Object::TlsRoute(new) => self.take_route(Kind::TlsRoute, &id, Some(&new)),
            Object::UdpRoute(new) => self.take_route(Kind::UdpRoute, &id, Some(&new)),
            Object::ReferenceGrant(new) => self.take_grant(&id, Some(&new)),
            Object::VirtualService(new) => self.take_virtual_service(&id, Some(&new)),
            Object::DestinationRule(new) => self.take_destination_rule(&id, Some(&new)),
            Object::RequestAuthentication(new) => self.take_request_authentication(&id, Some(&new)),
            Object::ConfigMap(new) => self.take_roots(Kind::ConfigMap, &id, Some(&new)),
            Object::ClusterTrustBundle(new) => self.take_roots(Kind::ClusterTrustBundle, &id, Some(&new)),
            Object::BackendTlsPolicy(new) => self.take_backend_tls_policy(&id, Some(&new)),
            Object::TrafficPolicy(new) => self.take_traffic_policy(&id, Some(&new)),
            Object::Telemetry(new) => self.take_telemetry(&id, Some(&new)),
            // No resource says anything of these: pods name their accounts and owners themselves.
            Object::ServiceAccount(_) | Object::Deployment(_) => {}
        }
    }

    fn delete_object(&mut self, kind: Kind, id: &NamespacedName) {
        match kind {
            Kind::Namespace => self.take_namespace(&id.name, None),
            Kind::Node => self.take_node(&id.name, None),
            Kind::Pod => self.take_pod(id, None),
            Kind::Service => self.take_service(id, None),
            Kind::EndpointSlice => self.take_slice(id, None),
            Kind::Secret => self.take_secret(id, None),
            Kind::ReplicaSet => self.take_replica_set(id, None),
            Kind::AuthorizationPolicy => self.take_policy(id, None),
            Kind::PeerAuthentication => self.take_authentication(id, None),
            Kind::ServiceEntry => self.take_service_entry(id, None),
            Kind::WorkloadEntry => self.take_workload_entry(id, None),
            Kind::Gateway => self.take_gateway(id, None),
            Kind::ListenerSet => self.take_listener_set(id, None),
            Kind::HttpRoute | Kind::GrpcRoute | Kind::TcpRoute | Kind::TlsRoute | Kind::UdpRoute => {
                self.take_route(kind, id, None);
            }
            Kind::ReferenceGrant => self.take_grant(id, None),
            Kind::VirtualService => self.take_virtual_service(id, None),
            Kind::DestinationRule => self.take_destination_rule(id, None),
            Kind::RequestAuthentication => self.take_request_authentication(id, None),
            Kind::ConfigMap | Kind::ClusterTrustBundle => self.take_roots(kind, id, None),
            Kind::BackendTlsPolicy => self.take_backend_tls_policy(id, None),
            Kind::TrafficPolicy => self.take_traffic_policy(id, None),
            Kind::IngressClass => self.take_ingress_class(&id.name, None),
            Kind::Ingress => self.take_ingress(id, None),
            Kind::Telemetry => self.take_telemetry(id, None),
            Kind::ServiceAccount | Kind::Deployment => {}
        }
    }

    fn touch(&mut self, kind: Kind, id: &NamespacedName) {
        self.touched.insert(ObjectRef { kind, name: id.clone() });
    }

    fn touch_users(&mut self, dependency: &Dependency) {
        self.touched.extend(self.dependencies.users(dependency).cloned());
    }

    /// Marks the pods and WorkloadEntries that selectors select.
    fn touch_selected<'a>(
        &mut self,
        namespace: Option<&Arc<str>>,
        selectors: impl Iterator<Item = &'a Labels>,
    ) {
        for selector in selectors {
            for (name, kind) in self.store.members.selected(namespace, selector) {
                self.touched.insert(ObjectRef { kind, name });
            }
        }
    }

    fn take_namespace(&mut self, name: &Arc<str>, new: Option<&Arc<Namespace>>) {
        let old = self.store.set_namespace(name, new);
        let waypoint = |n: &Namespace| n.waypoint.clone();
        if old.as_deref().map(waypoint) != new.map(|n| waypoint(n)) {
            let both = [old.as_ref(), new].into_iter().flatten();
            both.flat_map(|n| n.waypoint.names())
                .for_each(|w| self.touch_users(&Dependency::BoundTo(w.clone())));
        }
        let defaults = |n: &Namespace| (n.waypoint.clone(), n.network.clone(), n.distribution);
        if old.as_deref().map(defaults) != new.map(|n| defaults(n)) {
            self.touch_users(&Dependency::Namespace(name.clone()));
        }
        if old.map(|n| n.labels.clone()) != new.map(|n| n.labels.clone()) {
            self.touch_users(&Dependency::NamespaceLabels(name.clone()));
        }
    }

    fn take_node(&mut self, name: &Arc<str>, new: Option<&Arc<Node>>) {
        let old = self.store.set_node(name, new);
        let locality = |n: &Node| (n.region.clone(), n.zone.clone(), n.subzone.clone());
        if old.as_deref().map(locality) != new.map(|n| locality(n)) {
            self.touch_users(&Dependency::Node(name.clone()));
        }
        let addresses = |node: Option<&Arc<Node>>| node.map(|n| n.addresses.clone()).unwrap_or_default();
        let (before, after) = (addresses(old.as_ref()), addresses(new));
        if before != after {
            before.into_iter().chain(after).for_each(|a| self.touch_users(&Dependency::Address(a)));
        }
    }

    fn take_replica_set(&mut self, id: &NamespacedName, new: Option<&Arc<ReplicaSet>>) {
        let old = replace(&mut self.store.replica_sets, id, new);
        if old.as_ref() != new {
            self.touch_users(&Dependency::ReplicaSet(id.clone()));
        }
    }

    fn take_ingress_class(&mut self, name: &Arc<str>, new: Option<&Arc<IngressClass>>) {
        let old = replace(&mut self.store.ingress_classes, name, new);
        if old.as_ref() != new {
            self.touch_users(&Dependency::IngressClasses);
        }
    }

    fn take_ingress(&mut self, id: &NamespacedName, new: Option<&Arc<Ingress>>) {
        let old = self.store.set_ingress(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::Ingress, id);
        let both = || [old.as_ref(), new].into_iter().flatten();
        let ends = |it: &Arc<Ingress>| (class_of(it), it.listeners.is_empty());
        if old.as_ref().map(ends) != new.map(ends) {
            both().for_each(|it| self.touch_users(&Dependency::IngressesOfClass(class_of(it))));
        }
        let tls = |it: &Arc<Ingress>| (class_of(it), it.listeners.clone(), it.meta.created);
        if old.as_ref().map(tls) != new.map(tls) {
            let hosts = both().flat_map(|it| it.tls_hosts());
            hosts.for_each(|host| self.touch_users(&Dependency::IngressTls(host.into())));
        }
        let backends = |it: &Arc<Ingress>| (class_of(it), it.services());
        if old.as_ref().map(backends) != new.map(backends) {
            let services = both().flat_map(|it| it.services());
            services.for_each(|service| self.touch_users(&Dependency::IngressesTo(service)));
        }
    }

    fn take_secret(&mut self, id: &NamespacedName, new: Option<&Arc<Secret>>) {
        let old = replace(&mut self.store.secrets, id, new);
        if old.as_ref() != new {
            self.touch_users(&Dependency::Secret(id.clone()));
        }
    }

    fn take_pod(&mut self, id: &NamespacedName, new: Option<&Arc<Pod>>) {
        let old = self.store.set_pod(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::Pod, id);
        let placement = |pod: Option<&Arc<Pod>>| pod.and_then(|pod| PodPlacement::of(pod));
        if placement(old.as_ref()) != placement(new) {
            self.placements.insert(id.clone(), placement(new));
        }
        let present = |pod: Option<&Arc<Pod>>| pod.is_some_and(|pod| !pod.finished);
        if present(old.as_ref()) != present(new) {
            self.touch_users(&Dependency::Pod(id.clone()));
        }
        let owned = |pod: Option<&Arc<Pod>>| match pod {
            Some(pod) if !pod.finished => (pod.addresses.clone(), pod.network.clone(), pod.host_network),
            _ => (Vec::new(), None, false),
        };
        let (before, after) = (owned(old.as_ref()), owned(new));
        if before != after {
            for address in before.0.into_iter().chain(after.0) {
                self.touch_users(&Dependency::Address(address));
            }
        }
        self.touch_labelled(old.as_ref(), new);
    }

    /// Marks what reads pods by their labels.
    fn touch_labelled(&mut self, old: Option<&Arc<Pod>>, new: Option<&Arc<Pod>>) {
        let listed = |pod: &Pod| {
            let account = pod.service_account.clone();
            (pod.meta.labels.clone(), pod.addresses.clone(), pod.finished, pod.captured, account)
        };
        if old.map(|pod| listed(pod)) == new.map(|pod| listed(pod)) {
            return;
        }
        for pod in [old, new].into_iter().flatten() {
            for (key, value) in pod.meta.labels.iter() {
                self.touch_users(&Dependency::Label(key.clone(), value.clone()));
            }
        }
    }

    fn take_service(&mut self, id: &NamespacedName, new: Option<&Arc<Service>>) {
        let old = self.store.set_service(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::Service, id);
        let offered = |service: Option<&Arc<Service>>| service.is_some_and(|service| !service.external_name);
        if offered(old.as_ref()) != offered(new) {
            self.touch_users(&Dependency::Hosts);
        }
        let host = self.settings.host_of_service(id);
        self.touch_users(&Dependency::Host(host.into()));
        self.touch_waypoints(old.as_ref(), new);
        let owned = |service| cluster_ips(service).copied().collect::<Vec<_>>();
        let (before, after) = (owned(old.as_ref()), owned(new));
        if before != after {
            before.into_iter().chain(after).for_each(|a| self.touch_users(&Dependency::Address(a)));
        }
        // Pods behind it have a policy where it requires its waypoint.
        let membership = |s: &Service| {
            let waypoint = (s.waypoint.clone(), s.meta.labels.clone());
            let members = (
                s.external_name,
                s.selector.clone(),
                s.ports.clone(),
                s.udp_ports.clone(),
                s.publish_not_ready,
            );
            (members, s.waypoint.required.unwrap_or(true).then_some(waypoint))
        };
        if old.as_deref().map(membership) == new.map(|s| membership(s)) {
            return;
        }
        let selectors = [old.as_ref(), new].into_iter().flatten().filter_map(|s| s.selector.as_ref());
        self.touch_selected(Some(&id.namespace), selectors);
        let slices: Vec<NamespacedName> = self.store.slices_by_service.of(id).cloned().collect();
        for slice in slices {
            self.touch(Kind::EndpointSlice, &slice);
            if let Some(slice) = self.store.slices.get(&slice).cloned() {
                self.touch_pods_of(&slice);
            }
        }
    }

    /// Marks the waypoints that gateways come to see, or need no longer see, by a change of a Service.
    fn touch_waypoints(&mut self, old: Option<&Arc<Service>>, new: Option<&Arc<Service>>) {
        let binding = |service: &Arc<Service>| service.waypoint.clone();
        if old.map(binding) == new.map(binding) {
            return;
        }
        for service in [old, new].into_iter().flatten() {
            let namespace = self.store.namespaces.get(&service.meta.id.namespace).cloned();
            let inherited = namespace.iter().flat_map(|namespace| namespace.waypoint.names());
            for waypoint in service.waypoint.names().chain(inherited) {
                self.touch_users(&Dependency::BoundTo(waypoint.clone()));
            }
        }
    }

    fn take_slice(&mut self, id: &NamespacedName, new: Option<&Arc<EndpointSlice>>) {
        let old = self.store.set_slice(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::EndpointSlice, id);
        for slice in [old.as_ref(), new].into_iter().flatten() {
            // Pods behind a service with a selector are its pods whatever the slice says.
            let service = self.store.services.get(&service_of(slice));
            if service.is_none_or(|service| service.selector.is_none()) {
                self.touch_pods_of(slice);
            }
        }
    }

    fn touch_pods_of(&mut self, slice: &EndpointSlice) {
        for endpoint in &slice.endpoints {
            let addresses = endpoint.addresses.iter();
            let pods = addresses.flat_map(|address| self.store.pods_by_address.of(address));
            let pods: Vec<NamespacedName> = pods.chain(&endpoint.pod).cloned().collect();
            pods.iter().for_each(|pod| self.touch(Kind::Pod, pod));
        }
    }

    fn take_policy(&mut self, id: &NamespacedName, new: Option<&Arc<AuthorizationPolicy>>) {
        let everywhere = id.namespace == self.settings.root_namespace;
        let old = self.store.set_policy(id, new, everywhere);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::AuthorizationPolicy, id);
        for provider in [old.as_ref(), new].into_iter().flatten().filter_map(|policy| policy.asks()) {
            self.touch_users(&Dependency::Asking(provider.clone()));
        }
        let listed = |p: &AuthorizationPolicy| super::authorization::selector_at_l4(p).cloned();
        let (before, after) = (old.as_deref().and_then(listed), new.and_then(|p| listed(p)));
        if before != after {
            let namespace = (!everywhere).then_some(&id.namespace);
            self.touch_selected(namespace, [before, after].iter().flatten());
            self.touch_users(&Dependency::Selectors(id.namespace.clone()));
        }
    }

    fn take_authentication(&mut self, id: &NamespacedName, new: Option<&Arc<PeerAuthentication>>) {
        let old = self.store.set_authentication(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::PeerAuthentication, id);
        let both = || [old.as_ref(), new].into_iter().flatten();
        if both().any(|a| a.selector.is_none()) {
            self.touch_users(&Dependency::Authentication(id.namespace.clone()));
        }
        if both().any(|a| a.selector.is_some()) {
            self.touch_users(&Dependency::Selectors(id.namespace.clone()));
        }
        self.touch_selected(Some(&id.namespace), both().filter_map(|a| a.selector.as_ref()));
    }

    fn take_request_authentication(&mut self, id: &NamespacedName, new: Option<&Arc<RequestAuthentication>>) {
        let old = replace(&mut self.store.request_authentications, id, new);
        if old.as_ref() != new {
            self.touch(Kind::RequestAuthentication, id);
        }
    }

    /// Takes what was fetched of a token issuer's keys; what that changes comes with the next batch.
    pub fn set_keys(&mut self, address: KeyAddress, keys: FetchedKeys) {
        self.touch_users(&Dependency::Keys(address.clone()));
        self.store.keys.insert(address, keys);
    }

    fn take_service_entry(&mut self, id: &NamespacedName, new: Option<&Arc<ServiceEntry>>) {
        let old = self.store.set_service_entry(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::ServiceEntry, id);
        self.touch_users(&Dependency::ServiceEntry(id.clone()));
        let offered = |entry: Option<&Arc<ServiceEntry>>| entry.map(|entry| entry.hosts.clone());
        if offered(old.as_ref()) != offered(new) {
            self.touch_users(&Dependency::Hosts);
        }
        for entry in [old.as_ref(), new].into_iter().flatten() {
            for host in &entry.hosts {
                self.touch_users(&Dependency::Host(host.clone()));
            }
            service_claims(Some(entry)).into_iter().for_each(|a| self.touch_users(&Dependency::Claims(a)));
            self.touch_selected(Some(&id.namespace), entry.selector.iter());
        }
    }

    fn take_workload_entry(&mut self, id: &NamespacedName, new: Option<&Arc<WorkloadEntry>>) {
        let old = self.store.set_workload_entry(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::WorkloadEntry, id);
        for entry in [old.as_ref(), new].into_iter().flatten() {
            for (key, value) in entry.meta.labels.iter() {
                self.touch_users(&Dependency::Label(key.clone(), value.clone()));
            }
        }
        for address in entry_claims(old.as_ref()).into_iter().chain(entry_claims(new)) {
            self.touch_users(&Dependency::Claims(address));
        }
    }

    fn take_route(&mut self, kind: Kind, id: &NamespacedName, new: Option<&Arc<Route>>) {
        let reference = ObjectRef { kind, name: id.clone() };
        let old = self.store.set_route(&reference, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(kind, id);
        self.touch_users(&Dependency::Route(reference));
        // Services and what routes are attached to look at where a route comes from and leads to, not at what it does on the way:
        // thousands of routes may lead to one service.
        if let (Some(old), Some(new)) = (&old, new)
            && old.has_ends_of(new)
        {
            return;
        }
        for route in [old.as_ref(), new].into_iter().flatten() {
            route.services().for_each(|service| self.touch_users(&Dependency::RoutesTo(service)));
            route.attaches_to().for_each(|parent| self.touch_users(&Dependency::RoutesOf(parent)));
        }
    }

    fn take_virtual_service(&mut self, id: &NamespacedName, new: Option<&Arc<VirtualService>>) {
        let old = self.store.set_virtual_service(id, new, &self.settings);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::VirtualService, id);
        self.touch_users(&Dependency::VirtualService(id.clone()));
        for virtual_service in [old.as_ref(), new].into_iter().flatten() {
            let for_hosts: Vec<_> = hosts::of_virtual_service(&self.settings, virtual_service).collect();
            for host in for_hosts {
                self.touch_users(&Dependency::VirtualServicesFor(host));
            }
            let to_hosts: Vec<_> = hosts::of_destinations(&self.settings, virtual_service).collect();
            for host in to_hosts {
                self.touch_users(&Dependency::VirtualServicesTo(host));
            }
            for delegate in virtual_service.delegates() {
                self.touch_users(&Dependency::Delegators(delegate));
            }
        }
    }

    fn take_grant(&mut self, id: &NamespacedName, new: Option<&Arc<ReferenceGrant>>) {
        let old = self.store.set_grant(id, new);
        if old.as_ref() != new {
            self.touch_users(&Dependency::Grants(id.namespace.clone()));
        }
    }

    fn take_roots(&mut self, kind: Kind, id: &NamespacedName, new: Option<&Arc<RootsHolder>>) {
        let object = ObjectRef { kind, name: id.clone() };
        // Most ConfigMaps hold no roots, and need no place.
        let new = new.filter(|holder| holder.roots.is_some());
        let old = replace(&mut self.store.roots, &object, new);
        if old.as_ref() != new {
            self.touch_users(&Dependency::Roots(object));
        }
    }

    fn take_backend_tls_policy(&mut self, id: &NamespacedName, new: Option<&Arc<BackendTlsPolicy>>) {
        let old = self.store.set_backend_tls_policy(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::BackendTlsPolicy, id);
        for target in [old.as_ref(), new].into_iter().flatten().flat_map(|policy| &policy.targets) {
            if let Some(object) = &target.object {
                self.touch_users(&Dependency::TlsPoliciesOf(object.clone()));
            }
        }
    }

    fn take_traffic_policy(&mut self, id: &NamespacedName, new: Option<&Arc<TrafficPolicy>>) {
        let old = self.store.set_traffic_policy(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::TrafficPolicy, id);
        for target in [old.as_ref(), new].into_iter().flatten().flat_map(|policy| policy.known_targets()) {
            self.touch_users(&Dependency::TrafficPoliciesOf(target.object.clone()));
        }
    }

    fn take_telemetry(&mut self, id: &NamespacedName, new: Option<&Arc<Telemetry>>) {
        let old = replace(&mut self.store.telemetries, id, new);
        if old.as_ref() != new {
            self.touch(Kind::Telemetry, id);
            self.touch_users(&Dependency::Telemetries);
        }
    }

    fn take_destination_rule(&mut self, id: &NamespacedName, new: Option<&Arc<DestinationRule>>) {
        let settings = self.settings.clone();
        let host = |rule: &DestinationRule| settings.full_host(&rule.meta.id.namespace, &rule.host);
        let old = self.store.set_destination_rule(id, new, host);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::DestinationRule, id);
        // Endpoints name the labels that subsets select by.
        let selects = |rule: Option<&Arc<DestinationRule>>| {
            let keys =
                |rule: &Arc<DestinationRule>| rule.label_keys().into_iter().map(str::to_owned).collect();
            rule.map(|rule| (host(rule), keys(rule))).filter(|(_, keys): &(_, Vec<String>)| !keys.is_empty())
        };
        let (before, after) = (selects(old.as_ref()), selects(new));
        if before != after {
            for (host, _) in before.into_iter().chain(after) {
                self.touch_endpoints_of(&host);
            }
        }
    }

    /// Marks what is or may become an endpoint of a host.
    fn touch_endpoints_of(&mut self, host: &Arc<str>) {
        if let Some(id) = self.settings.own_service(host)
            && let Some(service) = self.store.services.get(&id).cloned()
        {
            self.touch_selected(Some(&id.namespace), service.selector.iter());
            let slices: Vec<NamespacedName> = self.store.slices_by_service.of(&id).cloned().collect();
            for slice in slices {
                if let Some(slice) = self.store.slices.get(&slice).cloned() {
                    self.touch_pods_of(&slice);
                }
            }
        }
        let entries: Vec<NamespacedName> = self.store.entries_by_host.of(host).cloned().collect();
        for entry in entries {
            self.touch(Kind::ServiceEntry, &entry);
            if let Some(entry) = self.store.service_entries.get(&entry).cloned() {
                self.touch_selected(Some(&entry.meta.id.namespace), entry.selector.iter());
            }
        }
    }

    fn take_listener_set(&mut self, id: &NamespacedName, new: Option<&Arc<ListenerSet>>) {
        let old = self.store.set_listener_set(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::ListenerSet, id);
        self.touch_users(&Dependency::ListenerSet(id.clone()));
        let sets = [old.as_ref(), new].into_iter().flatten();
        for service in sets.flat_map(|set| asked(Some(&set.listeners), id)).collect::<Vec<_>>() {
            self.touch_users(&Dependency::ListenersAsking(service));
        }
        for gateway in [old.as_ref(), new].into_iter().flatten().filter_map(|set| set.gateway.clone()) {
            self.touch_users(&Dependency::ListenerSetsOf(gateway));
        }
    }

    fn take_gateway(&mut self, id: &NamespacedName, new: Option<&Arc<Gateway>>) {
        let old = self.store.set_gateway(id, new);
        if old.as_ref() == new {
            return;
        }
        self.touch(Kind::Gateway, id);
        self.touch_users(&Dependency::Gateway(id.clone()));
        let gateways = [old.as_ref(), new].into_iter().flatten();
        for service in gateways.flat_map(|it| asked(Some(&it.listeners), id)).collect::<Vec<_>>() {
            self.touch_users(&Dependency::ListenersAsking(service));
        }
        let class = |gateway: Option<&Arc<Gateway>>| gateway.map(|gateway| gateway.class.clone());
        if class(old.as_ref()) != class(new) {
            for class in class(old.as_ref()).into_iter().chain(class(new)) {
                self.touch_users(&Dependency::GatewayClass(class));
            }
        }
        for network in [old.as_ref(), new].into_iter().flatten().filter_map(|g| g.network.clone()) {
            self.touch_users(&Dependency::Network(network));
        }
        for address in gateway_claims(old.as_ref()).into_iter().chain(gateway_claims(new)) {
            self.touch_users(&Dependency::Claims(address));
        }
    }
}
